"""What TensorRT cannot take stays torch: a traced graph as segments, each an engine or torch calls."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.arguments import whole_number
from torch2rt.callables import qualified_name
from torch2rt.conversion import measuring
from torch2rt.conversion.described import count, describe_segments
from torch2rt.conversion.earlier import Earlier, Refused
from torch2rt.conversion.growing import Larger
from torch2rt.conversion.partitioner import Partitioner, has_unbacked, key_of, torch_segment
from torch2rt.debug.verify import Verifying
from torch2rt.engine import engine_cache
from torch2rt.engine.build import build
from torch2rt.engine.report import Report
from torch2rt.errors import InputError, UnsupportedError
from torch2rt.graph import graph_meta, place_of
from torch2rt.lowering import lower
from torch2rt.lowering_errors import NO_CONVERTER
from torch2rt.passes.float64 import NARROW, narrow_float64
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.effects import draws_numbers, writes_unseen
from torch2rt.passes.partitioning.partition import describe_target, is_call, partition, takes_inputs, why_no_type
from torch2rt.passes.partitioning.split import MAX_SIZE, Program
from torch2rt.python_calls import DrawsFrom
from torch2rt.registry import load
from torch2rt.runtime.partitioned.schedule import Schedule
from torch2rt.runtime.partitioned.segments import PartitionedModule, network_of
from torch2rt.tracing.sizes.held_claims import hold
from torch2rt.tracing.source_lines import modules_of

MIN_SEGMENT_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a user asks of a partition, checked.

    - `torch_executed`: functions, paths of modules, and classes of modules whose calls stay torch calls.
    - `min_segment_calls`: smaller TensorRT segments become torch calls.
    - `max_sizes`: the largest size that engines are built for where a size depends on values; `most`: the largest that
      they are built for again where such a size is larger, `None` for any.
    - `measures`: whether segments are measured, and the slower engines become torch calls.
    - `compiles`: whether torch's compiler makes kernels of torch segments; `None`: where that was measured to pay.
    - `graphs`: whether calls will be replayed as CUDA graphs, and are measured so.
    """

    torch_executed: Sequence[Any] = ()
    min_segment_calls: int = MIN_SEGMENT_CALLS
    max_sizes: int = MAX_SIZE
    most: int | None = None
    measures: bool = False
    compiles: bool | None = False
    graphs: bool = False

    @classmethod
    def of(
        cls,
        fallback: bool | str,
        torch_executed: Any,
        min_segment_calls: int | None,
        max_sizes: int | tuple[int, int] | None,
        torch_segments: str | None = None,
        graphs: bool = False,
    ) -> Choice | None:
        """`None` without fallback; raises `InputError` for what does not fit together."""
        if not isinstance(fallback, bool) and fallback != "measure":
            raise InputError(f"{fallback=} is none of True, False and 'measure'.")
        if torch_segments not in (None, "eager", "compile"):
            raise InputError(f"{torch_segments=} is none of 'eager' and 'compile'.")
        if isinstance(torch_executed, str) or not isinstance(torch_executed, Iterable):
            raise InputError(f"{torch_executed=} is not a list of functions, module paths and module classes.")
        executed = list(torch_executed)
        for item in executed:
            if not (isinstance(item, str) or callable(item)):
                raise InputError(f"{item!r} in torch_executed is no function, no module path and no module class.")
        least = whole_number("min_segment_calls", min_segment_calls, 1)
        first, most = _bounds(max_sizes)
        if not fallback and (executed or (least, max_sizes, torch_segments) != (None, None, None)):
            raise InputError("torch_executed, min_segment_calls, max_sizes and torch_segments need fallback=True.")
        if not fallback:
            return None
        if fallback == "measure":
            measuring.check_measurable()
        least = MIN_SEGMENT_CALLS if least is None else least
        measures = fallback == "measure"
        compiles = None if measures and torch_segments is None else torch_segments == "compile"
        return cls(executed, least, first, most, measures, compiles, graphs)

    @property
    def ways(self) -> Sequence[bool]:
        """Whether torch's compiler makes the kernels, of each way that is measured beside an engine."""
        return (False, True) if self.compiles is None else (self.compiles,)

    def calls(self, graph: torch.fx.GraphModule, module: torch.nn.Module | None) -> Refused:
        """The calls that `torch_executed` speaks of."""
        found: Refused = {}
        for item in self.torch_executed:
            paths = _paths(item, module)
            chosen = [node for node in graph.graph.nodes if is_call(node) and _is_of(node, item, paths)]
            if not chosen:
                name = item if isinstance(item, str) else qualified_name(item)
                raise InputError(f"torch_executed names {name}, which none of the traced calls is of.")
            found.update(dict.fromkeys(chosen, "torch_executed names it"))
        return found

    def earlier(
        self,
        graph: torch.fx.GraphModule,
        module: torch.nn.Module | None,
        passes: Sequence[Pass],
        nan: str,
        options: Mapping[str, Any],
    ) -> Earlier:
        """What is known of a graph in such segments from an earlier conversion; nothing where they are measured."""
        if self.measures:
            return Earlier(graph, None)
        nodes = list(graph.graph.nodes)
        executed = [nodes.index(node) for node in self.calls(graph, module)]
        return Earlier.of(graph, passes, nan, options, executed, self.min_segment_calls, self.max_sizes)


def why_not_whole(graph: torch.fx.GraphModule, passes: Sequence[Pass], nan: str) -> UnsupportedError | None:
    """What stands against one engine for a graph."""
    try:
        if takes_inputs(graph):
            lower(run(graph, passes), nan=nan, passes=[])
    except UnsupportedError as error:
        return error
    return None


def _bounds(max_sizes: Any) -> tuple[int, int | None]:
    """The sizes that engines are built for at first and at most; one number is both."""
    if max_sizes is None:
        return MAX_SIZE, None
    pair = max_sizes if isinstance(max_sizes, (tuple, list)) else (max_sizes, max_sizes)
    if len(pair) != 2 or None in pair:
        raise InputError(f"{max_sizes=} is no number, and no pair of the first and the largest.")
    first = whole_number("max_sizes", pair[0], 1) or 1
    return first, whole_number("max_sizes", pair[1], first)


def _paths(item: Any, module: torch.nn.Module | None) -> set[str]:
    """The paths of the modules that an item of `torch_executed` is about."""
    if isinstance(item, str):
        return {item}
    if isinstance(item, type) and issubclass(item, torch.nn.Module) and module is not None:
        return {path for path, m in modules_of(module).items() if isinstance(m, item)}
    return set()


def _is_of(node: Node, item: Any, paths: set[str]) -> bool:
    path = node.meta["module"]
    if any(path == p or not p or path.startswith(f"{p}.") for p in paths):
        return True
    return not isinstance(item, str) and item in (node.target, node.meta.get("function"))


# Which calls stay torch's --------------------------------------------------------------------------------------------


def refused_calls(graph: torch.fx.GraphModule, error: UnsupportedError | None, passes: Sequence[Pass]) -> Refused:
    """The calls that lowering has refused, and those whose results have types that TensorRT has not."""
    registry = load()
    calls = list(filter(is_call, graph.graph.nodes))
    of_values = [node for node in calls if "unbacked" in node.meta]
    # what was said of the whole graph is not true of segments, which are given the sizes that depend on values
    reasons = error.calls if error is not None and not of_values else {}
    found: Refused = dict.fromkeys(of_values, "the size of its result depends on values")
    for node in calls:
        if node in found:
            continue
        if of_values and registry.find(node.target) is None and node.target is not operator.getitem:  # type: ignore[arg-type]
            found[node] = DrawsFrom.refusal if draws_numbers(node) else getattr(node.target, "refusal", NO_CONVERTER)
        elif node.name in reasons:
            found[node] = reasons[node.name]
        elif (reason := why_no_type(node)) is not None:
            value = node.meta["val"]
            narrowed = narrow_float64 in passes and isinstance(value, torch.Tensor) and value.dtype in NARROW
            if not narrowed:
                found[node] = reason
    return found


def fitting(graph: torch.fx.GraphModule, passes: Sequence[Pass]) -> list[Pass]:
    """The passes, without the one that narrows float64 where some value must stay float64: then all of them do."""
    refuses = narrow_float64 in passes and graph_meta(narrow_float64(graph)).refusals
    return [pass_ for pass_ in passes if not (refuses and pass_ is narrow_float64)]


def torch_calls(
    module: torch.nn.Module,
    graph: torch.fx.GraphModule,
    choice: Choice,
    error: UnsupportedError | None,
    passes: Sequence[Pass],
    nan: str,
) -> set[str]:
    """The names of the calls that stay torch calls, as far as lowering says."""
    refused = {**refused_calls(graph, error, passes), **choice.calls(graph, module)}
    program = Partitioner(graph, refused, passes, nan, choice.min_segment_calls, choice.max_sizes).lowered()
    return {node.name for piece in program.pieces if piece.segment.is_torch for node in piece.segment.nodes}


# The module ----------------------------------------------------------------------------------------------------------


def convert_in_segments(
    module: torch.nn.Module,
    graph: torch.fx.GraphModule,
    tensors: Sequence[torch.Tensor],
    choice: Choice,
    error: UnsupportedError | None,
    earlier: Earlier,
    *,
    passes: Sequence[Pass],
    nan: str,
    verify: bool | str,
    options: Mapping[str, Any],
    progress: bool | None,
    stage: Callable[..., Any],
    slow: measuring.Measured | None = None,
) -> PartitionedModule:
    """The module of a traced graph whose refused calls stay torch calls.

    `error` is what lowering has refused of the whole graph, and `earlier` what is known from before. `slow`: that torch
    makes all calls faster, as was measured. The other arguments are those of `torch2rt.torch2rt`.
    """
    meta = graph_meta(graph)
    passes = fitting(graph, passes)
    if unseen := [node for node in graph.graph.nodes if node.op == "call_function" and writes_unseen(node)]:
        raise UnsupportedError(
            f"{place_of(unseen[0]).strip()}: {describe_target(unseen[0])} updates running statistics. Call .eval() on "
            'the module, or convert it with state="write".'
        ) from error
    interface = hold(meta.assumed.decisions, meta.assumed.ranges, meta.interface)
    refused = earlier.refused or {**refused_calls(graph, error, passes), **choice.calls(graph, module)}
    if slow is not None:
        refused = {**dict.fromkeys(filter(is_call, graph.graph.nodes), slow.reason), **refused}
    find = functools.partial(engine_cache.file_of, options=options, nan=nan)
    least = choice.min_segment_calls
    partitioner = Partitioner(graph, dict(refused), passes, nan, least, choice.max_sizes, find)
    program = stage("lower", partitioner.lowered)
    make, quiet = functools.partial(build, **options, progress=progress), {**options, "progress": False}
    program = stage("build", partitioner.build, program, make)
    device = _device(graph)
    if slow is not None and slow.compiled:
        partitioner.compiled.update(graph.graph.nodes)
    elif slow is None and choice.measures:
        program = partitioner.without_slow(program, make, device, choice.ways, choice.graphs)
    pieces = program.pieces
    eager = {
        index: torch_segment(piece, device)
        for index, piece in enumerate(pieces)
        if not piece.segment.is_torch and has_unbacked(piece)
    }
    is_known = earlier.refused is not None and not partitioner.networks and earlier.is_verified(verify)
    networks = [] if is_known else [partitioner.network(piece) for piece in pieces if not piece.segment.is_torch]
    segments = [
        torch_segment(piece, device, bool(choice.compiles) or not partitioner.compiled.isdisjoint(piece.segment.nodes))
        if piece.segment.is_torch
        else partitioner.segment(piece)
        for piece in pieces
    ]
    needs = [text for _, text in (*interface.constraints, *program.checks)]
    report = Report(needs=list(dict.fromkeys(filter(None, needs))))
    report.segments = describe_segments([piece.segment for piece in pieces])
    timed = {i: partitioner.measured.get(key_of(piece)) for i, piece in enumerate(pieces) if not piece.segment.is_torch}
    report.measured = [f"segment {index}: {times}" for index, times in timed.items() if times is not None]
    report.assumptions = list(dict.fromkeys(text for network in networks for text in network.assumptions))
    model = PartitionedModule(segments, schedule_of(program), interface, report, eager=eager, make_network=network_of)
    if is_known and earlier.report is not None:
        earlier.tell(report)
    else:
        verifying = Verifying(module, graph, network_of(model), tensors, verify, tf32=options["tf32"], passes=passes)
        verifying.finish(model)
        partitioner.keep()
        earlier.keep(partitioner.refused, report)
    if eager:  # from now on: verification makes up values, of which sizes may be larger than a user's
        own = [piece.segment for piece in program.pieces]
        again = functools.partial(build, **quiet)
        larger = Larger(graph, own, passes, nan, choice.max_sizes, choice.most, again, verify, options["tf32"])
        model.growth.is_bound, model.growth.make = choice.max_sizes == choice.most, larger
    return model


def in_torch(
    graph: torch.fx.GraphModule, choice: Choice, passes: Sequence[Pass], nan: str, compiles: bool
) -> PartitionedModule:
    """The module of a traced graph with torch calls alone, to be measured."""
    calls = dict.fromkeys(filter(is_call, graph.graph.nodes), "")
    program = Partitioner(graph, calls, passes, nan, choice.min_segment_calls, choice.max_sizes).lowered()
    segments = [torch_segment(piece, _device(graph), compiles) for piece in program.pieces]
    return PartitionedModule(segments, schedule_of(program), graph_meta(graph).interface)


def _device(graph: torch.fx.GraphModule) -> torch.device:
    return next((node.meta["val"].device for node in graph.graph.find_nodes(op="placeholder")), torch.device("cpu"))


def schedule_of(program: Program) -> Schedule:
    """A program as what a `PartitionedModule` goes by."""
    inputs = [piece.inputs for piece in program.pieces]
    outputs = [piece.outputs for piece in program.pieces]
    return Schedule.of(inputs, outputs, program.results, program.slots, program.checks)


def plan_in_words(graph: torch.fx.GraphModule, error: UnsupportedError, passes: Sequence[Pass]) -> str:
    """The sentence about what `fallback=True` would do, for the end of an error."""
    refused = refused_calls(graph, error, fitting(graph, passes))
    segments = partition(graph, refused, MIN_SEGMENT_CALLS)
    ours = [segment for segment in segments if not segment.is_torch]
    theirs = [segment for segment in segments if segment.is_torch]
    total = sum(segment.calls for segment in segments)
    share = 100 * sum(segment.calls for segment in ours) // max(total, 1)
    places = list(dict.fromkeys(f"{describe_target(n)} at {n.meta['source']}" for s in theirs for n in s.reasons))
    shown = ", ".join(places[:3]) + (f" and {len(places) - 3} others" if len(places) > 3 else "")
    return (
        f"With fallback=True: {count(len(ours), 'TensorRT segment')} with {share} % of the calls, "
        f"{count(len(theirs), 'torch segment')}" + (f" ({shown})." if shown else ".")
    )
