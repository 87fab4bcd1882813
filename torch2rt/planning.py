"""What a conversion with fallback would do: which calls run where, and what share of the work. Nothing is built."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Node, map_aggregate
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from torch2rt.conversion.described import describe_segments
from torch2rt.conversion.fallback import Choice, fitting, refused_calls
from torch2rt.conversion.partitioner import Partitioner
from torch2rt.errors import UnsupportedError
from torch2rt.graph import sizes_at_opt
from torch2rt.lowering import lower
from torch2rt.passes.order import chosen, run
from torch2rt.passes.partitioning.partition import takes_inputs
from torch2rt.passes.partitioning.split import Program
from torch2rt.precision_plan import PrecisionPlan, plan_precision, traced_graphs
from torch2rt.tracing.trace import trace


@dataclasses.dataclass(frozen=True)
class PlannedSegment:
    """One segment: where it runs, and what is in it.

    - `where`: `"TensorRT"` or `"torch"`. `text`: the line about it, with the reasons of torch segments.
    - `calls`: how many it has. `modules`: the paths of the modules whose calls they are.
    - `bytes`: what comes in from other segments at the opt shapes. `flops`: its floating-point operations there, those
      of products and convolutions.
    """

    where: str
    text: str
    calls: int
    modules: Sequence[str]
    bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `torch2rt(..., fallback=True)` would do: the segments in the order in which they run.

    It prints as text; `to_json()` makes JSON values of it, and `html()` a page with the tree of the modules, coloured
    by where they run.
    """

    segments: Sequence[PlannedSegment]
    by_module: Mapping[str, Mapping[str, int]]  # of each module's own calls, how many run where
    precision: PrecisionPlan | None = None  # what computes in which type, where that is asked for

    def _of(self, where: str) -> list[PlannedSegment]:
        return [segment for segment in self.segments if segment.where == where]

    @property
    def share_of_calls(self) -> float:
        """The share of the calls that run in TensorRT, from 0 to 1."""
        return _share(*(sum(s.calls for s in some) for some in (self._of("TensorRT"), self.segments)))

    @property
    def share_of_flops(self) -> float:
        """The share of the floating-point operations that run in TensorRT, from 0 to 1."""
        return _share(*(sum(s.flops for s in some) for some in (self._of("TensorRT"), self.segments)))

    def totals(self) -> str:
        """How many segments there are of each kind, and their shares."""
        ours, theirs = len(self._of("TensorRT")), len(self._of("torch"))
        crossing = sum(segment.bytes for segment in self.segments)
        return (
            f"{ours} TensorRT segment{'s' * (ours != 1)} with {self.share_of_calls:.0%} of the calls and "
            f"{self.share_of_flops:.1%} of the floating-point operations, {theirs} torch segment{'s' * (theirs != 1)}; "
            f"{_bytes(crossing)} cross between them"
        )

    def __str__(self) -> str:
        total = sum(segment.flops for segment in self.segments)
        lines = [self.totals()]
        for segment in self.segments:
            share = _share(segment.flops, total)
            lines.append(f"{segment.text}\n    {share:.1%} of the operations, {_bytes(segment.bytes)} come in")
        if self.precision is not None:
            lines.append(str(self.precision))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**dataclasses.asdict(self), "calls": self.share_of_calls, "flops": self.share_of_flops}

    def html(self) -> str:
        """A page that needs no other file: the totals, the segments, and the tree of the modules."""
        items = "\n".join(f"<li>{html.escape(segment.text)}</li>" for segment in self.segments)
        return _PAGE.format(totals=html.escape(self.totals()), segments=items, tree=_tree(self.by_module))


def plan(
    module: torch.nn.Module | torch.export.ExportedProgram,
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    min_shapes: Any = None,
    opt_shapes: Any = None,
    max_shapes: Any = None,
    max_batch_size: int | None = None,
    multiple_of: Any = None,
    dynamic_shapes: Any = None,
    torch_executed: Sequence[Any] = (),
    min_segment_calls: int | None = None,
    max_sizes: int | tuple[int, int] | None = None,
    nan: str = "keep",
    float64: str = "float32",
    progress: bool | None = None,
    **precision: Any,
) -> Plan:
    """What `torch2rt(module, inputs, fallback=True, ...)` would leave to torch, without building an engine.

    The arguments are those of `torch2rt.torch2rt`. With those about precision, such as `precision="fp16"`, the plan's
    `precision` says what computes in which type, and why. A module that does something else for some of the sizes has a
    segment for each of the engines that serve them together. Where a segment's engine turns out not to be buildable, a
    conversion leaves more to torch than the plan says.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Dropout()).train()
    >>> [(segment.where, segment.calls) for segment in plan(model, [torch.randn(2, 3)], min_segment_calls=1).segments]
    [('TensorRT', 2), ('torch', 1)]
    """
    choice = Choice.of(True, torch_executed, min_segment_calls, max_sizes)
    assert choice is not None
    ordered = chosen(None, float64)
    asked = dict(
        kwargs=kwargs,
        min_shapes=min_shapes,
        opt_shapes=opt_shapes,
        max_shapes=max_shapes,
        max_batch_size=max_batch_size,
        multiple_of=multiple_of,
        dynamic_shapes=dynamic_shapes,
        progress=progress,
    )
    types = (
        plan_precision(module, inputs, choice, **asked, nan=nan, float64=float64, **precision) if precision else None
    )
    plans = []
    for graph in traced_graphs(module, inputs, **asked, fallback=True):
        refused: dict[Node, str] = {}
        fits = ordered
        try:
            if takes_inputs(graph):
                lower(run(graph, ordered), nan=nan, passes=[])
        except UnsupportedError as error:
            fits = fitting(graph, ordered)
            refused = refused_calls(graph, error, fits)
        refused |= choice.calls(graph, module if isinstance(module, torch.nn.Module) else None)
        partitioner = Partitioner(graph, refused, fits, nan, choice.min_segment_calls, choice.max_sizes)
        plans.append(plan_of(graph, partitioner.lowered()))
    if len(plans) > 1 and any(segment.where == "torch" for one in plans for segment in one.segments):
        trace(module, inputs, **asked, fallback=True)  # whose error says that parts of several engines are refused
    by_module: dict[str, Mapping[str, int]] = {}
    for one in plans:
        by_module |= one.by_module
    segments = [segment for one in plans for segment in one.segments]
    if len(plans) > 1:
        names = [f"engine {number} of {len(plans)}" for number, one in enumerate(plans, 1) for _ in one.segments]
        segments = [
            dataclasses.replace(segment, text=f"{name}, {segment.text}")
            for name, segment in zip(names, segments, strict=True)
        ]
    return Plan(segments, by_module, types)


def plan_of(graph: torch.fx.GraphModule, program: Program) -> Plan:
    """The plan of a graph that was cut into pieces."""
    sizes = _Sizes(graph)
    texts = describe_segments([piece.segment for piece in program.pieces])
    segments: list[PlannedSegment] = []
    by_module: dict[str, dict[str, int]] = {}
    for piece, text in zip(program.pieces, texts, strict=True):
        segment = piece.segment
        where = "torch" if segment.is_torch else "TensorRT"
        modules = list(dict.fromkeys(node.meta["module"] for node in segment.nodes))
        for node in segment.nodes:
            counts = by_module.setdefault(node.meta["module"], {"TensorRT": 0, "torch": 0})
            counts[where] += 1
        crossing = sum(sizes.bytes_of(node) for node in segment.inputs if node.op != "placeholder")
        flops = sum(map(sizes.flops_of, segment.nodes))
        segments.append(PlannedSegment(where, text, segment.calls, modules, crossing, flops))
    return Plan(segments, by_module)


class _Sizes:
    """What the calls of a graph take and cost at the opt shapes."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.at = sizes_at_opt(graph)
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def bytes_of(self, node: Node) -> int:
        tensors = [t for t in tree_leaves(node.meta["val"]) if isinstance(t, torch.Tensor)]
        return sum(math.prod(map(self.at, t.shape)) * t.element_size() for t in tensors)

    def flops_of(self, node: Node) -> int:
        """What torch counts for one call; 0 for calls that it cannot make by itself."""

        def given(item: Any) -> Any:
            value = item.meta["val"] if isinstance(item, Node) else item
            return map_aggregate(value, self._empty)

        with contextlib.suppress(Exception), self.fake_mode, FlopCounterMode(display=False) as counter:
            node.target(*map_aggregate(node.args, given), **map_aggregate(node.kwargs, given))  # type: ignore[operator]
            return int(counter.get_total_flops())
        return 0

    def _empty(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return self.at(value)
        return torch.empty([self.at(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _bytes(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, 3)
    return f"{count / 1024**power:.{int(power > 0)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


# The page ------------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html><meta charset="utf-8"><title>torch2rt plan</title>
<style>body{{font:14px sans-serif;margin:2em}} details{{margin-left:1.2em}} .leaf{{margin-left:2.4em}}
b{{display:inline-block;width:7em;height:.8em;border:1px solid #888;margin-right:.6em}}</style>
<h1>{totals}</h1><p>Green runs in TensorRT, orange in torch.</p><ol start="0">
{segments}
</ol>
{tree}
"""


def _tree(by_module: Mapping[str, Mapping[str, int]]) -> str:
    """The modules with calls, nested as their paths are, each with the share of its calls in TensorRT."""
    children: dict[str, dict[str, None]] = {}
    for path in by_module:
        while path:
            parent = path.rpartition(".")[0]
            children.setdefault(parent, {})[path] = None
            path = parent
    return "\n".join(_branch("", children, by_module))


def _branch(
    path: str, children: Mapping[str, Mapping[str, None]], by_module: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    inside = [m for m in by_module if m == path or not path or m.startswith(f"{path}.")]
    counts = [sum(by_module[m][where] for m in inside) for where in ("TensorRT", "torch")]
    share = 100 * _share(counts[0], sum(counts))
    bar = f'<b style="background:linear-gradient(90deg,#5b5 {share:.0f}%,#f93 {share:.0f}%)"></b>'
    title = f"{bar}{html.escape(path.rpartition('.')[2] or 'module')}: {counts[0]} of {sum(counts)} calls"
    if path not in children:
        yield f'<div class="leaf">{title}</div>'
        return
    yield f"<details{' open' if counts[1] or not path else ''}><summary>{title}</summary>"
    for child in children[path]:
        yield from _branch(child, children, by_module)
    yield "</details>"
