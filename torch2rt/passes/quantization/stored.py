"""Weights that a package has quantised alone, kept as int8 or int4 in the engine.

torchao and nvidia-modelopt compute a weight of whole numbers and scales while the module is traced, so that the graph
has a constant of floating-point numbers: multiples of a scale for each output or for each block. Only computed ones are
looked at: a parameter is as its module has it, even where all its numbers are such multiples.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx.node import Node

from torch2rt.backend.quirks import crashes_on_equal_weights
from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.products import Quantizable, arguments, quantizable
from torch2rt.passes.quantization.quantized import dequantize, fake_quantize, fake_quantize_fp8, packed
from torch2rt.passes.quantization.recognize import on_grid

_LEAST = 8  # numbers that differ, which a mask or a permutation has not
_SIZE = 16  # a smaller matrix is not worth it, and may be made of such multiples by chance
_BLOCKS = (256, 128, 64, 32, 16)  # of int4, in which TensorRT has a kernel
_Parts = tuple[torch.Tensor, torch.Tensor]


@torch.inference_mode(False)
@torch.no_grad()
def keep_quantized(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that says computed weights of products of matrices as int8 or int4, where that says them exactly."""
    if not any(_is_looked_at(graph, product) for product in quantizable(graph)):
        return graph
    copy = copy_graph(graph)
    products = quantizable(copy)
    uses = Counter(str(product.weight.target) for product in products)
    changed = False
    for product in products:
        if _is_looked_at(copy, product) and not (uses[str(product.weight.target)] > 1 and crashes_on_equal_weights()):
            changed |= _keep(copy, product)
    return finish(copy) if changed else graph


@torch.inference_mode(False)
@torch.no_grad()
def unpack_weights(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph in which weights that are quantised alone are floating-point constants, as they were traced."""
    nodes = graph.graph.find_nodes(op="call_function", target=dequantize)
    names = {node.name for node in nodes if not any(_has_quantised_values(user) for user in node.users)}
    if not names:
        return graph
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        if node.name in names:
            values, scale = (constant_of(copy, part) for part in node.args[:2])
            assert values is not None and scale is not None
            made = add_constant(copy, str(node.args[0].target), dequantize(values, scale, *node.args[2:]), node)
            made.meta["made_of"] = origin_of(node.args[0])
            node.replace_all_uses_with(made)
            copy.graph.erase_node(node)
    return finish(copy)


def _has_quantised_values(product: Node) -> bool:
    return any(node.target in (fake_quantize, fake_quantize_fp8) for node in product.all_input_nodes)


def _is_looked_at(graph: torch.fx.GraphModule, product: Quantizable) -> bool:
    weight = constant_of(graph, product.weight)
    is_computed = str(product.weight.target).startswith("_constant_")
    if weight is None or weight.dim() != 2 or min(weight.shape) < _SIZE:
        return False
    return is_computed and not _has_quantised_values(product.node)


def _keep(graph: torch.fx.GraphModule, product: Quantizable) -> bool:
    """Say a product's weight as quantised numbers, if it is made of them."""
    weight = constant_of(graph, product.weight)
    assert weight is not None
    scaling = _scaling(graph, product)
    whole = weight if scaling is None else weight.float() * scaling[1]
    rows = (whole.T if product.axis else whole).float()
    if (found := _quantised(rows.to(weight.dtype))) is None:
        return False
    values, scale = (part.T.contiguous() if product.axis and part.dim() == 2 else part for part in found)
    if scale.dim() == 2:
        if values.shape[-1] % 2:
            return False
        values = packed(values)
    parts = []
    kind = "int4" if scale.dim() == 2 else "int8"
    for tensor, change in ((values, f"kept in {kind}"), (scale, "its scale")):
        parts.append(add_constant(graph, f"{product.weight.target}_{change.split()[-1]}", tensor.cpu(), product.node))
        parts[-1].meta["made_of"] = origin_of(product.weight).then(change)
    with graph.graph.inserting_before(product.node):
        call = graph.graph.call_function(dequantize, (*parts, product.axis, weight.dtype))
    call.meta = {name: product.node.meta[name] for name in ("module", "source")}
    with product.node.meta["val"].fake_mode:
        call.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype, device=product.node.meta["val"].device)
    product.node.replace_input_with(product.weight, call)
    product.node.meta["precision"] = FORMATS[f"{kind}_weights"].name
    if scaling is not None:
        scaling[0].replace_all_uses_with(product.node)
        product.node.meta.update({name: kept for name, kept in scaling[0].meta.items() if name == "origin"})
        graph.graph.erase_node(scaling[0])
    return True


def _scaling(graph: torch.fx.GraphModule, product: Quantizable) -> tuple[Node, torch.Tensor] | None:
    """The call that multiplies a product's outputs by constants, and these, where its weight is whole numbers."""
    weight, users = constant_of(graph, product.weight), list(product.node.users)
    if weight is None or len(users) != 1 or product.bias is not None or arguments(product.node).get("bias") is not None:
        return None
    if name_of(users[0].target) not in ("mul", "__mul__") or users[0].kwargs or len(users[0].args) != 2:
        return None
    if name_of(product.node.target) == "addmm" or not bool((weight == weight.round()).all()):
        return None
    other = next((arg for arg in users[0].args if arg is not product.node), None)
    factor = constant_of(graph, other) if isinstance(other, Node) else None
    if factor is None or factor.shape != (weight.shape[1 - product.axis if product.axis == 0 else 1],):
        return None
    same = factor.dtype is weight.dtype is users[0].meta["val"].dtype
    return (users[0], factor if product.axis else factor[:, None]) if same else None


def _quantised(rows: torch.Tensor) -> _Parts | None:
    """A matrix with a row for each output as whole numbers, and a scale for each row or for each block of rows."""
    sample = rows[: max(1, 4096 // max(rows.shape[1], 1))]
    if len(sample.unique()) < _LEAST:
        return None
    if on_grid(sample) is not None and (found := on_grid(rows)) is not None:
        return found
    for block in _BLOCKS:
        if rows.shape[1] % block == 0 and rows.shape[1] > block:
            blocks = rows.reshape(-1, block)
            if on_grid(blocks[:64], 8) is not None and (found := on_grid(blocks, 8)) is not None:
                values, scale = found
                return values.reshape(rows.shape), scale.reshape(len(rows), -1)
    return None
