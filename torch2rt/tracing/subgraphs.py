"""Functions that a module hands to torch to run under a condition, or any number of times.

`scope` traces one into the graph at hand, `subgraph` into a graph of its own, as the bodies of loops need. Either way
the function must only compute: what it writes to a tensor that it did not make would happen once, while tracing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from torch2rt.errors import ConversionError
from torch2rt.sizes import is_symbolic
from torch2rt.tracing.values import RecordingMode, Values


@dataclasses.dataclass
class Subgraph:
    """A function as a graph.

    `graph(*operands, *captured)` returns the function's tensors as a flat tuple. `captured` are the nodes of what the
    function takes from around it: tensors, constants and sizes. `results` are fake tensors in the place of what it
    returns, and `structure` is how they nest there.
    """

    graph: torch.fx.GraphModule
    captured: list[torch.fx.Node]
    results: list[torch.Tensor]
    structure: pytree.TreeSpec


def _values() -> Values:
    """The values of the trace that is under way in this thread."""
    modes = reversed(_get_current_function_mode_stack())
    return next(mode.values for mode in modes if isinstance(mode, RecordingMode))


@contextmanager
def scope() -> Iterator[None]:
    """Trace a function of the user's that may run never or often: it may write only to tensors that it makes."""
    values = _values()
    recorder = values.recorder
    before, recorder.open_calls = recorder.open_calls, []
    try:
        with values.storages.only_new_writable(), recorder.decisions.in_user_code():
            yield
    finally:
        recorder.open_calls = before


def subgraph(function: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Subgraph:
    """Trace `function(*operands)` into a graph of its own; the operands' values do not enter it."""
    values = _values()
    last = next(iter(reversed(values.recorder.graph.nodes)))
    fakes = [values.operand(x) for x in operands]
    with scope():
        leaves, structure = pytree.tree_flatten(function(*fakes))
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise ConversionError("a function that it runs returns what is not a tensor")
    results = [values.argument(leaf) for leaf in leaves]
    graph, captured = _cut(values, last, len(fakes), results)
    return Subgraph(graph, captured, leaves, structure)


def run(target: Callable[..., Any], *args: Any, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Record one call, whose arguments may be graphs and nodes, and whose results have the types of `like`."""
    values = _values()
    results = [values.recorder.new_fake(x) for x in like]
    node = values.recorder.node(target, values.argument(args), {}, results)
    values.bind(results, node, (target, (), {}))
    return results


def _cut(
    values: Values, last: torch.fx.Node, operands: int, results: Sequence[torch.fx.Node]
) -> tuple[torch.fx.GraphModule, list[torch.fx.Node]]:
    """Move what was recorded after a node, beginning with placeholders, into a graph that returns `results`.

    Sizes stay where they are: they are the same in every run, and used again by what follows.
    """
    recorded: list[torch.fx.Node] = []
    node = last.next
    while node.op != "root":
        recorded.append(node)
        node = node.next
    moved = recorded[:operands] + [n for n in recorded[operands:] if "val" in n.meta and not is_symbolic(n.meta["val"])]
    inside = set(moved)
    outside = dict.fromkeys(a for n in (*moved, *results) for a in (*n.all_input_nodes, n) if a not in inside)
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for index, node in enumerate((*moved[:operands], *outside)):
        copies[node] = graph.placeholder(f"operand_{index}")
        copies[node].meta.update(node.meta)
    for node in moved[operands:]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    for node in reversed(moved):
        values.recorder.graph.erase_node(node)
    values.storages.forget(inside)
    return torch.fx.GraphModule(torch.nn.Module(), graph), list(outside)
