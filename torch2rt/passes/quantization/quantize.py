"""int8: quantise the inputs and the weights of convolutions and linear layers, where TensorRT computes them in int8.

An input is quantised and brought back by `fake_quantize`, a weight is int8 and brought back by `dequantize`. Nothing
comes between a product and its bias, its folded normalization or its activation, which TensorRT computes along with
it. The other operand of a residual addition is quantised too: it is then read as int8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.backend.quirks import builds_int8_convolutions
from torch2rt.callables import qualified_name
from torch2rt.graph import graph_meta, place_of
from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.quantized import INT8, dequantize, fake_quantize, quantized
from torch2rt.registry import load

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
PRODUCTS = CONVOLUTIONS | {"linear"}  # transposed convolutions are only simulated


@dataclasses.dataclass(frozen=True)
class Quantizable:
    """A product that may be in int8: its call, the value and the weight that it multiplies."""

    node: Node
    input: Node
    weight: Node


def quantizable(graph: torch.fx.GraphModule) -> list[Quantizable]:
    """The convolutions and linear layers of a graph, of float32 values with constant weights."""
    registry, found = load(), []
    for node in graph.graph.nodes:
        if node.op != "call_function" or name_of(node.target) not in PRODUCTS:
            continue
        converter = registry.find(node.target)
        assert converter is not None  # of torch's own functions
        args, kwargs = converter.bind(node.args, dict(node.kwargs), node.target)
        given = {**dict(zip((p.name for p in converter.parameters), args, strict=False)), **kwargs}
        x, weight = given["input"], given["weight"]
        if isinstance(x, Node) and isinstance(weight, Node) and x.op != "get_attr" and _is_float(x):
            constant = constant_of(graph, weight)
            if constant is not None and constant.dtype is torch.float32 and constant.dim() > 1:
                found.append(Quantizable(node, x, weight))
    return found


def observed(graph: torch.fx.GraphModule) -> list[Node]:
    """The values whose ranges calibration has to find."""
    products = quantizable(graph)
    nodes = [*(product.input for product in products), *_skips(graph, {product.node for product in products}).values()]
    return list(dict.fromkeys(nodes))


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    graph: torch.fx.GraphModule, ranges: Mapping[str, float], keep: Mapping[Node, str] | None = None
) -> torch.fx.GraphModule:
    """A graph with int8 products of values up to `ranges`, by the names of `observed` nodes; larger ones saturate.

    `keep` are calls that stay in floating point, with the reason. What cannot be quantised is named in the report.
    """
    kept, copy = {node.name: why for node, why in (keep or {}).items()}, copy_graph(graph)
    quantizer = _Quantizer(copy, ranges)
    done: set[Node] = set()
    reasons: list[str] = []
    for product in quantizable(copy):
        why = kept.get(product.node.name) or quantizer.obstacle(product)
        if why is None:
            quantizer.quantize(product)
            done.add(product.node)
            product.node.meta["precision"] = "int8"
        else:
            product.node.meta["not_int8"] = why
            if product.node.name not in kept:
                place, call = place_of(product.node).strip(), qualified_name(product.node.target)  # type: ignore[arg-type]
                reasons.append(f"{place}: is not quantised: {call}, {why}")
    for addition, skip in _skips(copy, done).items():
        if addition.name not in kept and quantizer.usable(skip) is None:
            addition.replace_input_with(skip, quantizer.activation(skip))
    meta = graph_meta(copy)
    copy.meta["torch2rt"] = dataclasses.replace(meta, assumptions=(*meta.assumptions, *dict.fromkeys(reasons)))
    return finish(copy)


class _Quantizer:
    """A copy of a graph under change; each value and each weight is quantised once."""

    def __init__(self, module: torch.fx.GraphModule, ranges: Mapping[str, float]) -> None:
        self.module, self.ranges = module, ranges
        self.made: dict[Node, Node] = {}

    def obstacle(self, product: Quantizable) -> str | None:
        """Why a product cannot be quantised, if it cannot be."""
        if name_of(product.node.target) in CONVOLUTIONS and not builds_int8_convolutions():
            return "this TensorRT has no int8 convolutions"
        weight = constant_of(self.module, product.weight)
        if weight is None or not weight.isfinite().all():
            return "its weight has a NaN or an infinity"
        return self.usable(product.input)

    def usable(self, value: Node) -> str | None:
        """Why a value cannot be quantised, if it cannot be."""
        largest = self.ranges.get(value.name)
        if largest is None:
            return "the range of its input is not known"
        if not largest or not math.isfinite(largest) or largest / INT8 < torch.finfo(torch.float32).tiny:
            return f"its input is never beyond {largest:g} in the calibration data"
        return None

    def quantize(self, product: Quantizable) -> None:
        product.node.replace_input_with(product.input, self.activation(product.input))
        product.node.replace_input_with(product.weight, self.weight(product))

    def activation(self, value: Node) -> Node:
        """A value, quantised and brought back."""
        if value not in self.made:
            with self.module.graph.inserting_after(value):
                call = self.module.graph.call_function(fake_quantize, (value, self.ranges[value.name] / INT8))
            call.meta = {name: kept for name, kept in value.meta.items() if name in ("val", "module", "source")}
            call.meta["precision"] = "int8"
            self.made[value] = call
        return self.made[value]

    def weight(self, product: Quantizable) -> Node:
        """A weight in int8, brought back for each output."""
        node = product.weight
        if node not in self.made:
            constant = constant_of(self.module, node)
            assert constant is not None
            values, scale = quantized(constant, 0)
            first = next(n for n in self.module.graph.nodes if n in node.users)
            parts = []
            for tensor, name in ((values, "int8"), (scale, "scale")):
                parts.append(add_constant(self.module, f"{node.target}_{name}", tensor.cpu(), first))
                parts[-1].meta["made_of"] = origin_of(node).then("quantised to int8" if name == "int8" else "its scale")
            with self.module.graph.inserting_before(first):
                call = self.module.graph.call_function(dequantize, (*parts, 0, torch.float32))
            call.meta = {name: product.node.meta[name] for name in ("module", "source")}
            with product.node.meta["val"].fake_mode:
                call.meta["val"] = torch.empty(constant.shape, device=product.node.meta["val"].device)
            self.made[node] = call
        return self.made[node]


def _skips(graph: torch.fx.GraphModule, products: set[Node]) -> dict[Node, Node]:
    """Additions of a convolution's result and another value of the same shape, and that other value."""
    found = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or name_of(node.target) not in ("add", "__add__", "__radd__") or node.kwargs:
            continue
        values: list[Any] = [a for a in node.args if isinstance(a, Node) and _is_float(a) and a.op != "get_attr"]
        if len(values) != 2 or tuple(values[0].meta["val"].shape) != tuple(values[1].meta["val"].shape):
            continue
        ours = [v for v in values if v in products and name_of(v.target) in CONVOLUTIONS and len(v.users) == 1]
        if len(ours) == 1:
            found[node] = next(v for v in values if v is not ours[0])
    return found


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32
