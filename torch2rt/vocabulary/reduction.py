"""Sums and extremes over dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend.tensorrt import trt
from torch2rt.sizes import is_symbolic
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import EW
from torch2rt.vocabulary.movement import gather
from torch2rt.vocabulary.plain import Value, axes, dims, dtype_of
from torch2rt.vocabulary.pointwise import elementwise, select, unary, with_nans_of
from torch2rt.vocabulary.tensors import materialize, reshape


def reduce(
    ctx: Context, op: Any, x: Value, dim: int | Sequence[int] | None, keepdim: bool = False, keep_nan: bool = True
) -> Any:
    """Reduce over one, several or all dimensions; a 0-d value is its own reduction.

    A MAX or a MIN is NaN where an element is; `keep_nan=False` where it does not matter if it is.
    """
    x = materialize(ctx, x)
    best = _reduce(ctx, op, x, dim, keepdim)
    if op not in _EXTREMES or not keep_nan or ctx.nan != "keep" or not dtype_of(x).is_floating_point or best is x:
        return best
    nans = select(ctx, unary(ctx, trt.UnaryOperation.ISNAN, x), x, 0.0, dtype_of(x))
    return with_nans_of(ctx, _reduce(ctx, trt.ReduceOperation.SUM, nans, dim, keepdim), best)


_EXTREMES = (trt.ReduceOperation.MAX, trt.ReduceOperation.MIN)


def _reduce(ctx: Context, op: Any, x: Any, dim: int | Sequence[int] | None, keepdim: bool) -> Any:
    """One layer a dimension, or for neighbours of static size that `reshape` makes one.

    A layer over several, fused with what was reduced or normalised over some of them before, gives wrong sums in
    TensorRT for RTX 1.6 (`softmax(x, 1).sum((1, 2))`).
    """
    sizes = dims(ctx, x)
    mask = axes(dim, len(sizes))
    reduced = [axis for axis in range(len(sizes)) if mask >> axis & 1]
    while reduced:
        first = last = reduced.pop()
        while reduced and reduced[-1] == first - 1 and not any(map(is_symbolic, sizes[first - 1 : last + 1])):
            first = reduced.pop()
        before, after = dims(ctx, x)[:first], dims(ctx, x)[last + 1 :]
        if last > first:
            x = reshape(ctx, x, (*before, math.prod(sizes[first : last + 1]), *after))
        kept = (*before, *[1] * keepdim, *after)
        x = ctx.track(ctx.network.add_reduce(x, op, 1 << first, keepdim).get_output(0), kept)
        if last > first and keepdim:
            x = reshape(ctx, x, (*before, *[1] * (last - first + 1), *after))
    return x


def weighted_gather(ctx: Context, x: Value, places: Value, weights: Value, dim: int) -> Any:
    """Along one dimension, each element as a sum: of those at its row of `places`, times its row of `weights`."""
    x = gather(ctx, x, places, dim)
    shape = (*dims(ctx, weights), *[1] * (len(dims(ctx, x)) - dim - 2))
    weights = weights.reshape(shape) if isinstance(weights, torch.Tensor) else reshape(ctx, weights, shape)
    return reduce(ctx, trt.ReduceOperation.SUM, elementwise(ctx, EW.PROD, x, weights), dim + 1)
