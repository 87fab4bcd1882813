"""What each TensorRT layer computes, in torch: `LAYERS` has one function per layer type.

Such a function reads the layer's attributes once and returns what turns the layer's inputs (None where an optional
one is missing) into its outputs. All of it is written from TensorRT's documentation and from what its shape inference
folds, never from our converters. Half precision is computed in float32 and rounded once, at the end, as kernels do.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch2rt.backend import LOG, TORCH_DTYPES, trt
from torch2rt.errors import Torch2RTError

Stored = Mapping[str, Tensor]
Run = Callable[..., Any]

# torch has no four bit integers: their values are kept in int8.
DTYPES: dict[Any, torch.dtype] = {
    **TORCH_DTYPES,
    **{
        getattr(trt.DataType, name): dtype
        for name, dtype in (("FP8", torch.float8_e4m3fn), ("INT4", torch.int8))
        if hasattr(trt.DataType, name)
    },
}
QUANTIZED_RANGE = {"INT8": (-128, 127), "INT4": (-8, 7), "FP8": (-448, 448)}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Torch2RTError(message)


def pick(table: Mapping[str, Any], choice: Any) -> Any:
    """The table's entry for an enum value."""
    require(choice.name in table, f"{choice} is not supported")
    return table[choice.name]


def bits(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def dims(value: Any) -> tuple[int, ...] | None:
    """Dims as ints, or None where they are unset or come as a tensor."""
    try:
        return None if value is None else tuple(int(value[i]) for i in range(len(value)))
    except ValueError:  # unset ones have the length -1 in TensorRT for RTX 1.4
        return None


def torch_type(dtype: Any) -> torch.dtype:
    require(dtype in DTYPES, f"{dtype} is not supported")
    return DTYPES[dtype]


def ints(tensor: Tensor) -> list[int]:
    return [int(i) for i in tensor.reshape(-1).tolist()]


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector laid along one axis of a tensor of this rank."""
    return vector.reshape([-1 if d == axis else 1 for d in range(rank)])


def same_type(*tensors: Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None}
    require(len(dtypes) == 1, f"strong typing forbids mixing {sorted(map(str, dtypes))}")
    return dtypes.pop()


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def floats(x: Tensor) -> Tensor:
    require(x.is_floating_point(), f"{x.dtype} where only floating point is defined")
    return x.float()


def accumulator(x: Tensor) -> Tensor:
    """Floats for sums of products; double on a GPU, where torch may use TF32 for float32."""
    return floats(x).double() if x.is_cuda else floats(x)


def values(layer: Any, stored: Stored, role: str) -> Tensor | None:
    """A weights attribute as a flat tensor, None where it is empty."""
    if role in stored:
        return stored[role].detach().reshape(-1)
    array = getattr(layer, role)
    if array is None or array.size == 0:
        return None
    require(isinstance(array, np.ndarray), f"{role} cannot be read back; pass it in `weights`")
    return torch.from_numpy(array).reshape(-1)


# Constants and types


def constant(layer: Any, stored: Stored) -> Run:
    shape = dims(layer.shape) or ()
    output = layer.get_output(0).dtype
    value = values(layer, stored, "weights")
    if value is None:
        value = torch.empty(0, dtype=torch_type(output))
    if output.name == "INT4" and value.dtype == torch.uint8:
        packed = value.to(torch.int16)
        value = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)[: math.prod(shape)]
        value = torch.where(value > 7, value - 16, value).to(torch.int8)
    value = value.reshape(shape)
    return lambda: value


def identity(layer: Any, stored: Stored) -> Run:
    return lambda x: x


def cast(layer: Any, stored: Stored) -> Run:
    to = torch_type(layer.to_type)
    return lambda x: x.to(to)


def shape_of(layer: Any, stored: Stored) -> Run:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def _scale_like(x: Tensor, scale: Tensor, axis: int, block: tuple[int, ...] | None) -> Tensor:
    """Scales of a tensor, an axis or blocks, broadcastable to the data."""
    require(bool((scale > 0).all()), "scales must be positive")
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and scale.shape != x.shape:
        require(0 <= axis < x.ndim and x.shape[axis] == scale.numel(), f"{axis=} does not fit {scale.numel()} scales")
        return along(scale, axis, x.ndim)
    require(scale.ndim == x.ndim, f"scales of rank {scale.ndim} for data of rank {x.ndim}")
    for d, (n, blocks) in enumerate(zip(x.shape, scale.shape, strict=True)):
        size = n // blocks
        require(size * blocks == n and (block is None or block[d] in (-1, size)), f"blocks of {block} do not fit {n}")
        scale = scale.repeat_interleave(size, d)
    return scale


def _block_shape(layer: Any) -> tuple[int, ...] | None:
    with LOG.capture():
        try:
            return dims(layer.block_shape)
        except (AttributeError, RuntimeError):
            return None


def _no_zero_point(zero: Tensor | None) -> None:
    require(zero is None or not zero.float().any(), "zero points other than 0 are not supported")


def quantize(layer: Any, stored: Stored) -> Run:
    axis, block, to = layer.axis, _block_shape(layer), torch_type(layer.to_type)
    low, high = pick(QUANTIZED_RANGE, layer.to_type)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        _no_zero_point(zero)
        y = floats(x) / _scale_like(x, floats(scale), axis, block)
        y = y if to.is_floating_point else y.round()
        return y.clamp(low, high).to(to)

    return run


def dequantize(layer: Any, stored: Stored) -> Run:
    axis, block, to = layer.axis, _block_shape(layer), torch_type(layer.to_type)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        _no_zero_point(zero)
        return (x.float() * _scale_like(x, floats(scale), axis, block)).to(to)

    return run


# Elementwise

ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: x.clamp_min(0),
    "SIGMOID": lambda x, a, b: x.sigmoid(),
    "TANH": lambda x, a, b: x.tanh(),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * x.expm1()),
    "SELU": lambda x, a, b: b * torch.where(x > 0, x, a * x.exp() - a),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.logaddexp(b * x, torch.zeros_like(x)),
    "CLIP": lambda x, a, b: x.clamp_max(b).clamp_min(a),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp_max(1).clamp_min(0),
    "SCALED_TANH": lambda x, a, b: a * (b * x).tanh(),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(0.5) * x).erf()),
    "GELU_TANH": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (0.044715 * x**3 + x)).tanh()),
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name.lower()) for name in (
        "EXP", "LOG", "SQRT", "ABS", "NEG", "SIN", "COS", "TAN", "SINH", "COSH", "ASIN", "ACOS", "ATAN", "ASINH",
        "ACOSH", "ATANH", "CEIL", "FLOOR", "ERF", "SIGN", "ROUND", "ISINF", "ISNAN",
    )},
    "RECIP": torch.reciprocal,
    "NOT": torch.logical_not,
}
UNARY_INTEGER = {"ABS", "NEG", "SIGN"}


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    return (a / b).floor() if a.is_floating_point() else torch.div(a, b, rounding_mode="floor")


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _divide,
    "POW": torch.pow,
    "FLOOR_DIV": _floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
LOGICAL = {"AND", "OR", "XOR"}
COMPARISONS = {"EQUAL", "GREATER", "LESS"}


def activation(layer: Any, stored: Stored) -> Run:
    name, op, alpha, beta = layer.type.name, pick(ACTIVATIONS, layer.type), layer.alpha, layer.beta

    def run(x: Tensor) -> Tensor:
        require(x.is_floating_point() or name == "RELU", f"{name} of {x.dtype}")
        return op(wide(x), alpha, beta).to(x.dtype)

    return run


def unary(layer: Any, stored: Stored) -> Run:
    name, op = layer.op.name, pick(UNARY, layer.op)

    def run(x: Tensor) -> Tensor:
        known = x.dtype == torch.bool if name == "NOT" else x.is_floating_point() or name in UNARY_INTEGER
        require(known, f"{name} of {x.dtype}")
        y = op(wide(x))
        return y if y.dtype == torch.bool else y.to(x.dtype)

    return run


def elementwise(layer: Any, stored: Stored) -> Run:
    name, op = layer.op.name, pick(ELEMENTWISE, layer.op)

    def run(a: Tensor, b: Tensor) -> Tensor:
        dtype = same_type(a, b)
        require(a.ndim == b.ndim, f"ranks {a.ndim} and {b.ndim} differ")
        require(name == "EQUAL" or (name in LOGICAL) == (dtype == torch.bool), f"{name} of {dtype}")
        y = op(wide(a), wide(b))
        return y if name in COMPARISONS else y.to(dtype)

    return run


def select(layer: Any, stored: Stored) -> Run:
    def run(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        same_type(a, b)
        require(condition.dtype == torch.bool, f"a condition of {condition.dtype}")
        require(condition.ndim == a.ndim == b.ndim, f"ranks {condition.ndim}, {a.ndim} and {b.ndim} differ")
        return torch.where(condition, a, b)

    return run


def parametric_relu(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, slopes: Tensor) -> Tensor:
        dtype = same_type(x, slopes)
        return torch.where(x < 0, wide(x) * wide(slopes), wide(x)).to(dtype)

    return run


def scale(layer: Any, stored: Stored) -> Run:
    mode, axis = layer.mode.name, layer.channel_axis
    parts = {role: values(layer, stored, role) for role in ("scale", "shift", "power")}

    def run(x: Tensor) -> Tensor:
        same_type(x, *parts.values())
        shape = {"UNIFORM": (), "CHANNEL": x.shape[axis : axis + 1], "ELEMENTWISE": x.shape[axis:]}[mode]
        trailing = (1,) * (x.ndim - axis - 1) if mode == "CHANNEL" else ()
        weight = {k: floats(v).to(x.device).reshape((*shape, *trailing)) for k, v in parts.items() if v is not None}
        y = floats(x) * weight.get("scale", 1.0) + weight.get("shift", 0.0)
        return (y ** weight["power"] if "power" in weight else y).to(x.dtype)

    return run


# Reductions and normalization


def _limit(dtype: torch.dtype, op: str) -> float | int:
    if dtype.is_floating_point:
        return -math.inf if op == "MAX" else math.inf
    return torch.iinfo(dtype).min if op == "MAX" else torch.iinfo(dtype).max


def reduce(layer: Any, stored: Stored) -> Run:
    op, axes, keep = layer.op.name, bits(layer.axes), layer.keep_dims
    require(op in ("SUM", "PROD", "MAX", "MIN", "AVG"), f"{op=} is not supported")

    def run(x: Tensor) -> Tensor:
        require(x.dtype != torch.bool, "a reduction of bool")
        require(x.dtype != torch.int8 or op in ("MAX", "MIN"), f"{op} of int8 is not supported")
        y = wide(x)
        count = math.prod(x.shape[a] for a in axes)
        if op in ("MAX", "MIN"):
            if count == 0:
                limit = _limit(x.dtype, op)
                kept = [1 if d in axes else n for d, n in enumerate(x.shape)]
                y = x.new_full(kept if keep else [n for d, n in enumerate(x.shape) if d not in axes], limit)
            else:
                y = y.amax(axes, keepdim=keep) if op == "MAX" else y.amin(axes, keepdim=keep)
        elif op == "PROD":
            for a in reversed(axes):
                y = y.prod(a, keepdim=keep, dtype=y.dtype)
        elif op == "AVG" and x.is_floating_point():
            y = y.mean(axes, keepdim=keep)
        else:
            y = y.sum(axes, keepdim=keep, dtype=y.dtype)
            y = torch.div(y, max(count, 1), rounding_mode="trunc") if op == "AVG" else y
        return y.to(x.dtype)

    return run


def cumulative(layer: Any, stored: Stored) -> Run:
    require(layer.op.name == "SUM", f"{layer.op} is not supported")
    exclusive, reverse = layer.exclusive, layer.reverse

    def run(x: Tensor, axis_tensor: Tensor) -> Tensor:
        axis = int(axis_tensor)
        y = wide(x)
        y = y.flip(axis) if reverse else y
        if exclusive:
            n = y.shape[axis]
            y = torch.cat([torch.zeros_like(y.narrow(axis, 0, min(n, 1))), y.narrow(axis, 0, max(n - 1, 0))], axis)
        y = y.cumsum(axis, dtype=y.dtype)
        return (y.flip(axis) if reverse else y).to(x.dtype)

    return run


def softmax(layer: Any, stored: Stored) -> Run:
    axes = bits(layer.axes)
    require(len(axes) == 1, f"softmax over {axes=}")
    return lambda x: floats(x).softmax(axes[0]).to(x.dtype)


def ragged_softmax(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, bounds: Tensor) -> Tensor:
        inside = torch.arange(x.shape[-1], device=x.device) < bounds
        y = floats(x).masked_fill(~inside, -math.inf).softmax(-1)
        return y.masked_fill(~inside, 0).to(x.dtype)

    return run


def topk(layer: Any, stored: Stored) -> Run:
    dynamic = layer.num_inputs > 1 and layer.get_input(1) is not None
    static = -1 if dynamic else layer.k
    largest, axes = layer.op.name == "MAX", bits(layer.axes)
    index_type = torch_type(layer.get_output(1).dtype)
    require(len(axes) == 1, f"top k over {axes=}")

    def run(x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = static if size is None else int(size)
        require(x.dtype != torch.bool, "top k of bool")
        require(0 <= k <= min(x.shape[axes[0]], 3840), f"{k=} of {x.shape[axes[0]]}, 3840 at most")
        y, index = x.sort(dim=axes[0], descending=largest, stable=True)
        return y.narrow(axes[0], 0, k).contiguous(), index.narrow(axes[0], 0, k).to(index_type)

    return run


def normalization(layer: Any, stored: Stored) -> Run:
    axes, groups, epsilon = bits(layer.axes), layer.num_groups, layer.epsilon
    precision = getattr(layer, "compute_precision", trt.DataType.FLOAT)
    require(precision == trt.DataType.FLOAT, f"{precision=} is not supported")

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        dtype = same_type(x, scale, bias)
        y, over = floats(x), axes
        scale, bias = scale.float(), bias.float()
        if groups != 1:
            require(axes == tuple(range(2, x.ndim)), f"{axes=} with {groups=}: all axes after the channel are meant")
            require(x.shape[1] % groups == 0, f"{groups=} of {x.shape[1]} channels")
            y, over = y.unflatten(1, (groups, -1)), tuple(range(2, x.ndim + 1))
            if scale.shape[1] == groups:
                scale, bias = (t.repeat_interleave(x.shape[1] // groups, 1) for t in (scale, bias))
        centred = y - y.mean(over, keepdim=True)
        y = centred / (centred.square().mean(over, keepdim=True) + epsilon).sqrt()
        return (y.reshape(x.shape) * scale + bias).to(dtype)

    return run


def lrn(layer: Any, stored: Stored) -> Run:
    """The window is centred and alpha divided by its size, as measured on GPUs: the operator page says otherwise."""
    window, alpha, beta, k = layer.window_size, layer.alpha, layer.beta, layer.k

    def run(x: Tensor) -> Tensor:
        y = floats(x)
        around = F.pad(y.square(), (0, 0, 0, 0, window // 2, window // 2)).unfold(-3, window, 1).sum(-1)
        return (y / (k + alpha / window * around) ** beta).to(x.dtype)

    return run


# Products


def matrix_multiply(layer: Any, stored: Stored) -> Run:
    op0, op1 = layer.op0.name, layer.op1.name

    def run(a: Tensor, b: Tensor) -> Tensor:
        dtype = same_type(a, b)
        a = a.unsqueeze(-2) if op0 == "VECTOR" else a.mT if op0 == "TRANSPOSE" else a
        b = b.unsqueeze(-1) if op1 == "VECTOR" else b.mT if op1 == "TRANSPOSE" else b
        require(a.ndim == b.ndim, f"{a.ndim - 2} and {b.ndim - 2} batch dimensions")
        y = accumulator(a) @ accumulator(b)
        y = y.squeeze(-2) if op0 == "VECTOR" else y
        return (y.squeeze(-1) if op1 == "VECTOR" else y).to(dtype)

    return run


def einsum(layer: Any, stored: Stored) -> Run:
    equation = layer.equation

    def run(*operands: Tensor) -> Tensor:
        dtype = same_type(*operands)
        return torch.einsum(equation, *map(accumulator, operands)).to(dtype)

    return run


def _attends(kind: str, queries: int, keys: int, device: torch.device) -> Tensor:
    shift = {"UPPER_LEFT": 0, "LOWER_RIGHT": keys - queries}[kind]
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None] + shift


def attention(layer: Any, stored: Stored) -> Run:
    what = layer.attention
    causal = getattr(what, "causal_kind", None)
    kind = causal.name if causal is not None else "UPPER_LEFT" if what.causal else "NONE"
    norm = what.norm_op.name
    require(norm == "SOFTMAX", f"{norm=} is not supported")  # RTX 1.6 does not compute the plain product of NONE
    for name in ("normalization_quantize_scale", "query_lengths", "key_value_lengths"):
        require(getattr(what, name, None) is None, f"attention with {name} is not supported")
    for name in ("query_form", "key_value_form"):
        form = getattr(what, name, None)
        require(form is None or form.name == "PADDED_BHND", f"attention with {name} {form} is not supported")
    require(getattr(what, "num_ranks", 1) == 1, "attention over several devices is not supported")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dtype = same_type(q, k, v)
        require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
        key, value = (accumulator(t).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = accumulator(q) @ key.mT
        allowed = _attends(kind, q.shape[2], k.shape[2], q.device) if kind != "NONE" else None
        require(mask is None or allowed is None, "a mask and causality exclude each other")
        if mask is not None and mask.dtype == torch.bool:
            allowed = mask
        elif mask is not None:
            same_type(q, mask)
            scores = scores + mask.to(scores.dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return (scores.softmax(-1) @ value).to(dtype)

    return run


def rotary_embedding(layer: Any, stored: Stored) -> Run:
    interleaved, rotary = layer.interleaved, layer.rotary_embedding_dim

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        dtype = same_type(x, cos, sin)
        size = rotary or x.shape[-1]
        cos, sin = ((t if positions is None else t[positions.long()]).float().unsqueeze(1) for t in (cos, sin))
        turned, rest = floats(x).split([size, x.shape[-1] - size], -1)
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1).to(dtype)

    return run


# Windows


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution, deconvolution or pooling."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pre: tuple[int, ...]
    post: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, layer: Any, size: Any, dilation: Any = None) -> Window:
        size = tuple(size)
        return cls(
            size, tuple(layer.stride_nd), tuple(dilation or (1,) * len(size)),
            tuple(layer.pre_padding), tuple(layer.post_padding), layer.padding_mode.name,
        )

    @property
    def extent(self) -> list[int]:
        return [1 + d * (n - 1) for n, d in zip(self.size, self.dilation, strict=True)]

    def halves(self, total: int) -> tuple[int, int]:
        """SAME padding, split into before and after."""
        small, large = total // 2, total - total // 2
        return (small, large) if self.mode == "SAME_UPPER" else (large, small)

    def padding(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Per dimension the padding before and after, and how far the last window of ROUND_UP hangs over it."""
        pads = []
        for n, stride, extent, pre, post in zip(lengths, self.stride, self.extent, self.pre, self.post, strict=True):
            if self.mode.startswith("SAME"):
                total = (n - 1) // stride * stride + extent - n
                require(total >= 0, f"{self.mode} with a stride of {stride} over a window of {extent} is not supported")
                pads.append((*self.halves(total), 0))
                continue
            room = n + pre + post - extent
            require(room >= 0, f"a window of {extent} does not fit into {n} padded by {pre} and {post}")
            pads.append((pre, post, -room % stride if self.mode == "EXPLICIT_ROUND_UP" else 0))
        return pads

    def cropping(self) -> list[tuple[int, int]]:
        """What a deconvolution cuts off its full result, before and after."""
        if self.mode.startswith("SAME"):
            return [self.halves(max(e - s, 0)) for e, s in zip(self.extent, self.stride, strict=True)]
        return list(zip(self.pre, self.post, strict=True))


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0) -> Tensor:
    """Pad the last dimensions, whose order `pads` is in."""
    return F.pad(x, list(itertools.chain.from_iterable(reversed(pads))), value=value)


def _kernels(layer: Any, stored: Stored) -> Run:
    """Whether kernel and bias are weights or inputs: both as tensors, checked against the data's type."""
    kernel, bias = values(layer, stored, "kernel"), values(layer, stored, "bias")

    def get(x: Tensor, k: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        require(k is None or kernel is None, "a kernel both as weights and as input")
        require(b is None or bias is None, "a bias both as weights and as input")
        k, b = kernel if k is None else k, bias if b is None else b
        assert k is not None
        same_type(x, k, b)
        return accumulator(k.to(x.device)), None if b is None else accumulator(b.to(x.device))

    return get


def _batched(x: Tensor, n: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """All dimensions before the channel are batch."""
    y = run(x.reshape(math.prod(x.shape[: -n - 1]), *x.shape[-n - 1 :]))
    return y.reshape(*x.shape[: -n - 1], *y.shape[1:])


def convolution(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.kernel_size_nd, layer.dilation_nd)
    maps, groups, n, kernels = layer.num_output_maps, layer.num_groups, len(window.size), _kernels(layer, stored)
    conv = {2: F.conv2d, 3: F.conv3d}[n]

    def run(x: Tensor, k: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        kernel, bias = kernels(x, k, b)
        kernel = kernel.reshape(maps, x.shape[-n - 1] // groups, *window.size)
        pads = [(before, after + over) for before, after, over in window.padding(x.shape[-n:])]
        y = _pad(accumulator(x), pads)
        stride, dilation = window.stride, window.dilation
        return _batched(y, n, lambda t: conv(t, kernel, bias, stride, 0, dilation, groups)).to(x.dtype)

    return run


def deconvolution(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.kernel_size_nd, layer.dilation_nd)
    maps, groups, n, kernels = layer.num_output_maps, layer.num_groups, len(window.size), _kernels(layer, stored)
    conv = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]

    def run(x: Tensor, k: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        kernel, bias = kernels(x, k, b)
        kernel = kernel.reshape(x.shape[-n - 1], maps // groups, *window.size)
        stride, dilation = window.stride, window.dilation
        y = _batched(accumulator(x), n, lambda t: conv(t, kernel, bias, stride, 0, 0, groups, dilation))
        return _pad(y, [(-before, -after) for before, after in window.cropping()]).to(x.dtype)

    return run


def pooling(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.window_size_nd)
    op, n = layer.type.name, len(window.size)
    inside = tuple(range(-n, 0))
    excluding, blend = layer.average_count_excludes_padding, layer.blend_factor
    require(op in ("MAX", "AVERAGE", "MAX_AVERAGE_BLEND"), f"{op=} is not supported")

    def windows(x: Tensor) -> Tensor:
        for size, stride in zip(window.size, window.stride, strict=True):
            x = x.unfold(-n, size, stride)
        return x

    def highest(x: Tensor, pads: Sequence[tuple[int, int, int]]) -> Tensor:
        outer = [(before, after + over) for before, after, over in pads]
        return windows(_pad(x, outer, _limit(x.dtype, "MAX"))).amax(inside)

    def average(x: Tensor, pads: Sequence[tuple[int, int, int]]) -> Tensor:
        explicit, hanging = [pad[:2] for pad in pads], [(0, over) for *_, over in pads]
        # TensorRT for RTX 1.6 divides by the whole window here, and nothing documented says by what to divide.
        require(excluding or not any(over for *_, over in pads), "an average over windows beyond the padding it counts")
        counted = _pad(_pad(torch.ones(x.shape[-n:], device=x.device), explicit, 0 if excluding else 1), hanging)
        return windows(_pad(_pad(x, explicit), hanging)).sum(inside) / windows(counted).sum(inside)

    def run(x: Tensor) -> Tensor:
        require(x.is_floating_point() or op == "MAX", f"{op} of {x.dtype}")
        pads = window.padding(x.shape[-n:])
        if op == "MAX":
            return highest(x, pads)
        if op == "AVERAGE":
            return average(floats(x), pads).to(x.dtype)
        return ((1 - blend) * highest(floats(x), pads) + blend * average(floats(x), pads)).to(x.dtype)

    return run


def padding(layer: Any, stored: Stored) -> Run:
    pads = list(zip(layer.pre_padding_nd, layer.post_padding_nd, strict=True))
    return lambda x: _pad(x, pads)


# Moving data


def shuffle(layer: Any, stored: Stored) -> Run:
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    static, placeholder = dims(layer.reshape_dims), layer.zero_is_placeholder

    def run(x: Tensor, dynamic: Tensor | None = None) -> Tensor:
        x = x.permute(first[: x.ndim])
        shape = static if dynamic is None else ints(dynamic)
        if shape is not None:
            shape = [x.shape[i] if d == 0 and placeholder else d for i, d in enumerate(shape)]
            x = x.reshape(shape)
        return x.permute(second[: x.ndim])

    return run


def _sampled(mode: str, index: Tensor, n: int) -> Tensor:
    """Coordinates of a slice brought into the data; those of FILL are left outside."""
    if mode == "FILL" or not index.numel():
        return index
    require(n > 0, f"{mode} of an empty dimension")
    if mode == "STRICT_BOUNDS":
        first, last = int(index[0]), int(index[-1])
        require(min(first, last) >= 0 and max(first, last) < n, f"reads elements {first} to {last} of {n}")
        return index
    if mode == "WRAP":
        return index % n
    if mode == "CLAMP":
        return index.clamp(0, n - 1)
    require(mode == "REFLECT", f"{mode=} is not supported")
    around = index % max(2 * (n - 1), 1)
    return torch.minimum(around, 2 * (n - 1) - around)


def slice_(layer: Any, stored: Stored) -> Run:
    static = dims(layer.start), dims(layer.shape), dims(layer.stride)
    static_axes, mode = dims(getattr(layer, "axes", None)), layer.mode.name

    def run(
        x: Tensor, start: Tensor | None = None, size: Tensor | None = None, stride: Tensor | None = None,
        fill: Tensor | None = None, axes: Tensor | None = None,
    ) -> Tensor:
        require(fill is None or mode == "FILL", f"a fill value with {mode=}")
        first, count, step = (s if t is None else ints(t) for s, t in zip(static, (start, size, stride), strict=True))
        where = ints(axes) if axes is not None else static_axes or range(x.ndim)
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for axis, at, m, by in zip(where, first or (), count or (), step or (), strict=True):
            axis, n = axis % x.ndim, x.shape[axis]
            if (at, m, by) == (0, n, 1):
                continue
            index = _sampled(mode, at + by * torch.arange(m, device=x.device), n)
            if mode == "FILL":
                inside = inside & along((index >= 0) & (index < n), axis, x.ndim)
            x = _take(x, axis, index)
        if mode != "FILL" or bool(inside.all()):
            return x
        if fill is None:
            return x.masked_fill(~inside, 0)
        require(fill.dtype == x.dtype or (fill.is_floating_point() and x.is_floating_point()), f"fill of {fill.dtype}")
        return torch.where(inside, x, fill.reshape(()).to(x.dtype))

    return run


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`index_select` that puts up with indices out of range, for results that are masked afterwards."""
    n = x.shape[axis]
    if n == 0 and index.numel():
        shape = list(x.shape)
        shape[axis] = index.numel()
        return x.new_zeros(shape)
    return x.index_select(axis, index.clamp(0, max(n - 1, 0)))


def concatenation(layer: Any, stored: Stored) -> Run:
    axis = layer.axis

    def run(*tensors: Tensor) -> Tensor:
        same_type(*tensors)
        require(len({t.ndim for t in tensors}) == 1, "ranks differ")
        return torch.cat(tensors, axis)

    return run


def squeeze(layer: Any, stored: Stored) -> Run:
    declared = tuple(layer.get_input(0).shape)

    def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
        if axes is None:
            require(not any(d == -1 and n == 1 for d, n in zip(declared, x.shape, strict=True)), "a dynamic size is 1")
            drop = [i for i, d in enumerate(declared) if d == 1]
        else:
            drop = [a % x.ndim for a in ints(axes)]
        require(all(x.shape[a] == 1 for a in drop), f"sizes of {drop} in {tuple(x.shape)} are not 1")
        return x.reshape([n for i, n in enumerate(x.shape) if i not in drop])

    return run


def unsqueeze(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(a % rank for a in ints(axes)):
            x = x.unsqueeze(axis)
        return x

    return run


def _resolve(index: Tensor, n: int, declared: int) -> tuple[Tensor, Tensor]:
    """Indices counted from the front, and which of them are in range."""
    index = index.long()
    require(declared >= 0 or not bool((index < 0).any()), "a negative index into a dynamic dimension is undefined")
    index = torch.where(index < 0, index + n, index)
    return index, (index >= 0) & (index < n)


def _gather_axis(data: Tensor, index: Tensor, axis: int, declared: int) -> Tensor:
    flat, valid = _resolve(index.reshape(-1), data.shape[axis], declared)
    y = _take(data, axis, flat)
    y = y.masked_fill(~along(valid, axis, y.ndim), 0)
    return y.reshape([*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]])


def _gather_element(data: Tensor, index: Tensor, axis: int, declared: int) -> Tensor:
    n = data.shape[axis]
    at, valid = _resolve(index, n, declared)
    if n == 0:
        return data.new_zeros(index.shape)
    return data.gather(axis, at.clamp(0, n - 1)).masked_fill(~valid, 0)


def _gather_nd(data: Tensor, index: Tensor, batch: int, declared: Sequence[int]) -> Tensor:
    depth = index.shape[-1]
    indexed, rest = data.shape[batch : batch + depth], data.shape[batch + depth :]
    outer = data.shape[:batch]
    require(index.shape[:batch] == outer, f"{batch} elementwise dimensions: {tuple(index.shape)}, {tuple(data.shape)}")
    linear = torch.zeros(index.shape[:-1], dtype=torch.int64, device=data.device)
    valid = torch.ones_like(linear, dtype=torch.bool)
    for i, n in enumerate(indexed):
        at, inside = _resolve(index[..., i], n, declared[batch + i])
        linear, valid = linear * n + at, valid & inside
    size = math.prod(indexed)
    row = torch.arange(math.prod(outer), device=data.device).reshape(*outer, *[1] * (linear.ndim - batch))
    linear = torch.where(valid, row * size + linear, 0).reshape(-1)
    y = _take(data.reshape(math.prod(outer) * size, math.prod(rest)), 0, linear)
    y = y.masked_fill(~valid.reshape(-1, 1), 0)
    return y.reshape(*index.shape[:-1], *rest)


def gather(layer: Any, stored: Stored) -> Run:
    mode, axis, batch = layer.mode.name, layer.axis, layer.num_elementwise_dims
    declared = tuple(layer.get_input(0).shape)

    def run(data: Tensor, index: Tensor) -> Tensor:
        if mode == "ND":
            return _gather_nd(data, index, batch, declared)
        if mode == "ELEMENT":
            require(batch == 0, f"{batch} elementwise dimensions with {mode=}")
            return _gather_element(data, index, axis, declared[axis])
        if batch == 0:
            return _gather_axis(data, index, axis, declared[axis])
        require(mode == "DEFAULT" and batch == 1 and axis > 0, f"{mode=}, {axis=}, {batch} elementwise dimensions")
        rows = max(data.shape[0], index.shape[0]) if 0 not in (data.shape[0], index.shape[0]) else 0
        require(rows > 0, "gathering from an empty batch is not supported")
        data, index = data.expand(rows, *data.shape[1:]), index.expand(rows, *index.shape[1:])
        return torch.stack([_gather_axis(d, i, axis - 1, declared[axis]) for d, i in zip(data, index, strict=True)])

    return run


def _in_range(index: Tensor, n: int) -> Tensor:
    index = index.long()
    require(bool(((index >= 0) & (index < n)).all()), f"an index outside of 0 to {n - 1}")
    return index


def _written_once(updates: Tensor, found: Tensor) -> None:
    kept = (updates == found) | ((updates != updates) & (found != found))
    require(bool(kept.all()), "several updates for one element: the result is undefined")


def _scatter_element(data: Tensor, index: Tensor, updates: Tensor, axis: int) -> Tensor:
    index = _in_range(index, data.shape[axis])
    y = data.scatter(axis, index, updates)
    _written_once(updates, y.gather(axis, index))
    return y


def _scatter_nd(data: Tensor, index: Tensor, updates: Tensor, axis: int) -> Tensor:
    depth = index.shape[-1]
    linear = torch.zeros(index.shape[:-1], dtype=torch.int64, device=data.device)
    for i, n in enumerate(data.shape[:depth]):
        linear = linear * n + _in_range(index[..., i], n)
    linear = linear.reshape(-1)
    rest = math.prod(data.shape[depth:])
    rows, new = data.reshape(math.prod(data.shape[:depth]), rest).clone(), updates.reshape(linear.numel(), rest)
    rows[linear] = new
    _written_once(new, rows[linear])
    return rows.reshape(data.shape)


def scatter(layer: Any, stored: Stored) -> Run:
    write, axis = pick({"ELEMENT": _scatter_element, "ND": _scatter_nd}, layer.mode), layer.axis

    def run(data: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        same_type(data, updates)
        return write(data, index, updates, axis)

    return run


def one_hot(layer: Any, stored: Stored) -> Run:
    axis = layer.axis

    def run(index: Tensor, on_off: Tensor, depth: Tensor) -> Tensor:
        n = int(depth)
        index = _in_range(index, n).unsqueeze(axis)
        classes = along(torch.arange(n, device=index.device), axis % index.ndim, index.ndim)
        return torch.where(index == classes, on_off[1], on_off[0])

    return run


def non_zero(layer: Any, stored: Stored) -> Run:
    to = torch_type(layer.get_output(0).dtype)
    return lambda x: x.nonzero().t().to(to)


def reverse_sequence(layer: Any, stored: Stored) -> Run:
    batch, sequence = layer.batch_axis, layer.sequence_axis

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        n = x.shape[sequence]
        at = torch.arange(n, device=x.device).expand(x.shape[batch], n)
        ends = lengths.long()[:, None]
        at = torch.where(at < ends, ends - 1 - at, at)
        moved = x.movedim((batch, sequence), (0, 1))
        rows = [row.index_select(0, order) for row, order in zip(moved, at, strict=True)]
        return torch.stack(rows).movedim((0, 1), (batch, sequence)) if rows else x

    return run


def fill(layer: Any, stored: Stored) -> Run:
    require(layer.operation.name == "LINSPACE", f"{layer.operation} has no reference result")
    static, to = dims(layer.shape), torch_type(layer.to_type)
    number = float if to.is_floating_point else int
    alpha, beta = (None if value is None else number(value) for value in (layer.alpha, layer.beta))

    def run(shape: Tensor | None = None, start: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        size = static if shape is None else ints(shape)
        assert size is not None
        require((start is None) == (delta is None), "alpha and beta must both be inputs, or neither")
        if start is not None and delta is not None:
            require(same_type(start, delta) == to, f"alpha and beta of {start.dtype} for an output of {to}")
            first, steps = start.reshape(()).tolist(), delta.reshape(-1).tolist()
        else:
            first, steps = alpha, [beta] * len(size)
            require(len(size) < 2, "a static beta is for vectors")
        require(len(steps) == len(size), f"{len(steps)} steps for {len(size)} dimensions")
        exact = torch.float64 if to.is_floating_point else torch.int64
        y = torch.full(tuple(size), first, dtype=exact)
        for d, step in enumerate(steps):
            y = y + along(torch.arange(size[d], dtype=exact) * step, d, len(size))
        return y.to(to)

    return run


# Sampling

COORDINATES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ALIGN_CORNERS": lambda x, n, m: x * ((n - 1) / (m - 1) if m > 1 else 0),
    "ASYMMETRIC": lambda x, n, m: x * (n / m),
    "HALF_PIXEL": lambda x, n, m: (x + 0.5) * (n / m) - 0.5,
}
ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "HALF_UP": lambda x: (x + 0.5).floor(),
    "HALF_DOWN": lambda x: (x - 0.5).ceil(),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}


def _cubic(distance: Tensor, a: float) -> Tensor:
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize(layer: Any, stored: Stored) -> Run:
    scales = [float(s) for s in layer.scales or ()]
    static = None if scales else dims(layer.shape)
    mode, upper = layer.resize_mode.name, layer.selector_for_single_pixel.name == "UPPER"
    coordinates, rounding = pick(COORDINATES, layer.coordinate_transformation), pick(ROUNDING, layer.nearest_rounding)
    coefficient, exclude = layer.cubic_coeff, layer.exclude_outside
    require(mode in ("NEAREST", "LINEAR", "CUBIC"), f"{mode=} is not supported")

    def taps(at: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """Where to read, and with which weight."""
        if mode == "NEAREST":
            return [(rounding(at), torch.ones_like(at))]
        if mode == "LINEAR":
            at = at.clamp(0, n - 1)
            return [(at.floor(), 1 - at.frac()), (at.floor() + 1, at.frac())]
        places = [at.floor() + i for i in (-1, 0, 1, 2)]
        weights = [_cubic(at - place, coefficient) for place in places]
        if exclude:
            weights = [w * ((p >= 0) & (p < n)) for p, w in zip(places, weights, strict=True)]
            total = torch.stack(weights).sum(0)
            weights = [w / total for w in weights]
        return list(zip(places, weights, strict=True))

    def run(x: Tensor, size: Tensor | None = None) -> Tensor:
        if size is not None:
            target: Sequence[int] = ints(size)
        elif scales:
            target = np.floor(np.array(x.shape, np.float32) * np.array(scales, np.float32)).astype(int).tolist()
        else:
            assert static is not None
            target = static
        resized = [d for d, (n, m) in enumerate(zip(x.shape, target, strict=True)) if n != m]
        innermost = 2 if mode == "CUBIC" else 3
        require(all(d >= x.ndim - innermost for d in resized), f"{mode} resizes the last {innermost} dimensions only")
        single = [target[d] == 1 for d in resized]
        require(not upper or all(single) or not any(single), "selector UPPER where one of the sizes is 1")
        if not resized:
            return x
        y = x if mode == "NEAREST" else floats(x)
        for d in resized:
            n, m = x.shape[d], target[d]
            require(n > 0, "resizing an empty dimension")
            at = coordinates(torch.arange(m, dtype=torch.float32, device=x.device), n, m)
            at = torch.zeros_like(at) if upper and all(single) else at
            reads = [(y.index_select(d, place.long().clamp(0, n - 1)), weight) for place, weight in taps(at, n)]
            y = reads[0][0] if mode == "NEAREST" else torch.stack([r * along(w, d, x.ndim) for r, w in reads]).sum(0)
        return y.to(x.dtype)

    return run


def grid_sample(layer: Any, stored: Stored) -> Run:
    mode = pick({"NEAREST": "nearest", "LINEAR": "bilinear", "CUBIC": "bicubic"}, layer.interpolation_mode)
    outside = pick({"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}, layer.sample_mode)
    align = layer.align_corners

    def run(x: Tensor, grid: Tensor) -> Tensor:
        dtype = same_type(x, grid)
        require(mode != "bicubic" or x.ndim == 4, "cubic grid sampling of volumes is not supported")
        return F.grid_sample(floats(x), floats(grid), mode, outside, align).to(dtype)

    return run


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of one box with many, as (low, high) corners."""
    low, high = torch.maximum(a[:2], b[:, :2]), torch.minimum(a[2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    union = (a[2:] - a[:2]).prod() + (b[:, 2:] - b[:, :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def nms(layer: Any, stored: Stored) -> Run:
    centred, limit = layer.bounding_box_format.name == "CENTER_SIZES", layer.topk_box_limit
    index_type, count_type = (torch_type(layer.get_output(i).dtype) for i in range(2))

    def corners(boxes: Tensor) -> Tensor:
        a, b = floats(boxes).chunk(2, -1)
        a, b = (a - b / 2, a + b / 2) if centred else (a, b)
        return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)

    def run(
        boxes: Tensor, scores: Tensor, most: Tensor, overlap: Tensor | None = None, threshold: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        same_type(boxes, scores)
        highest = 0.0 if overlap is None else float(overlap)
        lowest = 0.0 if threshold is None else float(threshold)
        boxes = corners(boxes if boxes.ndim == 4 else boxes.unsqueeze(2).expand(-1, -1, scores.shape[2], -1))
        chosen: list[tuple[int, int, int]] = []
        for image in range(scores.shape[0]):
            flat = floats(scores[image]).reshape(-1)
            kept: dict[int, list[Tensor]] = {}
            for at in flat.argsort(descending=True, stable=True)[:limit].tolist():
                box, kind = divmod(at, scores.shape[2])
                mine = kept.setdefault(kind, [])
                if flat[at] <= lowest or len(mine) >= int(most):
                    continue
                candidate = boxes[image, box, kind]
                if not mine or bool((_overlap(candidate, torch.stack(mine)) <= highest).all()):
                    mine.append(candidate)
                    chosen.append((image, kind, box))
        found = torch.tensor(chosen, dtype=index_type).reshape(-1, 3)
        return found, torch.tensor(len(chosen), dtype=count_type)

    return run


LAYERS: dict[str, tuple[str, Callable[[Any, Stored], Run]]] = {
    "ACTIVATION": ("IActivationLayer", activation),
    "ATTENTION_INPUT": ("IAttentionInputLayer", attention),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", identity),
    "CAST": ("ICastLayer", cast),
    "CONCATENATION": ("IConcatenationLayer", concatenation),
    "CONDITIONAL_INPUT": ("IIfConditionalInputLayer", identity),
    "CONSTANT": ("IConstantLayer", constant),
    "CONVOLUTION": ("IConvolutionLayer", convolution),
    "CUMULATIVE": ("ICumulativeLayer", cumulative),
    "DECONVOLUTION": ("IDeconvolutionLayer", deconvolution),
    "DEQUANTIZE": ("IDequantizeLayer", dequantize),
    "EINSUM": ("IEinsumLayer", einsum),
    "ELEMENTWISE": ("IElementWiseLayer", elementwise),
    "FILL": ("IFillLayer", fill),
    "GATHER": ("IGatherLayer", gather),
    "GRID_SAMPLE": ("IGridSampleLayer", grid_sample),
    "IDENTITY": ("IIdentityLayer", identity),
    "LRN": ("ILRNLayer", lrn),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", matrix_multiply),
    "NMS": ("INMSLayer", nms),
    "NON_ZERO": ("INonZeroLayer", non_zero),
    "NORMALIZATION": ("INormalizationLayer", normalization),
    "ONE_HOT": ("IOneHotLayer", one_hot),
    "PADDING": ("IPaddingLayer", padding),
    "PARAMETRIC_RELU": ("IParametricReLULayer", parametric_relu),
    "POOLING": ("IPoolingLayer", pooling),
    "QUANTIZE": ("IQuantizeLayer", quantize),
    "RAGGED_SOFTMAX": ("IRaggedSoftMaxLayer", ragged_softmax),
    "REDUCE": ("IReduceLayer", reduce),
    "RESIZE": ("IResizeLayer", resize),
    "REVERSE_SEQUENCE": ("IReverseSequenceLayer", reverse_sequence),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", rotary_embedding),
    "SCALE": ("IScaleLayer", scale),
    "SCATTER": ("IScatterLayer", scatter),
    "SELECT": ("ISelectLayer", select),
    "SHAPE": ("IShapeLayer", shape_of),
    "SHUFFLE": ("IShuffleLayer", shuffle),
    "SLICE": ("ISliceLayer", slice_),
    "SOFTMAX": ("ISoftMaxLayer", softmax),
    "SQUEEZE": ("ISqueezeLayer", squeeze),
    "TOPK": ("ITopKLayer", topk),
    "UNARY": ("IUnaryLayer", unary),
    "UNSQUEEZE": ("IUnsqueezeLayer", unsqueeze),
}
