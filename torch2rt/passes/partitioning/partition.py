"""Partition: which calls of a traced graph go into TensorRT engines, and which stay torch calls.

Every call has a colour: TensorRT or torch. Its level is that of its arguments, one more where the colour changes on the
way. The calls of one level are one segment. A call's arguments are of its own level or of a lower one, so segments run
in the order of their levels and no cycle can arise, however the calls lie in the source. Independent branches of one
colour share a segment.

The graph is functional (tracing has written writes as new values), so that calls may move past each other. Calls that
draw random numbers, and custom operators, of which nothing is known, keep their order.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node
from torch.utils._pytree import tree_leaves

from torch2rt.backend.tensorrt import DTYPES
from torch2rt.callables import qualified_name
from torch2rt.graph import is_size
from torch2rt.passes.partitioning.effects import draws
from torch2rt.structure import bare_name

MAX_RANK = 8  # of TensorRT's tensors
NOT_COUNTED = frozenset(
    """
        getitem view reshape permute transpose flatten unflatten squeeze unsqueeze expand contiguous clone detach alias
        size select slice
    """.split()
)


@dataclass(frozen=True)
class Segment:
    """Calls of a graph that run together, in their order.

    - `is_torch`: whether they stay torch calls. `reasons`: why, for those that something is known of; else the reason
      is that a segment of TensorRT would have been too small.
    - `inputs`: the nodes outside whose values they take; `outputs`: those of its own that others take.
    """

    is_torch: bool
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    reasons: Mapping[Node, str]

    @property
    def calls(self) -> int:
        """How many calls it has, those that only look at a result not counted."""
        return sum(map(is_counted, self.nodes))


def partition(
    graph: torch.fx.GraphModule, refused: Mapping[Node, str], min_segment_calls: int = 1
) -> tuple[Segment, ...]:
    """The segments of a traced graph, in the order in which they run.

    - `refused`: the calls that must stay torch calls, and why.
    - `min_segment_calls`: the calls of a smaller TensorRT segment are torch calls, too; those that only look at a
      result in another shape do not count.

    >>> from torch2rt import trace
    >>> graph = trace(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()), [torch.ones(3)])
    >>> relu, tanh = graph.graph.find_nodes(op="call_function", target=torch.nn.functional.relu), None
    >>> [(s.is_torch, len(s.nodes)) for s in partition(graph, {relu[0]: "as asked"})]
    [(True, 1), (False, 1)]
    """
    nodes = [node for node in graph.graph.nodes if is_call(node)]
    reasons = dict(refused)
    torch_calls = {node for node in nodes if node in refused}
    while True:
        _close(nodes, torch_calls)
        levels = _levels(nodes, torch_calls)
        crossing = [node for node in nodes if node not in torch_calls and _crosses_badly(node, levels, torch_calls)]
        for node in crossing:
            reasons.setdefault(node, "a value of it must cross to another segment, and TensorRT has not its type")
        torch_calls.update(crossing)
        if crossing:
            continue
        counts = Counter(levels[node] for node in nodes if node not in torch_calls and is_counted(node))
        engines = {levels[node] for node in nodes if node not in torch_calls}
        small = min(engines, key=lambda level: (counts[level], level), default=None)
        if small is None or not torch_calls or counts[small] >= min_segment_calls:
            break
        torch_calls.update(node for node in nodes if levels[node] == small)
    return tuple(_segments(graph, nodes, levels, torch_calls, reasons))


def is_call(node: Node) -> bool:
    """Whether a node is a call that computes tensors: no constant, no arithmetic of sizes."""
    return node.op == "call_function" and not is_size(node)


def is_counted(node: Node) -> bool:
    """Whether a call computes something, and does not only look at a result in another way."""
    return getattr(node.target, "__name__", "").split(".")[0] not in NOT_COUNTED


def has_type(value: Any) -> bool:
    """Whether TensorRT has a tensor of this type."""
    return (
        not isinstance(value, torch.Tensor)
        or value.dtype in DTYPES
        and value.dim() <= MAX_RANK
        and value.layout is torch.strided
    )


def takes_inputs(graph: torch.fx.GraphModule) -> bool:
    """Whether TensorRT has the types of a graph's inputs."""
    return all(has_type(node.meta["val"]) for node in graph.graph.find_nodes(op="placeholder"))


def why_no_type(node: Node) -> str | None:
    """Why a call cannot be TensorRT's, if that is because of a type that it returns."""
    for value in tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor) and not value.is_complex() and not has_type(value):
            of_rank = f" of {value.dim()} dimensions" if value.dtype in DTYPES else ""
            return f"TensorRT has no {bare_name(value.dtype)}{of_rank}"
    return None


def describe_target(node: Node) -> str:
    """The function that a call is of, such as `torch.Tensor.add`: the module's own call, where that was opened."""
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    target: Any = node.meta.get("function", node.target)
    operators = [value for value in node.args[:1] if isinstance(value, torch._ops.OpOverload)]
    return qualified_name(next(iter(operators), target))  # type: ignore[arg-type]


def _close(nodes: Sequence[Node], torch_calls: set[Node]) -> None:
    """A call whose result is a tuple runs where its parts are taken: no tuple can cross."""
    for node in reversed(nodes):
        if node.target is operator.getitem and node in torch_calls:
            torch_calls.add(node.args[0])  # type: ignore[arg-type]
    for node in nodes:
        if node.target is operator.getitem and node.args[0] in torch_calls:
            torch_calls.add(node)


def _levels(nodes: Iterable[Node], torch_calls: set[Node]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    ordered: Node | None = None
    for node in nodes:
        is_torch = node in torch_calls
        before = [i for i in sources(node) if i in levels]
        if is_torch and draws(node):
            before, ordered = before + ([ordered] if ordered else []), node
        start = 0 if is_torch else 1
        levels[node] = max((levels[i] + ((i in torch_calls) != is_torch) for i in before), default=start)
    return levels


def sources(node: Node) -> Iterator[Node]:
    """The calls whose results a call takes, also those whose sizes it takes through arithmetic of sizes."""
    seen: set[Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if is_size(source):
            todo += source.all_input_nodes
        else:
            yield source


def _crosses_badly(node: Node, levels: Mapping[Node, int], torch_calls: set[Node]) -> bool:
    """Whether a call of an engine takes from, or gives to, another segment what TensorRT has no type for."""
    for source in node.all_input_nodes:
        is_outside = source.op == "placeholder" or (source in levels and levels[source] != levels[node])
        if is_outside and not has_type(source.meta.get("val")):
            return True
    if has_type(node.meta.get("val")):
        return False
    return any(user.op == "output" or (user in levels and levels[user] != levels[node]) for user in node.users)


def _segments(
    graph: torch.fx.GraphModule,
    nodes: list[Node],
    levels: Mapping[Node, int],
    torch_calls: set[Node],
    reasons: Mapping[Node, str],
) -> Iterator[Segment]:
    for level in sorted(set(levels.values())):
        own = [node for node in nodes if levels[node] == level]
        inside = set(own)
        inputs = dict.fromkeys(
            source
            for node in own
            for source in node.all_input_nodes
            if source not in inside and (source.op == "placeholder" or source in levels)
        )
        outputs = [node for node in own if "unbacked" in node.meta or any(user not in inside for user in node.users)]
        why = {node: reasons[node] for node in own if node in reasons}
        yield Segment(own[0] in torch_calls, tuple(own), tuple(inputs), tuple(outputs), why)
