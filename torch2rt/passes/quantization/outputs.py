"""One scale for the weight of a quantised product, and scales of its outputs behind it.

TensorRT writes the sums of a product whose weight has a scale for each output in float32, and the kernel behind it
reads them, scales them and adds the bias. Where the weight has one scale, the sums are written in the type of the
product's values: half as many bytes, which take longer than the product itself where that has thousands of rows.
"""

from __future__ import annotations

import torch
from torch.fx.node import Node

from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.products import arguments
from torch2rt.passes.quantization.quantized import LARGEST, dequantize, fake_quantize, fake_quantize_fp8, scaled

# Products of matrices: the call without a bias, and the names of the operands and of what is added.
_PRODUCTS = {
    "linear": (torch.nn.functional.linear, "input", "weight", "bias"),
    "addmm": (torch.mm, "mat1", "mat2", "input"),
    "matmul": (torch.matmul, "input", "other", ""),
    "__matmul__": (torch.matmul, "input", "other", ""),
    "mm": (torch.mm, "input", "mat2", ""),
}
_STEPS = {fake_quantize: 128.0, fake_quantize_fp8: LARGEST[torch.float8_e4m3fn]}  # the largest quantised value
_MOST = torch.finfo(torch.float16).max


def scale_outputs(graph: torch.fx.GraphModule) -> int:
    """Change the products of quantised values and weights with a scale for each output; returns how many.

    A product stays as it is where its sums, as the one scale has them, might overflow float16 for some input.
    """
    made: dict[Node, tuple[Node, Node]] = {}
    nodes = [node for node in graph.graph.nodes if name_of(node.target) in _PRODUCTS]
    return sum(_scale_outputs(graph, node, made) for node in nodes)


def _scale_outputs(graph: torch.fx.GraphModule, node: Node, made: dict[Node, tuple[Node, Node]]) -> bool:
    """Change one product, if it can be; `made` are weights with one scale, and the ratios, by what they are made of."""
    target, first, second, third = _PRODUCTS[name_of(node.target)]
    given = arguments(node)
    x, weight, bias = given[first], given[second], given.get(third)
    if not isinstance(x, Node) or x.target not in _STEPS or not isinstance(weight, Node):
        return False
    if weight.target is not dequantize or given.get("out_dtype") is not None:
        return False
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or isinstance(bias, Node) and bias.op != "get_attr":
        return False
    parts, axis = weight.args[:2], weight.args[2]
    values, scale = (constant_of(graph, part) for part in parts)  # type: ignore[arg-type]
    if values is None or scale is None or scale.dim() != 1 or len(scale) == 1 or values.dim() != 2:
        return False
    if axis != (0 if target is torch.nn.functional.linear else 1):
        return False
    sums = values.float().abs().sum(1 - axis)  # type: ignore[operator]
    one = torch.where(sums > 0, scale, 0).amax()
    if not bool((one > 0) & (one * sums.amax() * x.args[1] * _STEPS[x.target] <= _MOST)):  # type: ignore[operator,index]
        return False
    if weight not in made:
        made[weight] = _with_one_scale(graph, weight, scale, one, node)
    whole, ratios = made[weight]
    with graph.graph.inserting_before(node):
        product = graph.graph.call_function(target, (x, whole))
    product.meta = {name: kept for name, kept in node.meta.items() if name != "origin"}
    node.target, node.args, node.kwargs = scaled, (product, ratios, bias), {}
    if not weight.users:
        graph.graph.erase_node(weight)
    return True


def _with_one_scale(
    graph: torch.fx.GraphModule, weight: Node, scale: torch.Tensor, one: torch.Tensor, before: Node
) -> tuple[Node, Node]:
    """A weight with one scale, and its scales as parts of that."""
    values, old, axis, dtype = weight.args
    constants = []
    for name, number, change in (
        ("one_scale", one, "the largest of them"),
        ("ratios", (scale / one).clamp(max=1.0), "as parts of the largest"),
    ):
        constants.append(add_constant(graph, f"{values.target}_{name}", number.cpu(), before))  # type: ignore[union-attr]
        constants[-1].meta["made_of"] = origin_of(old).then(change)  # type: ignore[arg-type]
    with graph.graph.inserting_before(before):
        whole = graph.graph.call_function(dequantize, (values, constants[0], axis, dtype))
    whole.meta = dict(weight.meta)
    return whole, constants[1]
