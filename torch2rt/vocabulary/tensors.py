"""Any value as a TensorRT tensor: casts, ranks, and the dtypes and ranks that operands need to meet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from torch2rt.backend.tensorrt import trt
from torch2rt.size_choices import counterexample
from torch2rt.sizes import expression, is_symbolic
from torch2rt.vocabulary import layers
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import EW, constant, mark_bytes
from torch2rt.vocabulary.plain import Value, dims, dtype_of, same_size
from torch2rt.vocabulary.shapes import shape_tensor


def materialize(ctx: Context, x: Value, dtype: torch.dtype | None = None, ndim: int | None = None) -> Any:
    """Any value as a TensorRT tensor of this dtype and at least this rank."""
    if is_symbolic(x):
        return materialize(ctx, reshape(ctx, shape_tensor(ctx, [x]), ()), dtype, ndim)
    if not isinstance(x, trt.ITensor):
        return constant(ctx, x, dtype, ndim)
    x = cast(ctx, x, dtype) if dtype is not None else _as_bytes(ctx, x) if dtype_of(x) is torch.uint8 else x
    sizes = dims(ctx, x)
    return x if ndim is None or len(sizes) >= ndim else reshape(ctx, x, (1,) * (ndim - len(sizes)) + sizes)


def cast(ctx: Context, x: Value, dtype: torch.dtype) -> Any:
    """A value in another dtype; free when it has it already.

    TensorRT takes uint8 only at the network's ends, so between them int32 stands for it, and `ctx.bytes` knows which.
    """
    if isinstance(x, torch.Tensor):
        return ctx.as_dtype(x, dtype)
    if not isinstance(x, trt.ITensor):
        return materialize(ctx, x, dtype)
    if dtype is torch.uint8:
        return _as_bytes(ctx, x)
    if dtype is torch.int32 and id(x) in ctx.bytes:  # not bytes any more, which an id of its own says
        return ctx.track(ctx.network.add_identity(x).get_output(0), dims(ctx, x))
    return layers.cast(ctx, x, dtype)


def _as_bytes(ctx: Context, x: Any) -> Any:
    if id(x) in ctx.bytes:
        return x
    if dtype_of(x) is torch.uint8:  # a network input
        if ("bytes", id(x)) not in ctx.memo:
            ctx.memo["bytes", id(x)] = mark_bytes(ctx, cast(ctx, x, torch.int32))
        return ctx.memo["bytes", id(x)]
    wraps = not dtype_of(x).is_floating_point and dtype_of(x) is not torch.bool
    x = cast(ctx, x, torch.int32)
    if wraps:
        count = constant(ctx, 256, torch.int32, len(dims(ctx, x)))
        whole = layers.elementwise(ctx, EW.PROD, layers.elementwise(ctx, EW.FLOOR_DIV, x, count), count)
        x = layers.elementwise(ctx, EW.SUB, x, whole)
    return mark_bytes(ctx, x)


def moves(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that makes no new elements: of bytes it makes bytes."""

    @functools.wraps(verb)
    def wrapped(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
        x = materialize(ctx, x)
        result = verb(ctx, x, *args, **kwargs)
        return mark_bytes(ctx, result) if id(x) in ctx.bytes else result

    return wrapped


@moves
def reshape(ctx: Context, x: Value, sizes: Sequence[Any]) -> Any:
    """The same elements in these sizes, with as little run-time arithmetic as the sizes allow."""
    x = materialize(ctx, x)
    old, sizes = dims(ctx, x), tuple(sizes)
    if len(old) == len(sizes) and all(map(same_size, old, sizes)):
        return x
    layer = ctx.network.add_shuffle(x)
    unknown = [
        i for i, size in enumerate(sizes) if is_symbolic(size) and not (i < len(old) and same_size(size, old[i]))
    ]
    zero = any(not is_symbolic(s) and s == 0 for s in (*sizes, *old))
    if (
        (zero and any(map(is_symbolic, sizes)))
        or len(unknown) > 1
        or (unknown and any(_may_be_zero(ctx, s) for s in sizes))
    ):
        layer.set_input(1, shape_tensor(ctx, sizes))
        layer.zero_is_placeholder = False
    else:
        layer.reshape_dims = tuple(-1 if i in unknown else 0 if is_symbolic(s) else s for i, s in enumerate(sizes))
        layer.zero_is_placeholder = not zero
    return ctx.track(layer.get_output(0), sizes)


def _may_be_zero(ctx: Context, size: Any) -> bool:
    return is_symbolic(size) and counterexample(expression(size) > 0, ctx.symbols) is not None


# Promotion -----------------------------------------------------------------------------------------------------------


def result_type(ctx: Context, *xs: Value, to_float: bool = False) -> torch.dtype:
    """The dtype in which torch computes an element-wise call on these values."""
    kinds = ELEMENTWISE_TYPE_PROMOTION_KIND
    stand_ins = [_stand_in(ctx, x) for x in xs]
    return elementwise_dtypes(*stand_ins, type_promotion_kind=kinds.INT_TO_FLOAT if to_float else kinds.DEFAULT)[1]


def _stand_in(ctx: Context, x: Value) -> Any:
    if isinstance(x, (trt.ITensor, torch.Tensor)):
        dtype = torch.uint8 if id(x) in ctx.bytes else dtype_of(x)
        return torch.empty((1,) * len(dims(ctx, x)), dtype=dtype, device="meta")
    if is_symbolic(x):
        return {torch.SymInt: 1, torch.SymFloat: 1.0, torch.SymBool: True}[type(x)]
    return x


def operands(ctx: Context, *xs: Value, dtype: torch.dtype | None = None, to_float: bool = False) -> list[Any]:
    """Values as tensors of one dtype (torch's promoted one unless given) and one rank, ready to broadcast."""
    dtype = dtype or result_type(ctx, *xs, to_float=to_float)
    ndim = max(len(dims(ctx, x)) for x in xs)
    return [materialize(ctx, x, dtype, ndim) for x in xs]


def broadcast(ctx: Context, *xs: Value) -> list[Any]:
    """Values as tensors of one rank, each in its own dtype."""
    ndim = max(len(dims(ctx, x)) for x in xs)
    return [materialize(ctx, x, None, ndim) for x in xs]
