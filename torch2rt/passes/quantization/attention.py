"""The two products of an attention in int8 or fp8: which attentions TensorRT computes so in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.quantization.formats import Format
from torch2rt.passes.quantization.products import arguments, is_float
from torch2rt.passes.quantization.quantized import fake_quantize
from torch2rt.sizes import is_symbolic

_VIEWS = frozenset("view reshape transpose permute flatten unflatten contiguous movedim swapaxes squeeze".split())
# Of other sizes, TensorRT makes two products and a softmax; for one head, its builder fails at some numbers of tokens.
_INT8_SIZES, _INT8_TOKENS = (16, 32, 64), range(2, 513)
_FP8_SIZES, _FP8_TOKENS = range(16, 257, 16), range(32, 4097)


def attentions(graph: torch.fx.GraphModule) -> list[Node]:
    """The attentions of a graph, of floating point."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and name_of(node.target) == "scaled_dot_product_attention" and is_float(node)
    ]


def operands(attention: Node) -> list[Node]:
    """Queries, keys and values."""
    given = arguments(attention)
    return [given["query"], given["key"], given["value"]]


def obstacle(attention: Node, format: Format, is_alone: bool = False) -> str | None:
    """Why an attention's products cannot be of a format, if they cannot be.

    Other products of its graph are quantised already, unless it `is_alone` that is looked at.
    """
    given: dict[str, Any] = dict(arguments(attention))
    values = operands(attention)
    if any(not isinstance(x, Node) or x.op == "get_attr" for x in values):
        return "its queries, keys or values are constant"
    if given.get("dropout_p"):
        return "it has dropout"
    query, key, value = (x.meta["val"].shape for x in values)
    if any(len(shape) != 4 for shape in (query, key, value)):
        return "its queries, keys and values have no four dimensions"
    if given.get("enable_gqa"):
        return "its queries share heads of keys"
    size, tokens = query[-1], (query[-2], key[-2])
    if any(map(is_symbolic, (size, *tokens, value[-1]))):
        return "TensorRT has a kernel for static numbers of tokens alone"
    if is_symbolic(given.get("scale")) or given.get("scale") == 0:
        return "its scale is no number, or 0"
    if value[-1] != size:
        return f"its values have {value[-1]} features, and its keys {size}"
    if is_symbolic(query[1]) or query[1] < 2:
        return "TensorRT has a kernel for two heads and more"
    sizes, counts = (_FP8_SIZES, _FP8_TOKENS) if format.name == "fp8" else (_INT8_SIZES, _INT8_TOKENS)
    if size not in sizes or any(count not in counts for count in tokens):
        many = " and ".join(map(str, dict.fromkeys(tokens)))
        return f"TensorRT has no {format.name} kernel for {many} tokens and heads of {size} features"
    if format.name == "fp8":
        return None
    return None if is_alone or rounding(attention) else "its result goes to no quantised product"


def rounding(attention: Node) -> Node | None:
    """The call that quantises an attention's result, before which no more changes than its elements' order.

    Results of queries that see no key become 0 between, which quantisation leaves as it is.
    """
    value = attention
    while len(value.users) == 1:
        (user,) = value.users
        if user.target is fake_quantize:
            return user
        is_masked = user.target is torch.where and user.args[1] is value and user.args[2] == 0.0
        if not is_masked and name_of(user.target) not in _VIEWS:
            return None
        value = user
    return None
