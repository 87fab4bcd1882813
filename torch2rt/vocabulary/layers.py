"""One layer each, on TensorRT tensors of one rank and dtype as they are: what the other verbs are made of.

Nothing is promoted, broadcast or made a tensor here. A result knows its sizes, and whether it stands for bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend.tensorrt import DTYPES, QUANTIZED, trt
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.plain import broadcast_sizes, check, dims, dtype_of, refuse

EW = trt.ElementWiseOperation


def constant(ctx: Context, value: Any, dtype: torch.dtype | None = None, ndim: int | None = None) -> Any:
    """A torch tensor, number or nested list as a constant, with leading unit axes up to `ndim` if given."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    key = ("constant", id(value) if isinstance(value, torch.Tensor) else repr(value), dtype or tensor.dtype, ndim)
    if key in ctx.memo:
        return ctx.memo[key][0]
    dtype = dtype or tensor.dtype
    if dtype is torch.float64:
        refuse("a float64 constant has no TensorRT type; make it float32")
    narrow = dtype in (torch.int8, torch.uint8)  # such constants may only feed a Dequantize
    shaped = ctx.as_dtype(tensor.detach(), torch.int32 if narrow else dtype)
    if ndim is not None and ndim > shaped.dim():
        shaped = shaped.reshape((1,) * (ndim - shaped.dim()) + tuple(shaped.shape))
    shape = tuple(shaped.shape)
    if shaped.numel() == 0:
        ctx.weights(shaped)
        result = ctx.network.add_constant(shape, trt.Weights(DTYPES[shaped.dtype])).get_output(0)
    else:
        result = ctx.network.add_constant(shape, ctx.weights(shaped)).get_output(0)
    result = ctx.track(result, shape)
    if dtype is torch.int8:
        result = cast(ctx, result, dtype)
    elif dtype is torch.uint8:
        mark_bytes(ctx, result)
    ctx.memo[key] = (result, value)  # the value stays alive, so its id stays its own
    return result


def stored(ctx: Context, value: torch.Tensor) -> Any:
    """Quantised numbers as a constant, as `dequantize` has them, in front of a layer that brings them back.

    Each such layer has a constant of its own, of the same memory (`quirks.crashes_on_shared_weights`).
    """
    shape = tuple(value.shape)
    if value.dtype is torch.uint8:
        shape = (*shape[:-1], 2 * shape[-1])
    result = ctx.network.add_constant(shape, ctx.weights(value, stored_as=QUANTIZED[value.dtype])).get_output(0)
    return ctx.track(result, shape)


def dequantized(ctx: Context, x: Any, scale: torch.Tensor, dtype: torch.dtype, axis: int = 0) -> Any:
    """Quantised numbers, times a scale for each index of an axis, for each block, or one for all.

    The scale is float32 for every type, as in half precision the sum of a product would be scaled only after it has
    overflowed; TensorRT wants those of blocks in the result's type.
    """
    layer = ctx.network.add_dequantize(x, constant(ctx, scale), DTYPES[dtype])
    if scale.dim() == 1:
        layer.axis = axis
    return ctx.track(layer.get_output(0), dims(ctx, x))


def quantized_and_back(
    ctx: Context, x: Any, scale: torch.Tensor, dtype: torch.dtype, axis: int = 0, stored_as: torch.dtype = torch.int8
) -> Any:
    """A tensor, rounded to int8 or fp8 multiples of a scale, one for each index of an axis or one for all."""
    layer = ctx.network.add_quantize(x, constant(ctx, scale), QUANTIZED[stored_as])
    if scale.dim():
        layer.axis = axis
    return dequantized(ctx, ctx.track(layer.get_output(0), dims(ctx, x)), scale, dtype, axis)


def mark_bytes(ctx: Context, x: Any) -> Any:
    """Remember that an int32 tensor stands for a uint8 one; returns the tensor."""
    ctx.bytes.add(id(x))
    return x


def cast(ctx: Context, x: Any, dtype: torch.dtype) -> Any:
    """A tensor in another dtype; free when it has it already."""
    if dtype_of(x) is dtype:
        return x
    check(dtype in DTYPES, f"TensorRT has no {dtype}")
    return ctx.track(ctx.network.add_cast(x, DTYPES[dtype]).get_output(0), dims(ctx, x))


def unary(ctx: Context, op: Any, x: Any) -> Any:
    return ctx.track(ctx.network.add_unary(x, op).get_output(0), dims(ctx, x))


_ON_BOOL = {EW.SUM: EW.OR, EW.PROD: EW.AND, EW.MAX: EW.OR, EW.MIN: EW.AND}


def elementwise(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    """Sums and products of bools are their OR and AND; TensorRT compares no bools, so they are compared as integers."""
    if dtype_of(a) is torch.bool:
        op = _ON_BOOL.get(op, op)
        if op in (EW.GREATER, EW.LESS):
            a, b = cast(ctx, a, torch.int32), cast(ctx, b, torch.int32)
    layer = ctx.network.add_elementwise(a, b, op)
    return ctx.track(layer.get_output(0), broadcast_sizes(dims(ctx, a), dims(ctx, b)))


def select(ctx: Context, condition: Any, a: Any, b: Any) -> Any:
    sizes = broadcast_sizes(dims(ctx, condition), dims(ctx, a), dims(ctx, b))
    result = ctx.track(ctx.network.add_select(condition, a, b).get_output(0), sizes)
    return mark_bytes(ctx, result) if id(a) in ctx.bytes and id(b) in ctx.bytes else result


def concat(ctx: Context, xs: Sequence[Any], dim: int) -> Any:
    """Two tensors or more, one after the other; `dim` counts from the front."""
    sizes = dims(ctx, xs[0])
    layer = ctx.network.add_concatenation(xs)
    layer.axis = dim
    total = sum((dims(ctx, x)[dim] for x in xs[1:]), sizes[dim])
    result = ctx.track(layer.get_output(0), (*sizes[:dim], total, *sizes[dim + 1 :]))
    return mark_bytes(ctx, result) if all(id(x) in ctx.bytes for x in xs) else result


def gather(ctx: Context, x: Any, index: Any, dim: int) -> Any:
    """The elements at the positions in `index` along one dimension, which the index's dimensions replace."""
    sizes = dims(ctx, x)
    layer = ctx.network.add_gather(x, index, dim)
    return ctx.track(layer.get_output(0), (*sizes[:dim], *dims(ctx, index), *sizes[dim + 1 :]))
