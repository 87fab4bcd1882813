"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend.quirks import computes_squares_wrong, computes_vectors_wrong
from torch2rt.backend.tensorrt import trt, type_of_layer
from torch2rt.sizes import is_symbolic
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.makers import KIND, makers, turns
from torch2rt.vocabulary.movement import concat, narrow
from torch2rt.vocabulary.plain import Value, broadcast_sizes, dims, dtype_of, proven
from torch2rt.vocabulary.pointwise import unary
from torch2rt.vocabulary.tensors import broadcast

_FOLLOWED = (KIND.ELEMENTWISE, KIND.UNARY, KIND.ACTIVATION, KIND.SHUFFLE, KIND.IDENTITY, KIND.CAST)


def matmul(ctx: Context, a: Value, b: Value, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    """One matrix-multiply layer on values of one dtype, batch dimensions broadcast."""
    may_be_one = not transpose_a and not transpose_b and not any(isinstance(x, torch.Tensor) for x in (a, b))
    a, b = broadcast(ctx, a, b)
    if computes_squares_wrong() and may_be_one and _are_made_of_one(ctx, a, b):
        for _ in range(2):
            b = unary(ctx, trt.UnaryOperation.NEG, b)
    axis_a, axis_b = (-1 if transpose_a else -2), (-2 if transpose_b else -1)
    rows, columns = dims(ctx, a)[axis_a], dims(ctx, b)[axis_b]
    batch = broadcast_sizes(dims(ctx, a)[:-2], dims(ctx, b)[:-2])
    twice = _made_two(ctx, (rows, columns), batch, (a, transpose_a), (b, transpose_b))
    if twice == 0:
        a = _with_one_more(ctx, a, axis_a)
    if twice == 1:
        b = _with_one_more(ctx, b, axis_b)
    op = {False: trt.MatrixOperation.NONE, True: trt.MatrixOperation.TRANSPOSE}
    layer = ctx.network.add_matrix_multiply(a, op[transpose_a], b, op[transpose_b])
    sizes = (*batch, dims(ctx, a)[axis_a], dims(ctx, b)[axis_b])
    y = ctx.track(layer.get_output(0), sizes)
    return y if twice is None else narrow(ctx, y, len(batch) + twice, 0, (rows, columns)[twice])


def _made_two(
    ctx: Context, sizes: Sequence[Any], batch: Sequence[Any], left: tuple[Any, bool], right: tuple[Any, bool]
) -> int | None:
    """Which of the rows (0) and columns (1) of a product must not be one alone, so that TensorRT computes it right."""
    (a, transpose_a), (b, transpose_b) = left, right
    if all(not is_symbolic(size) and size == 1 for size in batch):
        return None
    alone = [_may_be_one(ctx, size, dtype_of(a)) for size in sizes]
    if not any(alone) or any(_root(ctx, x.name)[1] for x in (a, b)):
        return None
    if alone[0] and (alone[1] or transpose_b == _is_turned(ctx, b)):
        return 0
    return 1 if alone[1] and transpose_a != _is_turned(ctx, a) else None


def _may_be_one(ctx: Context, size: Any, dtype: torch.dtype) -> bool:
    """Whether a product with so many rows or columns is one that TensorRT computes wrong if it is one alone."""
    if not computes_vectors_wrong(dtype, is_symbolic(size)):
        return False
    return not proven(ctx, size > 1) if is_symbolic(size) else bool(size == 1)


def _with_one_more(ctx: Context, x: Any, axis: int) -> Any:
    """A matrix with its first row or column once more at the end."""
    dim = len(dims(ctx, x)) + axis
    return concat(ctx, [x, narrow(ctx, x, dim, 0, 1)], dim)


def _are_made_of_one(ctx: Context, a: Any, b: Any) -> bool:
    """Whether TensorRT may come to see one tensor in two.

    It merges what is computed twice and takes factors out of products, so all that is computed of one tensor element by
    element counts. A tensor and its transpose are two.
    """
    return _root(ctx, a.name)[0] == _root(ctx, b.name)[0]


def _root(ctx: Context, name: str) -> tuple[str, bool]:
    """What a tensor is computed from element by element, and whether that is a constant."""
    layers = makers(ctx)
    while (layer := layers.get(name)) is not None and (kind := type_of_layer(layer)) in _FOLLOWED:
        if kind == KIND.SHUFFLE and turns(layer):
            break
        count = 1 if kind == KIND.SHUFFLE else layer.num_inputs  # the second of a shuffle is a shape
        inputs = {layer.get_input(i).name for i in range(count)}
        computed = {n for n in inputs if n not in layers or type_of_layer(layers[n]) != KIND.CONSTANT} or inputs
        if len(computed) != 1:
            break
        (name,) = computed
    return name, layer is not None and type_of_layer(layer) == KIND.CONSTANT


def _is_turned(ctx: Context, x: Any) -> bool:
    """Whether a tensor is the transpose of what was computed before it."""
    layer = makers(ctx).get(x.name)
    return layer is not None and type_of_layer(layer) == KIND.SHUFFLE and turns(layer)
