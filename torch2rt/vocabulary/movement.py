"""The same elements elsewhere: permuted, lifted, expanded, sliced, joined and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend.quirks import folds_repeated_bools_wrong
from torch2rt.backend.tensorrt import can_slice_axes, trt
from torch2rt.sizes import is_symbolic
from torch2rt.vocabulary import layers
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import constant
from torch2rt.vocabulary.plain import Value, dims, dtype_of, same_size, tie, wrap_dim
from torch2rt.vocabulary.shapes import shape_tensor
from torch2rt.vocabulary.tensors import materialize, moves, reshape


@moves
def permute(ctx: Context, x: Value, order: Sequence[int]) -> Any:
    """The dimensions in another order."""
    x = materialize(ctx, x)
    sizes = dims(ctx, x)
    order = [wrap_dim(d, len(sizes)) for d in order]
    if order == list(range(len(sizes))):
        return x
    layer = ctx.network.add_shuffle(x)
    layer.first_transpose = trt.Permutation(order)
    return ctx.track(layer.get_output(0), tuple(sizes[d] for d in order))


def lift(ctx: Context, x: Value, n: int) -> Any:
    """`x` as (batch, channels, *sizes): a unit batch where it has none, and a unit size before the one of `n` = 1."""
    x = materialize(ctx, x)
    return reshape(ctx, x, _lifted(dims(ctx, x), n))


def unlift(ctx: Context, y: Value, n: int, sizes: Sequence[Any] | None = None) -> Any:
    """What a layer makes of a lifted input, in the recorded sizes or in those given."""
    sizes = ctx.out.shape if sizes is None else sizes
    return reshape(ctx, ctx.track(y, _lifted(sizes, n)), sizes)


def _lifted(sizes: Sequence[Any], n: int) -> tuple[Any, ...]:
    return (*(sizes[: -n - 1] or [1]), sizes[-n - 1], *[1] * (2 - n), *sizes[-n:])


def expand(ctx: Context, x: Value, sizes: Sequence[Any]) -> Any:
    """Unit axes repeated to these sizes, leading axes added."""
    if folds_repeated_bools_wrong() and not isinstance(x, trt.ITensor) and not any(map(is_symbolic, (x, *sizes))):
        return constant(ctx, torch.as_tensor(x).expand(tuple(sizes)))
    x = materialize(ctx, x, None, len(sizes))
    old = dims(ctx, x)
    if all(map(same_size, old, sizes)):
        return x
    for a, b in zip(old, sizes, strict=True):
        if not same_size(a, 1) and not same_size(a, b):
            tie(ctx, a, b)
    return slice_nd(ctx, x, [0] * len(sizes), sizes, [0 if same_size(a, 1) else 1 for a in old])


@moves
def slice_nd(
    ctx: Context,
    x: Value,
    start: Sequence[Any],
    size: Sequence[Any],
    stride: Sequence[Any],
    mode: Any = None,
    fill: Value | None = None,
) -> Any:
    """One slice layer: `size` elements from `start` in steps of `stride`, per dimension, ints or symbolic.

    A stride may be negative, or zero to repeat one element. With `mode` (a `trt.SampleMode`) the slice may reach over
    the edges; `fill` is what FILL puts there.
    """
    x = materialize(ctx, x)
    old = dims(ctx, x)
    changed = [
        i
        for i in range(len(old))
        if not (same_size(start[i], 0) and same_size(size[i], old[i]) and same_size(stride[i], 1))
    ]
    if not changed:
        return x
    used = (
        changed
        if can_slice_axes() and len(changed) < len(old) and any(map(is_symbolic, old))
        else list(range(len(old)))
    )
    lists = [[values[i] for i in used] for values in (start, size, stride)]
    static = [[0 if is_symbolic(v) else v for v in values] for values in lists]
    layer = ctx.network.add_slice(x, *static)
    if len(used) < len(old):
        layer.axes = used
    for position, values in enumerate(lists, 1):
        if any(map(is_symbolic, values)):
            layer.set_input(position, shape_tensor(ctx, values))
    if mode is not None:
        layer.mode = mode
    if fill is not None:
        layer.set_input(4, materialize(ctx, fill, dtype_of(x)))
    return ctx.track(layer.get_output(0), tuple(size))


def narrow(ctx: Context, x: Value, dim: int, start: Any, length: Any, step: Any = 1) -> Any:
    """`length` elements from `start` along one dimension."""
    x = materialize(ctx, x)
    sizes = dims(ctx, x)
    axis = wrap_dim(dim, len(sizes))
    pick = lambda value, others: [value if d == axis else o for d, o in enumerate(others)]  # noqa: E731
    return slice_nd(ctx, x, pick(start, [0] * len(sizes)), pick(length, sizes), pick(step, [1] * len(sizes)))


def iota(ctx: Context, size: Any) -> Any:
    """The integers from 0 up to a size, in order: a torch tensor where the size is static, else one fill layer."""
    if not is_symbolic(size):
        return torch.arange(size)
    layer = ctx.network.add_fill((0,), trt.FillOperation.LINSPACE, trt.DataType.INT64)
    layer.set_input(0, shape_tensor(ctx, [size]))
    layer.set_input(1, constant(ctx, 0))
    layer.set_input(2, constant(ctx, [1]))
    return ctx.track(layer.get_output(0), (size,))


def concat(ctx: Context, xs: Sequence[Value], dim: int) -> Any:
    """Values of one dtype and rank, one after the other."""
    xs = [materialize(ctx, x) for x in xs]
    if len(xs) == 1:
        return xs[0]
    return layers.concat(ctx, xs, wrap_dim(dim, len(dims(ctx, xs[0]))))


@moves
def gather(ctx: Context, x: Value, index: Value, dim: int, each: bool = False) -> Any:
    """`x` at the positions in `index` (not negative) along one dimension, which the index's dimensions replace.

    With `each` the index has a position for each element of the result, as `torch.gather` wants it.
    """
    x, index = materialize(ctx, x), materialize(ctx, index)
    dim = wrap_dim(dim, len(dims(ctx, x)))
    if each:
        layer = ctx.network.add_gather_v2(x, index, trt.GatherMode.ELEMENT)
        layer.axis = dim
        return ctx.track(layer.get_output(0), dims(ctx, index))
    return layers.gather(ctx, x, index, dim)
