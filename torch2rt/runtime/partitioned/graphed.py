"""Segments that follow each other, engines and torch calls, as one CUDA graph for each stream and set of shapes.

Only segments that never wait for the GPU can be captured: not those whose results' sizes depend on values, and none
that draw random numbers, as a graph would draw the same ones again. What else waits, such as a solver that looks
whether it has converged, says so in its first capture; it is then left out of graphs, which end before it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import (
    CapturedGraph,
    CaptureError,
    CapturePlace,
    current_device,
    current_stream,
    is_capturing,
)
from torch2rt.backend.tensorrt import LOG
from torch2rt.errors import InputError
from torch2rt.runtime.cuda_graph import UNCAPTURABLE, Replay, found_copy
from torch2rt.runtime.execution import Execution
from torch2rt.runtime.graph_cache import GraphCache, Traffic, least_replayed
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.parts import Part, Runner
from torch2rt.runtime.partitioned.schedule import Carriers, Ready, Schedule, run_steps
from torch2rt.runtime.pool import ContextPool

CPU = -1  # what a tensor there says is its device
TRIES = 2  # captures that fail in the same segment, before it is taken for one that cannot be captured
BROKEN = 3  # captures that CUDA breaks off, as it does when another thread waits for the whole device


class SegmentError(CaptureError):
    """A segment cannot be part of a CUDA graph; `place` is its place in the run."""

    def __init__(self, message: str, place: int, for_good: bool = False) -> None:
        super().__init__(message)
        self.place, self.for_good = place, for_good


class GraphedRun:
    """Some steps of a schedule, one after the other, as one function of the tensors in `inputs`, a slot each.

    - `schedule`: only these steps, with the slots of the whole; its results are what others take of them.
    - `parts`: a segment for each step. `runners`: how they are called without a graph.
    - `places`: where calls on a GPU and a stream of it are captured.
    - `borrow`: whether the tensors of a replay may be the graph's own, overwritten by the next one.
    - `refuse`: is told of a part, by its place, that cannot be captured, and why; the run is not called any more.
    """

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[int],
        parts: Sequence[Part],
        runners: Sequence[Runner],
        carriers: Carriers,
        places: dict[tuple[int, int], CapturePlace],
        cache: GraphCache,
        borrow: bool,
        refuse: Callable[[int, str], None],
    ) -> None:
        self.schedule, self.inputs, self.parts, self.runners = schedule, inputs, parts, runners
        self.steps = schedule.ready(runners)
        self.carriers, self.places, self.cache, self.borrow = carriers, places, cache, borrow
        self.refuse = refuse
        self.lock = threading.RLock()  # to capture and to drop graphs, not to replay them
        self.graphs: dict[Any, SegmentsGraph] = {}  # by stream, borrowing, shapes and GPU
        self.traffic = Traffic()
        self.failures = [0] * len(parts)  # of captures, in each segment
        self.broken = 0  # captures that CUDA has broken off

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """The results, by replaying the graph of this stream and these shapes, captured if that pays."""
        index = tensors[0].get_device()
        if index == CPU:
            return self.plain(tensors, self.steps)
        if index != current_device():
            with torch.cuda.device(index):
                return self(*tensors)
        stream = current_stream(index)
        if not (stream and is_capturing()):
            outputs = self.replay(tensors, stream, index)
            if outputs is not None:
                return outputs
        return self.plain(tensors, self.steps)

    def plain(self, tensors: Sequence[torch.Tensor], steps: Sequence[Ready]) -> list[torch.Tensor]:
        """The results, each segment called by itself."""
        values: list[Any] = [None] * self.schedule.slots
        for slot, tensor in zip(self.inputs, tensors, strict=True):
            values[slot] = tensor
        run_steps(steps, values, self.carriers, tensors[0].device)
        return [values[slot] for slot in self.schedule.results]

    def replay(self, tensors: Sequence[torch.Tensor], stream: int, index: int) -> list[torch.Tensor] | None:
        """The results of a graph; `None` if the call is not worth one or could not be captured."""
        outputs, graphs = None, self.graphs
        key = (stream, self.borrow, tuple([tensor.shape for tensor in tensors]), index)
        while outputs is None:
            if (graph := graphs.get(key)) is not None:
                if graph.is_stale() and not self.drop(key):
                    return None
                with graph.lock:
                    outputs = None if graph.gone else graph.run(tensors)
                    graph.calls += 1
            elif not self.traffic.is_worth(key, tensors, graphs, self.cache) or not self.capture(key, tensors, index):
                return None
        return outputs

    def capture(self, key: Any, tensors: Sequence[torch.Tensor], index: int) -> bool:
        """Capture a call in a graph; `False` if that fails, or if it needs more memory than graphs may hold."""
        with self.lock:
            if key in self.graphs:
                return True  # another thread has done so
            if not cuda.is_torchs(key[0], index) or any(t.get_device() != index for t in tensors):
                self.traffic.leave_alone(key)
                return False
            cuda.enter_context(index)
            with cuda.beside_captures():
                if (place := self.places.get((index, key[0]))) is None:
                    place = self.places[index, key[0]] = CapturePlace(index)
                try:
                    with place.lock:
                        graph = SegmentsGraph(self, tensors, place)
                except SegmentError as error:
                    self.failures[error.place] += 1
                    if error.for_good or self.failures[error.place] == TRIES:
                        self.refuse(error.place, str(error))
                    return False
                except CaptureError as error:
                    self.broken += 1
                    if self.broken == BROKEN:
                        for part in range(len(self.parts)):
                            self.refuse(part, str(error))
                    return False
            self.traffic.captured(key)
            self.graphs[key] = graph
            for other in least_replayed(self.graphs, self.cache.shapes, key):
                self.drop(other)
            if self._holds_too_much(index):
                self.drop(key)
                self.traffic.leave_alone(key)
                return False
            return True

    def _holds_too_much(self, index: int) -> bool:
        total = torch.cuda.get_device_properties(index).total_memory
        most = total // 4 if self.cache.bytes is None else self.cache.bytes
        return sum(place.held() for place in list(self.places.values()) if place.index == index) > most

    def drop(self, key: Any) -> bool:
        """Let go of a graph, which may be running; `False` if its stream cannot be waited for now."""
        with self.lock:
            if (graph := self.graphs.get(key)) is None:
                return True
            with graph.lock:
                graph.gone = cuda.synchronize(key[0])
                if graph.gone:
                    del self.graphs[key]
                    graph.give_back()
                return graph.gone


class Values:
    """How a graph reads tensors, as `torch2rt.runtime.inputs.Inputs` says it for engines: each laid out as at first."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device, self.index = tensors[0].device, tensors[0].get_device()
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.strides = [tensor.stride() for tensor in tensors]
        self.dense = [_is_laid_out(tensor) for tensor in tensors]

    def usable(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as the graph reads it."""
        if tensor.dtype is not self.dtypes[place] or tensor.get_device() not in (self.device.index, -1):
            raise InputError(
                f"A segment takes {self.dtypes[place]} on {self.device}, not {tensor.dtype} on {tensor.device}."
            )
        like = torch.empty_strided(tensor.shape, self.strides[place], dtype=tensor.dtype, device=self.device)
        return like.copy_(tensor)


def _is_laid_out(tensor: torch.Tensor) -> Any:
    """A function that says whether another tensor of the shape lies in memory as this one does."""
    if tensor.is_complex():
        strides = tensor.stride()
        return lambda other: other.stride() == strides and not other.is_conj()
    if tensor.is_contiguous():
        return torch.Tensor.is_contiguous
    strides = tensor.stride()
    return lambda other: other.stride() == strides


class SegmentsGraph(Replay):
    """A `GraphedRun` on some tensors as a CUDA graph, which keeps an execution context of each engine.

    The inputs are copied to memory of the graph, and the results from there, within the graph. Whatever is in between
    lies in the memory of the place where the run was captured.
    """

    def __init__(self, run: GraphedRun, tensors: Sequence[torch.Tensor], place: CapturePlace) -> None:
        super().__init__()
        self.lock = place.lock
        self.place, self.stream = place, torch.cuda.current_stream().cuda_stream
        self.lent: dict[int, tuple[TRTModule, Any, ContextPool, Execution]] = {}  # by place, for each engine
        read = {item for step in run.schedule.steps for item in _read(step.inputs)}
        try:
            with torch.inference_mode(False), torch.no_grad():
                with place.entered():
                    self.buffers = [_settled(t.detach()).clone() for t in tensors]
                    self.inputs, self.copies_inputs = Values(self.buffers), True
                    parts = enumerate(zip(run.parts, run.runners))
                    steps = run.schedule.ready([self._runner(i, part, plain) for i, (part, plain) in parts])
                    shapes = [(y.shape, y.stride(), y.dtype) for y in map(_settled, run.plain(self.buffers, steps))]
                # memory that replays read; others may be put in its place meanwhile
                self.constants = [*(t for part in run.parts for t in part.constants()), *run.carriers.buffers()]
                # so that each copy can be told from others by its ends
                sources = [torch.empty_like(buffer) for buffer in self.buffers]
                targets = [torch.empty_strided(*where, dtype=t, device=tensors[0].device) for *where, t in shapes]
                copied_in = [(b, x) for slot, b, x in zip(run.inputs, self.buffers, sources) if slot in read]
                with place.entered(), LOG.capture(), CapturedGraph(place.stream) as self.graph:
                    for buffer, x in copied_in:
                        if x.nbytes:
                            self.graph.copy(buffer.data_ptr(), x.data_ptr(), x.nbytes)
                    found = list(map(_settled, run.plain(self.buffers, steps)))
                    for y, target in [] if run.borrow else zip(found, targets, strict=True):
                        if y.nbytes:
                            self.graph.copy(target.data_ptr(), y.data_ptr(), y.nbytes)
            copies = self.graph.copies()
            self.sources = [
                found_copy(copies, b.data_ptr(), x.data_ptr(), x.nbytes) if slot in read else None
                for slot, b, x in zip(run.inputs, self.buffers, sources)
            ]
            self.outputs = found if run.borrow else []
            self.results = [
                (tuple(y.shape), y.stride(), y.dtype, found_copy(copies, x.data_ptr(), y.data_ptr(), y.nbytes))
                for y, x in ([] if run.borrow else zip(found, targets))
            ]
            self.replay = self.graph.replay_on(self.stream)
        except BaseException:
            cuda.synchronize(place.stream)  # where the contexts may still run
            self.give_back()
            raise

    def _runner(self, index: int, part: Part, plain: Runner) -> Runner:
        """A segment on the graph's own stream: an engine with an execution context that is the graph's alone."""

        def enqueue(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            segment = part.chosen(tensors)
            try:
                if not isinstance(segment, TRTModule):
                    return segment.forward(*tensors) if segment is part.eager else plain(*tensors)
                if index not in self.lent:
                    pool = segment.contexts(tensors)
                    self.lent[index] = segment, segment._pools, pool, pool.unused_context()
                execution = self.lent[index][-1]
                if not is_capturing() and not execution.can_be_captured(self.place.stream):
                    raise SegmentError(UNCAPTURABLE, index, for_good=True)
                return execution.run(tensors, self.place.stream)
            except Exception as error:
                if isinstance(error, SegmentError) or not is_capturing():
                    raise
                raise SegmentError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", index) from error

        return enqueue

    def is_stale(self) -> bool:
        """Whether an engine was loaded anew, or put on another GPU."""
        return any(segment._pools is not pools for segment, pools, *_ in self.lent.values())

    def give_back(self) -> None:
        """Let others have the execution contexts."""
        for _, _, pool, execution in self.lent.values():
            execution.forget()
            pool.unused.append(execution)
        self.lent = {}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # CUDA is closing down, and takes everything along
            if self.lent:
                cuda.synchronize(self.stream)
                self.give_back()


def _settled(value: torch.Tensor) -> torch.Tensor:
    """A value without gaps in memory, neither conjugated nor negated lazily."""
    value = value.resolve_conj().resolve_neg()
    return value if torch.empty_like(value).stride() == value.stride() else value.contiguous()


def _read(inputs: Sequence[Any]) -> list[int]:
    """The slots whose values a step takes, and not only their sizes."""
    return [i if isinstance(i, int) else i[1] for i in inputs if isinstance(i, int) or i[0] == "laid out"]


def in_groups(able: Sequence[bool], schedule: Schedule, long: Sequence[bool] = ()) -> list[range]:
    """The runs of segments which can be captured and of which the first takes a tensor: two at least, or a `long` one.

    An engine alone has graphs of its own, and few torch calls take no longer than a replay.
    """
    groups, start = [], 0
    for index in range(len(able) + 1):
        if index < len(able) and able[index] and (index > start or _read(schedule.steps[index].inputs)):
            continue
        if index - start > 1 or index > start and long and long[start]:
            groups.append(range(start, index))
        start = index + 1
    return groups
