"""What a graph's values are computed from: which are the same computation, and which values a call looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from torch2rt.registry import Registry
from torch2rt.structure import as_bytes


def value_numbers(graph: torch.fx.Graph, attribute: Callable[[str], Any]) -> dict[Node, int]:
    """A number for each node, equal for the same calls of the same values; `attribute` gives constants by name."""
    table: dict[Any, int] = {}
    numbers: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            key = content(attribute(str(node.target)))
        elif node.op == "call_function":
            key = (node.target, _frozen(node.args, numbers), _frozen(node.kwargs, numbers))
        else:
            key = node
        numbers[node] = table.setdefault(key, len(table))
    return numbers


def _frozen(value: Any, numbers: dict[Node, int]) -> Any:
    """An argument as something to look up, in which 1, 1.0 and True differ."""
    if isinstance(value, Node):
        return Node, numbers[value]
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *(_frozen(v, numbers) for v in value)
    if isinstance(value, dict):
        return dict, *((k, _frozen(v, numbers)) for k, v in value.items())
    if isinstance(value, slice):
        return slice, *(_frozen(v, numbers) for v in (value.start, value.stop, value.step))
    return type(value), repr(value)


def content(value: Any) -> Any:
    """What tells a constant from others; of parameters and subgraphs, only the same object is the same."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return id(value)
    data = as_bytes(value).cpu()
    return value.dtype, value.device, tuple(value.shape), data.numpy().tobytes()


_LIKE = frozenset({"type_as", "expand_as", "view_as", "reshape_as", "to"})  # their second tensor gives dtype or shape


def value_sources(node: Node, registry: Registry) -> list[Node]:
    """The nodes whose values a call's result is computed from, and not from their sizes and dtypes alone."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return []
    if node.op == "call_function" and registry.is_factory(node.target):  # type: ignore[arg-type]
        return _nodes((node.args[1:], [value for name, value in node.kwargs.items() if name not in ("input", "self")]))
    if getattr(node.target, "__name__", "").split(".")[0] in _LIKE:
        return _nodes(node.args[:1] or node.kwargs)
    return node.all_input_nodes


def _nodes(arguments: Any) -> list[Node]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Node)]
