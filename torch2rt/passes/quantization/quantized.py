"""Quantised numbers in a graph: integers or fp8, and the scales that they stand for."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function

INT8 = 127.0  # the largest integer that a range is mapped to; its negative is the smallest
INT4 = 7.0
FP8 = 448.0  # the largest number of E4M3
LARGEST = {torch.int8: INT8, torch.float8_e4m3fn: FP8, torch.uint8: INT4}  # by how the weights are stored


def fake_quantize(x: torch.Tensor, scale: float, low: int = -128, high: int = 127) -> torch.Tensor:
    """Numbers rounded to multiples of a scale, from `low` to `high` times it, as int8 has them.

    It is `torch.fake_quantize_per_tensor_affine` without a zero point, which torch cannot run on fake tensors.

    >>> fake_quantize(torch.tensor([0.26, -9.0, 80.0]), 0.5)
    tensor([ 0.5000, -9.0000, 63.5000])
    """
    if has_torch_function((x,)):
        return handle_torch_function(fake_quantize, (x,), x, scale, low, high)  # type: ignore[no-any-return]
    if isinstance(x, FakeTensor):
        return torch.empty_like(x)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, 0, low, high).to(x.dtype)


def fake_quantize_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Numbers rounded to fp8 (E4M3) multiples of a scale, up to 448 times it; a NaN stays one.

    >>> fake_quantize_fp8(torch.tensor([0.26, -9.5, 800.0]), 0.5)
    tensor([  0.2500, -10.0000, 224.0000])
    """
    if has_torch_function((x,)):
        return handle_torch_function(fake_quantize_fp8, (x,), x, scale)  # type: ignore[no-any-return]
    if isinstance(x, FakeTensor):
        return torch.empty_like(x)
    steps = (x.float() * (1.0 / torch.tensor(scale, device=x.device))).clamp(-FP8, FP8).to(torch.float8_e4m3fn)
    return (steps.float() * scale).to(x.dtype)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Quantised weights as numbers of a floating-point type.

    - `weight`: int8, fp8 (E4M3), or uint8 for int4, two in each along the last dimension, the first in the low bits.
    - `scale`: float32, a number for each index of the dimension `axis`; or, of as many dimensions as the weight has, a
      number for each of as many equal blocks. int4 is scaled in the type of the result.

    >>> dequantize(torch.tensor([[2], [-3]], dtype=torch.int8), torch.tensor([0.5, 2.0]), 0, torch.float32)
    tensor([[ 1.],
            [-6.]])
    >>> dequantize(torch.tensor([[0x2F, 0x18]], dtype=torch.uint8), torch.tensor([[0.5, 10.0]]), 0, torch.float32)
    tensor([[ -0.5000,   1.0000, -80.0000,  10.0000]])
    """
    numbers = unpacked(weight).float() if weight.dtype is torch.uint8 else weight.float()
    if weight.dtype is torch.uint8:
        scale = scale.to(dtype).float()
    if scale.dim() == numbers.dim() > 1:
        for dim, (size, count) in enumerate(zip(numbers.shape, scale.shape, strict=True)):
            scale = scale.repeat_interleave(size // count, dim)
        return (numbers * scale).to(dtype)
    shape = [-1 if dim == axis else 1 for dim in range(numbers.dim())]
    return (numbers * scale.reshape(shape)).to(dtype)


def scaled(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs of a product, along its last dimension, each times a float32 number and plus a bias.

    >>> scaled(torch.tensor([[6.0, -4.0]]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 3.0]))
    tensor([[ 4., -1.]])
    """
    if has_torch_function((x, scale)):
        return handle_torch_function(scaled, (x, scale), x, scale, bias)  # type: ignore[no-any-return]
    y = (x.float() * scale).to(x.dtype)
    return y if bias is None else y + bias


def attention_of_quantized(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    format: str = "int8",
    largest: float = 1.0,
    tokens_first: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` whose probabilities are int8 multiples of 1/127 of the largest, or fp8 ones.

    `tokens_first`: whether the result lies in memory as torch's own kernels leave it, token by token.

    >>> x = torch.tensor([[[1.0], [3.0]]])
    >>> attention_of_quantized(torch.zeros(1, 1, 1), x, x) * 127 / 64  # half of 127 is taken for 64
    tensor([[[4.]]])
    """
    given = (query, key, value, attn_mask)
    if has_torch_function(given):
        call = attention_of_quantized
        more = (is_causal, scale, format, largest, tokens_first)
        return handle_torch_function(call, given, *given, *more)  # type: ignore[no-any-return]
    if isinstance(query, FakeTensor):
        return torch.empty_like(query)
    probabilities = probabilities_of(query, key, attn_mask, is_causal, scale).to(value.dtype)
    round = fake_quantize_fp8 if format == "fp8" else fake_quantize
    result = round(probabilities, largest / (FP8 if format == "fp8" else INT8)) @ value
    return result.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else result


def probabilities_of(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """The softmax of an attention."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.float().softmax(-1)


def quantized(
    weight: torch.Tensor, axis: int, stored: torch.dtype = torch.int8, block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as `dequantize` takes it, and its scales: nothing saturates. Zeros have the scale 1.

    - `axis`: the dimension of the outputs, each of which has its scale. `stored`: a key of `LARGEST`.
    - `block`: of a matrix, how many numbers along the other dimension have a scale of their own.
    """
    most = LARGEST[stored]
    if block is None:
        rows = weight.detach().float().transpose(0, axis).flatten(1)
    else:
        rows = weight.detach().float().transpose(0, axis).reshape(-1, block)
    scale = rows.abs().amax(1) / most
    least = torch.finfo(torch.float16 if stored is torch.uint8 else torch.float32).tiny  # whose scales may be float16
    scale = torch.where(scale > 0, scale, 1.0).clamp_min(least)
    if stored is torch.uint8:
        scale = torch.where(scale < torch.finfo(torch.float16).max, scale.half().float(), scale)
    steps = rows / scale[:, None]
    steps = steps if stored.is_floating_point else steps.round_()
    steps = steps.clamp_(-most, most).to(torch.int8 if stored is torch.uint8 else stored)
    moved = weight.transpose(0, axis).shape
    values = steps.reshape(moved).transpose(0, axis).contiguous()
    if block is not None:
        scale = scale.reshape(moved[0], -1).transpose(0, axis).contiguous()
    return (packed(values) if stored is torch.uint8 else values), scale


def packed(values: torch.Tensor) -> torch.Tensor:
    """Integers from -8 to 7, two in a byte along the last dimension, which is even."""
    pairs = values.reshape(*values.shape[:-1], -1, 2).to(torch.int16) & 15
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def unpacked(bytes: torch.Tensor) -> torch.Tensor:
    """The inverse of `packed`, as int8.

    >>> unpacked(packed(torch.tensor([[-8, 7], [0, -1]])))
    tensor([[-8,  7],
            [ 0, -1]], dtype=torch.int8)
    """
    pairs = torch.stack([bytes & 15, bytes >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)
