"""What TensorRT cannot take stays torch: a traced graph as segments, each an engine or torch calls."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import Node

from torch2rt.arguments import whole_number
from torch2rt.callables import qualified_name
from torch2rt.conversion import measuring
from torch2rt.conversion.described import count, describe_segments
from torch2rt.conversion.growing import Larger
from torch2rt.debug.verify import Verifying
from torch2rt.engine.build import build
from torch2rt.engine.engine import Engine
from torch2rt.engine.report import Report
from torch2rt.errors import BuildError, ConversionError, InputError, UnsupportedError
from torch2rt.graph import graph_meta, place_of
from torch2rt.lowering import lower
from torch2rt.lowering_errors import NO_CONVERTER
from torch2rt.network import Network
from torch2rt.passes.copies import without_gpu_memory
from torch2rt.passes.float64 import NARROW, narrow_float64
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.effects import draws, writes_unseen
from torch2rt.passes.partitioning.partition import describe_target, is_call, partition, why_no_type
from torch2rt.passes.partitioning.split import MAX_SIZE, Piece, Program, split
from torch2rt.registry import load
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.reference import PartitionedNetwork
from torch2rt.runtime.partitioned.schedule import Schedule
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.partitioned.torch_segment import TorchSegment
from torch2rt.sizes import is_symbolic
from torch2rt.tracing.sizes.guards import hold

MIN_SEGMENT_CALLS = 3
Refused = dict[Node, str]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a user asks of a partition, checked.

    - `torch_executed`: functions, paths of modules, and classes of modules whose calls stay torch calls.
    - `min_segment_calls`: smaller TensorRT segments become torch calls.
    - `max_sizes`: the largest size that engines are built for where a size depends on values; `most`: the largest that
      they are built for again where such a size is larger, `None` for any.
    - `measures`: whether segments are measured, and the slower engines become torch calls.
    - `compiles`: whether torch's compiler makes kernels of torch segments.
    """

    torch_executed: Sequence[Any] = ()
    min_segment_calls: int = MIN_SEGMENT_CALLS
    max_sizes: int = MAX_SIZE
    most: int | None = None
    measures: bool = False
    compiles: bool = False

    @classmethod
    def of(
        cls,
        fallback: bool | str,
        torch_executed: Any,
        min_segment_calls: int | None,
        max_sizes: int | tuple[int, int] | None,
        torch_segments: str | None = None,
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
        return cls(executed, least, first, most, fallback == "measure", torch_segments == "compile")

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
        return {path for path, m in module.named_modules() if isinstance(m, item)}
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
            found[node] = NO_CONVERTER
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


@dataclasses.dataclass
class Partitioner:
    """Finds segments of a graph whose engines can be built.

    `parts` are what the pieces of `program` were lowered to, `None` for torch; `assumptions` those of all networks.
    """

    graph: torch.fx.GraphModule
    refused: Refused
    passes: Sequence[Pass]
    nan: str
    min_segment_calls: int
    max_size: int = MAX_SIZE

    def __post_init__(self) -> None:
        self.measured: set[tuple[str, ...]] = set()
        self.networks: dict[tuple[str, ...], Network] = {}
        self.engines: dict[tuple[str, ...], Engine] = {}

    def lowered(self) -> Program:
        """The segments, once each of TensorRT's can be lowered."""
        while True:
            segments = partition(self.graph, self.refused, self.min_segment_calls)
            program = split(self.graph, segments, self.max_size)
            found: Refused = {}
            for piece in program.pieces:
                if not piece.segment.is_torch:
                    found.update(self._lower(piece))
            if not found:
                return program
            self.refused.update(found)

    def _lower(self, piece: Piece) -> Refused:
        """Lower a piece, once; returns the calls that cannot be."""
        key, nodes = _key(piece), piece.segment.nodes
        if key in self.networks:
            return {}
        if not piece.inputs:
            return dict.fromkeys(nodes, "it depends on no input")
        try:
            ready = run(piece.graph, self.passes)
            self.networks[key] = lower(ready, nan=self.nan, passes=[])
            self.networks[key].keep_graphs(*without_gpu_memory(piece.graph, ready))
        except UnsupportedError as error:
            named = {node: error.calls[node.name] for node in nodes if node.name in error.calls}
            return named or dict.fromkeys(nodes, str(error))
        except ConversionError as error:
            return dict.fromkeys(nodes, str(error))
        return {}

    def build(self, program: Program, build: Callable[[Network], Engine]) -> Program:
        """Build the engines; a segment that TensorRT cannot build becomes torch calls, whence the other program."""
        while True:
            for piece in program.pieces:
                if piece.segment.is_torch or (key := _key(piece)) in self.engines:
                    continue
                try:
                    self.engines[key] = build(self.networks[key])
                except BuildError as error:
                    self.refused.update(dict.fromkeys(piece.segment.nodes, f"its segment could not be built: {error}"))
                    program = self.lowered()
                    break
            else:
                return program

    def without_slow(
        self, program: Program, build: Callable[[Network], Engine], device: Any, compiles: bool
    ) -> Program:
        """The program in which torch makes the calls of engines that were measured to be slower."""
        while True:
            slow: Refused = {}
            for piece in program.pieces:
                if piece.segment.is_torch or (key := _key(piece)) in self.measured:
                    continue
                self.measured.add(key)
                tensors = measuring.examples(graph_meta(piece.graph).interface, device)
                engine, calls = TRTModule(self.engines[key]), torch_segment(piece, device, compiles)
                if (reason := measuring.faster_in_torch(engine, calls, tensors)) is not None:
                    slow.update(dict.fromkeys(piece.segment.nodes, reason))
            if not slow:
                return program
            self.refused.update(slow)
            program = self.build(self.lowered(), build)


def _key(piece: Piece) -> tuple[str, ...]:
    """What tells one TensorRT segment of a graph from another."""
    segment = piece.segment
    return tuple(node.name for node in (*segment.nodes, *segment.outputs))


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
    *,
    passes: Sequence[Pass],
    nan: str,
    verify: bool | str,
    options: Mapping[str, Any],
    progress: bool | None,
    stage: Callable[..., Any],
) -> PartitionedModule:
    """The module of a traced graph whose refused calls stay torch calls.

    `error` is what lowering has refused of the whole graph. The other arguments are those of `torch2rt.torch2rt`.
    """
    meta = graph_meta(graph)
    passes = fitting(graph, passes)
    if unseen := [node for node in graph.graph.nodes if node.op == "call_function" and writes_unseen(node)]:
        raise UnsupportedError(
            f"{place_of(unseen[0]).strip()}: {describe_target(unseen[0])} updates running statistics. Call .eval() on "
            'the module, or convert it with state="write".'
        ) from error
    interface = hold(meta.assumed.decisions, meta.assumed.ranges, meta.interface)
    refused = {**refused_calls(graph, error, passes), **choice.calls(graph, module)}
    partitioner = Partitioner(graph, refused, passes, nan, choice.min_segment_calls, choice.max_sizes)
    program = stage("lower", partitioner.lowered)
    make, quiet = functools.partial(build, **options, progress=progress), {**options, "progress": False}
    program = stage("build", partitioner.build, program, make)
    device = next((node.meta["val"].device for node in graph.graph.find_nodes(op="placeholder")), torch.device("cpu"))
    if choice.measures:
        program = partitioner.without_slow(program, make, device, choice.compiles)
    parts: list[Any] = [
        torch_segment(piece, device, choice.compiles) if piece.segment.is_torch else partitioner.networks[_key(piece)]
        for piece in program.pieces
    ]
    assumptions = list(dict.fromkeys(a for p in parts if isinstance(p, Network) for a in p.assumptions))
    eager = {
        index: torch_segment(piece, device)
        for index, piece in enumerate(program.pieces)
        if not piece.segment.is_torch and has_unbacked(piece)
    }
    network = PartitionedNetwork(parts, schedule_of(program), interface, assumptions, eager)
    report = Report(
        assumptions=list(assumptions),
        needs=[text for _, text in interface.constraints],
        segments=describe_segments([piece.segment for piece in program.pieces]),
    )
    segments = [
        part if piece.segment.is_torch else TRTModule(partitioner.engines[_key(piece)], part)
        for piece, part in zip(program.pieces, parts, strict=True)
    ]
    model = PartitionedModule(segments, network.schedule, interface, report, network)
    Verifying(module, graph, network, tensors, verify, tf32=options["tf32"], passes=passes).finish(model)
    if eager:  # from now on: verification makes up values, of which sizes may be larger than a user's
        own = [piece.segment for piece in program.pieces]
        larger = Larger(graph, own, passes, nan, choice.max_sizes, choice.most, functools.partial(build, **quiet))
        model.growth.is_bound, model.growth.make = choice.max_sizes == choice.most, larger
    return model


def torch_segment(piece: Piece, device: torch.device, compiles: bool = False) -> TorchSegment:
    """The calls of a piece as a module; torch's compiler is not asked for what draws or has sizes of values."""
    draws_numbers = any(map(draws, piece.segment.nodes))
    waits = any("unbacked" in node.meta for node in piece.segment.nodes)
    compiles = compiles and not (draws_numbers or waits or has_unbacked(piece))
    return TorchSegment(piece.graph, device, draws_numbers, compiles, waits)


def has_unbacked(piece: Piece) -> bool:
    """Whether sizes of what a piece takes depend on values."""
    inputs = [node.meta["val"] for node in piece.graph.graph.find_nodes(op="placeholder")]
    sizes = [size for value in inputs for size in value.shape if is_symbolic(size)]
    return any(free_unbacked_symbols(size) for size in sizes)


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
