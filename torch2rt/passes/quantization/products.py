"""The products of a graph that may be quantised, and the values whose ranges that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.passes.copies import constant_of
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.formats import CONVOLUTIONS, Format
from torch2rt.registry import load
from torch2rt.sizes import expression

# A product by its function: the names of its two operands, and the dimension of the second that its outputs lie along.
OPERANDS = {
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", 0)),
    "linear": ("input", "weight", 0),
    "matmul": ("input", "other", 1),
    "__matmul__": ("input", "other", 1),
    "mm": ("input", "mat2", 1),
    "addmm": ("mat1", "mat2", 1),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Quantizable:
    """A product that may be quantised: its call, the value and the weight that it multiplies.

    - `axis`: the dimension of the weight that the outputs lie along.
    - `bias`: the constant that is added to it. `takes_bias`: whether it has one or could be given one.
    """

    node: Node
    input: Node
    weight: Node
    axis: int
    bias: Node | None
    takes_bias: bool

    @property
    def function(self) -> str:
        return name_of(self.node.target)

    @property
    def is_convolution(self) -> bool:
        return self.function in CONVOLUTIONS

    @property
    def channels(self) -> int:
        """The dimension of the input that its channels lie along."""
        return 1 - self.weight.meta["val"].dim() if self.is_convolution else -1


def quantizable(graph: torch.fx.GraphModule) -> list[Quantizable]:
    """The convolutions, linear layers and products of matrices of a graph, of floating point and constant weights."""
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or (name := name_of(node.target)) not in OPERANDS:
            continue
        given, (first, second, axis) = arguments(node), OPERANDS[name]
        x, weight, bias = given.get(first), given.get(second), given.get("bias")
        if not isinstance(x, Node) or not isinstance(weight, Node) or x.op == "get_attr" or not is_float(x):
            continue
        constant = constant_of(graph, weight)
        if constant is None or constant.dtype is not x.meta["val"].dtype or constant.dim() < 2:
            continue
        if axis and constant.dim() > 2:
            continue
        own = bias if isinstance(bias, Node) and constant_of(graph, bias) is not None else None
        takes_bias = axis == 0 and (bias is None or own is not None)
        found.append(Quantizable(node, x, weight, axis, own, takes_bias))
    return found


def observed(graph: torch.fx.GraphModule, format: Format | None = None, keep: Container[Node] = ()) -> list[Node]:
    """The values whose ranges calibration has to find, but for those of calls in `keep` alone."""
    if format is not None and not format.is_whole:
        return []
    products = [p for p in quantizable(graph) if format is None or format.obstacle(p.function) is None]
    products = [product for product in products if product.node not in keep]
    added = skips(graph, {product.node for product in products})
    inputs = [product.input for product in products]
    return list(dict.fromkeys([*inputs, *(skip for node, skip in added.items() if node not in keep)]))


def skips(graph: torch.fx.GraphModule, products: set[Node]) -> dict[Node, Node]:
    """Additions of a convolution's result and another value of the same shape, and that other value."""
    found = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or name_of(node.target) not in ("add", "__add__", "__radd__") or node.kwargs:
            continue
        values: list[Any] = [a for a in node.args if isinstance(a, Node) and is_float(a) and a.op != "get_attr"]
        if len(values) != 2 or _shape(values[0]) != _shape(values[1]):
            continue
        ours = [v for v in values if v in products and name_of(v.target) in CONVOLUTIONS and len(v.users) == 1]
        if len(ours) == 1:
            found[node] = next(v for v in values if v is not ours[0])
    return found


def _shape(node: Node) -> tuple[Any, ...]:
    """A value's sizes as expressions: torch takes symbolic sizes that are compared for equal, where their hints are."""
    return tuple(map(expression, node.meta["val"].shape))


def arguments(node: Node) -> Mapping[str, Any]:
    """The arguments of a call of one of torch's own functions, by name."""
    converter = load().find(node.target)  # type: ignore[arg-type]
    assert converter is not None  # of torch's own functions
    args, kwargs = converter.bind(node.args, dict(node.kwargs), node.target)  # type: ignore[arg-type]
    return {**dict(zip((p.name for p in converter.parameters), args, strict=False)), **kwargs}


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS
