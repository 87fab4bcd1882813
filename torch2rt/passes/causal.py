"""Causal masks, recognised by their values: attention is then causal attention, which is faster than with a mask.

A mask of a dynamic length is no constant. But what modules make of `torch.arange(n)`, `torch.ones(n, n)` or the slice
`[:n, :n]` of a table, of comparisons, of `tril`, `cumsum` and `diff` has elements that do not depend on n: for a
smaller n it is the corner of the mask for a larger one. Such a value *grows*, and the mask for the largest sizes tells
of all others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import Node, map_aggregate

from torch2rt.graph import graph_meta
from torch2rt.passes.copies import constant_of, copy_graph, finish
from torch2rt.passes.repeated import CASTS, FILLS, MOVES, is_pointwise, name_of
from torch2rt.size_choices import extremes
from torch2rt.sizes import Symbols, expression, is_symbolic

MOST = 1 << 24  # elements of a mask that is looked at
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_FULL = {"full": 1, "full_like": 1, "new_full": 2}  # where the number is


@torch.inference_mode(False)
@torch.no_grad()
def recognise_causal(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that lets attention with a lower triangular mask, which depends on sizes alone, be causal attention."""
    target = torch.nn.functional.scaled_dot_product_attention
    calls = graph.graph.find_nodes(op="call_function", target=target)
    growing = Growing(graph)
    found = [place for place, node in enumerate(calls) if _is_causal(growing, node)]
    if not found:
        return graph
    seen = {user.name for place in found for user in calls[place].users if _is_chosen(growing, user, calls[place])}
    graph = copy_graph(graph)
    calls = graph.graph.find_nodes(op="call_function", target=target)
    for place in found:
        node = calls[place]
        arguments = {**dict(zip(_ATTENTION, node.args)), **node.kwargs, "attn_mask": None, "is_causal": True}
        node.args = tuple(arguments.pop(name) for name in _ATTENTION[:3])
        node.kwargs = arguments
        for user in [user for user in node.users if user.name in seen]:
            user.replace_all_uses_with(node)
    for node in reversed(graph.graph.nodes):  # masks that no call needs any more
        if node.op == "call_function" and not node.users:
            graph.graph.erase_node(node)
    return finish(graph)


def _is_causal(growing: Growing, node: Node) -> bool:
    arguments = {**dict(zip(_ATTENTION, node.args)), **node.kwargs}
    mask = arguments.get("attn_mask")
    if not isinstance(mask, Node) or mask.meta["val"].dim() < 2 or arguments.get("is_causal"):
        return False
    rows, columns = mask.meta["val"].shape[-2:]
    if not _is_same(rows, arguments["query"].meta["val"].shape[-2]):  # else the mask broadcasts
        return False
    if not _is_same(columns, arguments["key"].meta["val"].shape[-2]):
        return False
    tensor = growing.value(mask)
    if tensor is None or not tensor.numel():
        return False
    below = torch.ones(tensor.shape[-2:], dtype=torch.bool, device=tensor.device).tril()
    if tensor.dtype is torch.bool:
        return bool((tensor == below).all())
    if not tensor.is_floating_point():
        return False
    lowest = torch.finfo(tensor.dtype).min  # the softmax of it is exactly 0 beside a key that is seen
    return bool(torch.where(below, tensor == 0, tensor <= lowest).all())


def _is_chosen(growing: Growing, node: Node, attention: Node) -> bool:
    """Whether a call gives the attention's result for all queries, as each of them sees a key."""
    if node.target is not torch.where or len(node.args) != 3 or node.args[1] is not attention:
        return False
    seen = growing.value(node.args[0]) if isinstance(node.args[0], Node) else None
    ours, theirs = node.meta["val"], attention.meta["val"]
    same = ours.dtype == theirs.dtype and all(map(_is_same, ours.shape, theirs.shape))
    return same and seen is not None and bool(seen.all())


def _is_same(a: Any, b: Any) -> bool:
    return bool(expression(a) == expression(b))


class Growing:
    """The values of a graph that grow, at the largest sizes of the ranges."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph
        self.symbols: Symbols = graph_meta(graph).symbols
        self._values: dict[Node, torch.Tensor | None] = {}

    def value(self, node: Node) -> torch.Tensor | None:
        """A value at the largest sizes; `None` if it does not grow, or is not known to."""
        if node not in self._values:
            self._values[node] = self._found(node)
        return self._values[node]

    def _found(self, node: Node) -> torch.Tensor | None:
        recorded = node.meta.get("val")
        if node.op == "get_attr":
            constant = constant_of(self.graph, node)
            return None if constant is None or constant.layout is not torch.strided else constant.detach()
        if node.op != "call_function" or not isinstance(recorded, torch.Tensor):
            return None
        shape = [self._largest(size) for size in recorded.shape]
        if any(size is None for size in shape) or math.prod(shape) > MOST:
            return None
        try:
            result = self._call(node, shape)
        except (RuntimeError, TypeError, IndexError, ValueError):  # a form that is not known here
            return None
        if result is None or list(result.shape) != shape or result.dtype != recorded.dtype:
            return None
        return result

    def _largest(self, size: Any) -> Any:
        if not is_symbolic(size):
            return size
        expr = expression(size)
        return extremes(expr, self.symbols)[1] if expr.free_symbols <= self.symbols.keys() else None

    def _call(self, node: Node, shape: list[int]) -> torch.Tensor | None:
        name, recorded = name_of(node), node.meta["val"]
        fill = functools.partial(torch.full, shape, dtype=recorded.dtype, device=recorded.device)
        if name in FILLS:
            return fill(FILLS[name])
        if name in _FULL:
            number = node.kwargs.get("fill_value", node.args[_FULL[name]] if len(node.args) > _FULL[name] else None)
            return fill(number) if isinstance(number, (int, float)) else None
        if name == "arange":
            return _arange(node, shape[0])
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        values = {operand: self.value(operand) for operand in operands}
        if not operands or any(value is None for value in values.values()):
            return None
        first = values[operands[0]]
        assert first is not None
        given = operands[0].meta["val"].shape
        if name in ("expand", "expand_as", "broadcast_to"):
            return first.expand(shape)
        if name in ("view", "reshape", "unsqueeze", "squeeze") and not _is_moved(given, recorded.shape):
            return first.reshape(shape)
        if name == "getitem" and (chosen := self._chosen(node, first)) is not None:
            return chosen
        if name in ("cat", "concat", "concatenate"):
            return self._joined(node)
        if name == "cumsum":
            return torch.cumsum(first, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
        if name in ("getitem", "slice"):
            kept = _kept(node, len(given))
            return None if kept is None else first[tuple(kept)][tuple(slice(0, size) for size in shape)]
        if name in ("any", "amax"):
            return _of_the_first(node, first)
        if len(operands) < len(node.all_input_nodes):
            return None  # it computes with a size
        if name not in CASTS and name not in MOVES and name not in ("tril", "triu") and not is_pointwise(node, name):
            return None
        args, kwargs = (
            map_aggregate(a, lambda x: values[x] if isinstance(x, Node) else x) for a in (node.args, node.kwargs)
        )
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, torch.Tensor) else None

    def _chosen(self, node: Node, table: torch.Tensor) -> torch.Tensor | None:
        """What places that are counted from the front choose of a tensor, one for each of its dimensions."""
        places = [self.value(i) if isinstance(i, Node) else None for i in node.args[1]] if _is_tuple(node) else []
        known = [
            place for place in places if place is not None and place.dtype is torch.int64 and bool((place >= 0).all())
        ]
        return table[tuple(known)] if len(known) == len(places) == table.dim() else None

    def _joined(self, node: Node) -> torch.Tensor | None:
        """Tensors one after the other, of which all but the last have the same size for all sizes of the inputs."""
        parts: Any = node.args[0]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if any(is_symbolic(part.meta["val"].shape[dim]) for part in parts[:-1]):
            return None
        return torch.cat([self.value(part) for part in parts], dim)  # type: ignore[misc, arg-type]


def _is_tuple(node: Node) -> bool:
    return isinstance(node.args[1], (tuple, list))


def _arange(node: Node, count: int) -> torch.Tensor | None:
    """The numbers from a plain one on, by a plain step."""
    args = [*node.args]
    names = ("end",) if len(args) == 1 else ("start", "end", "step")
    given = {**dict(zip(names, args)), **node.kwargs}
    start, step, recorded = given.get("start", 0), given.get("step", 1), node.meta["val"]
    if not isinstance(start, int) or not isinstance(step, int) or recorded.dtype.is_floating_point:
        return None
    return torch.arange(count, dtype=recorded.dtype, device=recorded.device) * step + start


def _of_the_first(node: Node, value: torch.Tensor) -> torch.Tensor | None:
    """A maximum along the last dimension that the first element has already, so that it is the same for all lengths."""
    arguments = {**dict(zip(("input", "dim", "keepdim"), node.args)), **node.kwargs}
    dim, keepdim = arguments.get("dim"), arguments.get("keepdim", False)
    if dim not in (-1, value.dim() - 1, [-1], (-1,)):
        return None
    result, of_first = (x.amax(-1, keepdim=keepdim) for x in (value, value[..., :1]))
    return result if torch.equal(result, of_first) else None


def _is_moved(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether other things change between two shapes than where sizes of 1 stand."""
    sizes = [[expression(size) for size in shape if is_symbolic(size) or size != 1] for shape in (before, after)]
    return sizes[0] != sizes[1]


def _kept(node: Node, rank: int) -> list[Any] | None:
    """The index of a call that only adds dimensions and cuts off what is at either end; `None` for others.

    So much as it cuts off in front, for all sizes; its end follows from the size of the result.
    """
    if name_of(node) == "slice":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start")
        step = node.args[4] if len(node.args) > 4 else node.kwargs.get("step", 1)
        if not isinstance(dim, int) or not _is_front(start) or step != 1:
            return None
        kept = [slice(None)] * rank
        kept[dim] = slice(start, None)
        return kept
    given: Any = node.args[1]
    items = list(given) if isinstance(given, (tuple, list)) else [given]
    if any(item is not None and item is not Ellipsis and not isinstance(item, slice) for item in items):
        return None
    if any(isinstance(i, slice) and not (_is_front(i.start) and i.step in (None, 1)) for i in items):
        return None
    return [slice(item.start, None) if isinstance(item, slice) else item for item in items]


def _is_front(start: Any) -> bool:
    return start is None or isinstance(start, int) and start >= 0
