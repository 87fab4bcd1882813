"""Which layers made a tensor of the network: for what TensorRT would make of several of them together."""

from __future__ import annotations

from typing import Any

from torch2rt.backend.tensorrt import trt, type_of_layer
from torch2rt.vocabulary.context import Context

KIND = trt.LayerType

_POINTWISE = (KIND.ELEMENTWISE, KIND.UNARY, KIND.SHUFFLE, KIND.SLICE, KIND.IDENTITY, KIND.CAST)


def makers(ctx: Context) -> dict[str, Any]:
    """The layer of each tensor so far, by the tensor's name."""
    found = ctx.memo.setdefault(makers, {})
    first = ctx.memo.get((makers, "count"), 0)
    for i in range(first, ctx.network.num_layers):
        if (layer := ctx.network.get_layer(i)).num_outputs:
            found[layer.get_output(0).name] = layer
    ctx.memo[makers, "count"] = ctx.network.num_layers
    return found


def turns(layer: Any) -> bool:
    """Whether a shuffle changes the order of the axes."""
    layer.__class__ = trt.IShuffleLayer
    order = list(layer.first_transpose)[: len(layer.get_input(0).shape)]
    return order != sorted(order)


def is_scaled(ctx: Context, x: Any) -> bool:
    """Whether a tensor is a product or a quotient, element by element."""
    layer = makers(ctx).get(x.name)
    if layer is None or type_of_layer(layer) != KIND.ELEMENTWISE:
        return False
    layer.__class__ = trt.IElementWiseLayer
    return layer.op in (trt.ElementWiseOperation.PROD, trt.ElementWiseOperation.DIV)


def is_biased_product(ctx: Context, x: Any) -> bool:
    """Whether a tensor is a matrix product with something added, or that with more done to it element by element."""
    layers, names, seen = makers(ctx), [(x.name, False)], set()
    while names:
        name, biased = names.pop()
        layer = layers.get(name)
        if layer is None or (name, biased) in seen:
            continue
        seen.add((name, biased))
        kind = type_of_layer(layer)
        if kind == KIND.MATRIX_MULTIPLY:
            if biased:
                return True
        elif kind in _POINTWISE:
            count = 2 if kind == KIND.ELEMENTWISE else 1  # the others of a slice or shuffle are shapes
            names += [(layer.get_input(i).name, biased or count == 2) for i in range(count)]
    return False
