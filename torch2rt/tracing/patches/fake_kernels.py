"""Fake kernels of element-wise calls and of views, whose sizes are symbols.

torch's own are written in Python for the general case, and take milliseconds for each call, as they reason about sizes
and strides: `clamp` as long as 30. What they find is plain where one tensor of a call has all sizes of the result, and
the others have the same sizes and strides, or are contiguous and broadcast: the result is like that tensor. A view of
a contiguous tensor is contiguous, if its sizes have the same product. Whatever else comes is left to torch.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

aten = torch.ops.aten

# Of floating-point numbers only, as torch computes integers in another type.
FLOATS = """
    sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt
    reciprocal erf erfc erfinv lgamma digamma sigmoid silu mish gelu softplus elu hardswish hardsigmoid leaky_relu
    hardtanh div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode pow.Tensor_Scalar pow.Tensor_Tensor atan2 lerp.Scalar
    lerp.Tensor addcmul addcdiv hypot frac
"""
# Of numbers of any type but bool, in that type.
NUMBERS = """
    neg abs sign ceil floor round trunc relu clamp clamp_min clamp_max clamp.Tensor add.Tensor add.Scalar
    sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar maximum minimum remainder.Scalar remainder.Tensor
    fmod.Scalar fmod.Tensor
"""
# Of integers and bool.
BITS = "bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_not"
# Of any type.
ALL = "where.self clone"
# Whose results are bool.
COMPARISONS = """
    eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar
    ge.Tensor isnan isinf logical_not logical_and logical_or logical_xor
"""


def _overloads(names: str) -> frozenset[Any]:
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(aten, packet), overload or "default"))
    return frozenset(found)


_FLOATS, _NUMBERS, _BITS, _ALL, _COMPARISONS = map(_overloads, (FLOATS, NUMBERS, BITS, ALL, COMPARISONS))
_ELEMENTWISE = _FLOATS | _NUMBERS | _BITS | _ALL | _COMPARISONS
_CLAMPS = _overloads("clamp clamp.Tensor")


def elementwise(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call element by element; `NotImplemented` where that is not plain."""
    tensors, has_float = [], False
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (float, torch.SymFloat)):
            has_float = True
        elif not (value is None or isinstance(value, (int, str, torch.SymInt))):
            return NotImplemented
    result = max(tensors, key=_sizes)
    if not _is_taken(result, mode) or not all(x is result or _is_plain_beside(x, result, mode) for x in tensors):
        return NotImplemented
    values = tensors[1:] if func is aten.where.self else tensors
    dtypes = {x.dtype for x in values if x.dim()}
    if len(dtypes) != 1 or any(x.dtype.is_complex for x in values):
        return NotImplemented
    (dtype,) = dtypes
    has_float = has_float or any(x.dtype.is_floating_point for x in values)
    is_plain = func not in _BITS if dtype.is_floating_point else not has_float and func not in _FLOATS
    if dtype is torch.bool:
        is_plain = is_plain and func not in _NUMBERS and all(x.dtype is dtype for x in values)
    if not is_plain or func in _CLAMPS and args[1:] == (None,) * len(args[1:]) and not kwargs:
        return NotImplemented
    return _like(mode, result, torch.bool if func in _COMPARISONS else dtype)


def to_copy(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy of another type."""
    is_plain = list(kwargs) == ["dtype"] and _is_taken(args[0], mode)
    return _like(mode, args[0], kwargs["dtype"]) if is_plain else NotImplemented


def view(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of a contiguous tensor with other sizes."""
    x, sizes = args[0], list(args[1])
    if kwargs or not _is_taken(x, mode) or not _dense(x):
        return NotImplemented
    known = math.prod(_expression(size) for size in sizes if not _is_open(size))
    whole = math.prod(map(_expression, x.shape))
    if sum(map(_is_open, sizes)) == 1 and known != 0:
        rest = x.numel() // math.prod(size for size in sizes if not _is_open(size))
        sizes = [rest if _is_open(size) else size for size in sizes]
        known = known * _expression(rest)
    if known != whole:
        return NotImplemented
    strides = [*itertools.accumulate(reversed(sizes[1:]), operator.mul, initial=1)][::-1] if sizes else []
    with in_kernel_invocation_manager(mode):
        made = torch.as_strided(x, sizes, strides, x.storage_offset())
    return FakeTensor(mode, made, x.device)


def _is_open(size: Any) -> bool:
    """Whether a size is the one that is to be found: -1."""
    return isinstance(size, int) and size == -1


def unknown(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sizes that depend on values, which torch's own kernel gets wrong: it makes a packed sequence one batch long."""
    raise DynamicOutputShapeException(func)


KERNELS = {
    aten._pack_padded_sequence.default: unknown,
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    aten._to_copy.default: to_copy,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), view),
}


def _sizes(x: torch.Tensor) -> tuple[int, int]:
    """What is the largest for the tensor that has all sizes of a result, if any has."""
    return x.dim(), -sum(_expression(size) == 1 for size in x.shape)


def _is_taken(x: Any, mode: FakeTensorMode) -> bool:
    """Whether a result may be like this tensor: one with symbols among its sizes."""
    return _is_strided(x, mode) and any(isinstance(size, torch.SymInt) for size in x.shape)


def _is_strided(x: Any, mode: FakeTensorMode) -> bool:
    return isinstance(x, FakeTensor) and x.fake_mode is mode and x.layout is torch.strided


def _is_plain_beside(x: torch.Tensor, other: torch.Tensor, mode: FakeTensorMode) -> bool:
    """Whether a result of both is like the other tensor, as far as can be said without asking about a size."""
    if x.dim() == 0:
        return x.device == other.device
    if not _is_strided(x, mode) or x.device != other.device:
        return False
    sizes, others = tuple(map(_expression, x.shape)), tuple(map(_expression, other.shape))
    if sizes == others and tuple(map(_expression, x.stride())) == tuple(map(_expression, other.stride())):
        return True
    if 1 in others or not (_dense(x) and _dense(other)):
        return False
    return all(size in (1, whole) for size, whole in zip(reversed(sizes), reversed(others), strict=False))


def _like(mode: FakeTensorMode, x: FakeTensor, dtype: torch.dtype) -> Any:
    """A new tensor of another type, whose memory lies as a tensor's; `NotImplemented` where that has gaps."""
    dense = _dense(x)
    if dense is None:
        return NotImplemented
    with in_kernel_invocation_manager(mode):
        if dense:  # of which torch knows without a question that it has no gaps
            made = torch.empty(x.shape, dtype=dtype, device="meta")
        else:
            made = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, made, x.device)


def _dense(x: torch.Tensor) -> bool | None:
    """Whether a tensor is contiguous, or lies so with other dimensions first; `None` if it has gaps, or may have."""
    return _order(tuple(map(_expression, x.shape)), tuple(map(_expression, x.stride())))


@functools.lru_cache(1 << 12)
def _order(sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> bool | None:
    product, left, is_contiguous = 1, list(range(len(sizes))), True
    while left:
        place = next((i for i in reversed(left) if strides[i] == product), None)
        if place is None or sizes[place] == 1 and place != left[-1]:
            return None
        is_contiguous = is_contiguous and place == left[-1]
        left.remove(place)
        product = product * sizes[place]
    return True if is_contiguous else None if 1 in sizes else False


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
