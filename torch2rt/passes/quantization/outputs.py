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
    return sum(_scale_outputs(graph, node) for node in list(graph.graph.nodes) if name_of(node.target) in _PRODUCTS)


def _scale_outputs(graph: torch.fx.GraphModule, node: Node) -> bool:
    target, first, second, third = _PRODUCTS[name_of(node.target)]
    given = arguments(node)
    x, weight, bias = given[first], given[second], given.get(third)
    if not isinstance(x, Node) or x.target not in _STEPS or not isinstance(weight, Node):
        return False
    if weight.target is not dequantize or given.get("out_dtype") is not None:
        return False
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or isinstance(bias, Node) and bias.op != "get_attr":
        return False
    parts, axis, dtype = weight.args[:2], weight.args[2], weight.args[3]
    values, scale = (constant_of(graph, part) for part in parts)  # type: ignore[arg-type]
    if values is None or scale is None or scale.dim() != 1 or len(scale) == 1 or values.dim() != 2:
        return False
    if axis != (0 if target is torch.nn.functional.linear else 1):
        return False
    sums = values.float().abs().sum(1 - axis)  # type: ignore[operator]
    one = torch.where(sums > 0, scale, 0).amax()
    if not bool((one > 0) & (one * sums.amax() * x.args[1] * _STEPS[x.target] <= _MOST)):  # type: ignore[operator,index]
        return False
    stem = str(weight.args[0].target)  # type: ignore[union-attr]
    origin = origin_of(parts[1])  # type: ignore[arg-type]
    found = []
    for name, number, change in (
        ("one_scale", one, "the largest of them"),
        ("ratios", (scale / one).clamp(max=1.0), "as parts of the largest"),
    ):
        made = add_constant(graph, f"{stem}_{name}", number.cpu(), node)
        made.meta["made_of"] = origin.then(change)
        found.append(made)
    with graph.graph.inserting_before(node):
        whole = graph.graph.call_function(dequantize, (parts[0], found[0], axis, dtype))
        whole.meta = dict(weight.meta)
        product = graph.graph.call_function(target, (x, whole))
    product.meta = {name: kept for name, kept in node.meta.items() if name != "origin"}
    node.target, node.args, node.kwargs = scaled, (product, found[1], bias), {}
    if not weight.users:
        graph.graph.erase_node(weight)
    return True
