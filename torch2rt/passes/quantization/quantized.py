"""Quantised numbers in a graph: integers and the scales that they stand for."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function

INT8 = 127.0  # the largest integer that a range is mapped to; its negative is the smallest


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
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, low, high)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Quantised weights as numbers of a floating-point type.

    `weight` is int8; `scale` is float32, a number for each index of the dimension `axis`.

    >>> dequantize(torch.tensor([[2], [-3]], dtype=torch.int8), torch.tensor([0.5, 2.0]), 0, torch.float32)
    tensor([[ 1.],
            [-6.]])
    """
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    return (weight.float() * scale.reshape(shape)).to(dtype)


def quantized(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as int8, and its scales for each index of a dimension: nothing saturates. Zeros have the scale 1."""
    rows = weight.detach().float().transpose(0, axis).flatten(1)
    scale = rows.abs().amax(1) / INT8
    scale = torch.where(scale > 0, scale, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (rows / scale[:, None]).round_().clamp_(-INT8, INT8).to(torch.int8)
    moved = weight.transpose(0, axis).shape
    return steps.reshape(moved).transpose(0, axis).contiguous(), scale
