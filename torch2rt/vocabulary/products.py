"""Matrix products."""

from __future__ import annotations

from typing import Any

import torch

from torch2rt.backend.quirks import computes_dot_products_wrong, computes_squares_wrong
from torch2rt.backend.tensorrt import trt
from torch2rt.sizes import is_symbolic
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import EW
from torch2rt.vocabulary.plain import Value, broadcast_sizes, dims, dtype_of
from torch2rt.vocabulary.pointwise import elementwise, unary
from torch2rt.vocabulary.reduction import reduce
from torch2rt.vocabulary.tensors import broadcast, cast, reshape

_KIND = trt.LayerType
_FOLLOWED = (_KIND.ELEMENTWISE, _KIND.UNARY, _KIND.ACTIVATION, _KIND.SHUFFLE, _KIND.IDENTITY, _KIND.CAST)
_kind = trt.ILayer.type.__get__  # activation layers have another `type`


def matmul(ctx: Context, a: Value, b: Value, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    """One matrix-multiply layer on values of one dtype, batch dimensions broadcast."""
    may_be_one = not transpose_a and not transpose_b and not any(isinstance(x, torch.Tensor) for x in (a, b))
    a, b = broadcast(ctx, a, b)
    if computes_squares_wrong() and may_be_one and _are_made_of_one(ctx, a, b):
        for _ in range(2):
            b = unary(ctx, trt.UnaryOperation.NEG, b)
    rows, columns = dims(ctx, a)[-1 if transpose_a else -2], dims(ctx, b)[-2 if transpose_b else -1]
    batch = broadcast_sizes(dims(ctx, a)[:-2], dims(ctx, b)[:-2])
    is_dot = not is_symbolic(rows) and not is_symbolic(columns) and (rows, columns) == (1, 1)
    if is_dot and any(map(is_symbolic, batch)) and computes_dot_products_wrong(dtype_of(a)):
        return _dot_products(ctx, a, b, -2 if transpose_a else -1, -1 if transpose_b else -2)
    op = {False: trt.MatrixOperation.NONE, True: trt.MatrixOperation.TRANSPOSE}
    layer = ctx.network.add_matrix_multiply(a, op[transpose_a], b, op[transpose_b])
    return ctx.track(layer.get_output(0), (*batch, rows, columns))


def _dot_products(ctx: Context, a: Any, b: Any, axis_a: int, axis_b: int) -> Any:
    """Products of one row and one column, whose terms lie along these axes, as sums in float32."""
    terms = []
    for x, axis in ((a, axis_a), (b, axis_b)):
        row = reshape(ctx, x, (*dims(ctx, x)[:-2], 1, dims(ctx, x)[axis]))
        terms.append(cast(ctx, row, torch.float32))
    total = reduce(ctx, trt.ReduceOperation.SUM, elementwise(ctx, EW.PROD, *terms), -1, keepdim=True)
    return cast(ctx, total, dtype_of(a))


def _are_made_of_one(ctx: Context, a: Any, b: Any) -> bool:
    """Whether TensorRT may come to see one tensor in two.

    It merges what is computed twice and takes factors out of products, so all that is computed of one tensor element by
    element counts. A tensor and its transpose are two.
    """
    layers = [ctx.network.get_layer(i) for i in range(ctx.network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in layers if layer.num_outputs}

    def root(name: str) -> str:
        while (layer := makers.get(name)) is not None and (kind := _kind(layer)) in _FOLLOWED:
            count = layer.num_inputs
            if kind == _KIND.SHUFFLE:
                layer.__class__ = trt.IShuffleLayer
                order = list(layer.first_transpose)[: len(layer.get_input(0).shape)]
                if order != sorted(order):
                    break
                count = 1  # the second is a shape
            inputs = {layer.get_input(i).name for i in range(count)}
            computed = {n for n in inputs if n not in makers or _kind(makers[n]) != _KIND.CONSTANT}
            if len(computed) != 1:
                break
            (name,) = computed
        return name

    return root(a.name) == root(b.name)
