"""A call of an engine as a CUDA graph, with the copies in it that are told other addresses before a replay."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import CapturedGraph, CaptureError, Copy, empty
from torch2rt.backend.tensorrt import LOG
from torch2rt.errors import EngineError
from torch2rt.runtime.execution import Execution
from torch2rt.runtime.inputs import LOWEST_ADDRESS, SCRATCH_ALIGNMENT

UNCAPTURABLE = "TensorRT cannot run this engine in a CUDA graph"


class Replay:
    """Captured work that is done again on other tensors: the copies in it are told their addresses before each replay.

    - `inputs`: how the work reads tensors (see `torch2rt.runtime.inputs.Inputs`). `sources`: the copies of inputs,
      `None` for those without elements; all of `addresses`, if the work reads the tensors themselves.
    - `results`: shape, strides, dtype and copy of each output; `outputs` instead, if they are borrowed.
    - `replay`: enqueues the work on the caller's stream, and gives CUDA's error, 0 for none.

    Hold `lock` from looking at `gone` until the replay is enqueued. `calls` counts the replays in this epoch of
    `Traffic`, `calls_before` those in the one before.
    """

    inputs: Any
    copies_inputs: bool
    sources: Sequence[Copy | None]
    addresses: Sequence[int]
    results: Sequence[tuple[Any, Any, torch.dtype, Copy | None]]
    outputs: list[torch.Tensor]
    replay: Callable[[], int]

    def __init__(self) -> None:
        self.lock: Any = threading.Lock()
        self.gone = False
        self.calls = self.calls_before = 0
        self.ready: list[torch.Tensor] | None = None
        self.last: Any = lambda: None  # a weak reference to an output of the last call

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Replay on torch's current stream; `None` if the graph reads other tensors than these and copies none."""
        held: Any = None  # inputs that were copied, until the graph is enqueued
        inputs = self.inputs
        dtypes, dense, index, place = inputs.dtypes, inputs.dense, inputs.index, 0
        for tensor in tensors:
            if (
                tensor.dtype is not dtypes[place]
                or tensor.get_device() != index
                or not dense[place](tensor)
                or tensor.is_neg()
                or (address := tensor.data_ptr()) < LOWEST_ADDRESS
            ):
                tensor = inputs.usable(place, tensor)
                held = held, tensor
                address = tensor.data_ptr()
            if not self.copies_inputs:
                if address != self.addresses[place]:
                    return None
            elif (source := self.sources[place]) is not None:
                source.move(Copy.SOURCE, address)
            place += 1  # noqa: SIM113  (enumerate makes a tuple a turn)
        outputs, self.ready = self.ready, None
        if outputs is None or outputs[0].is_inference() != torch.is_inference_mode_enabled():
            outputs = self.fresh()
        if error := self.replay():
            self.replay_in_a_new_thread(error)
        if not outputs:
            return self.outputs
        if self.last() is not None:
            try:  # noqa: SIM105  (contextlib.suppress takes a microsecond)
                self.ready = self.fresh()
            except RuntimeError:
                pass  # out of memory, say: the next call tries again, and raises it
        self.last = weakref.ref(outputs[0])
        return outputs

    def replay_in_a_new_thread(self, error: int) -> None:
        """Replay after CUDA has failed with this error, `NO_CONTEXT` in a new thread, or raise `EngineError`."""
        if error == cuda.NO_CONTEXT:
            cuda.enter_context(self.inputs.index)
            error = self.replay()
        if error:
            raise EngineError(f"CUDA cannot replay a graph: error {error}.")

    def fresh(self) -> list[torch.Tensor]:
        """New outputs, to which the next replay copies; none if they are borrowed."""
        outputs = []
        for shape, stride, dtype, target in self.results:
            output = empty(shape, stride, dtype)
            if target is not None:
                target.move(Copy.TARGET, output.data_ptr())
            outputs.append(output)
        return outputs


class CudaGraph(Replay):
    """One call as a CUDA graph: the engine on fixed inputs and outputs, replayed as one piece.

    The first graph of a stream and shapes reads the tensors of the first call themselves, so that a caller who passes
    the same tensors again copies nothing. A call with other tensors has the graph captured again, with inputs of its
    own and copies to them (`copies_inputs`). Outputs are copied to fresh tensors, unless the caller borrows them.

    The copies are part of the graph. A copy is told before a replay if an address has changed, which takes as long as
    all the rest of a call. The outputs change at every call of a caller who still holds those of the call before. Then
    the next outputs are made ready, and their copies told, while the GPU works on the call before. For a caller who has
    dropped them, torch gives the same memory again.

    All memory of a graph is torch's and belongs to the caller's stream, on which the graph is replayed. Graphs of one
    stream never run at once, so they share what `memory(size)` gives: their inputs, outputs before they are copied, and
    scratch. Torch gives it to others when the graphs are gone.

    `need` is what the graph needs of the shared memory and `own` what it holds besides, in bytes.
    """

    def __init__(
        self,
        execution: Execution,
        tensors: Sequence[torch.Tensor],
        capture_stream: int,
        borrow: bool,
        copies_inputs: bool,
        memory: Callable[[int, int], torch.Tensor],
    ) -> None:
        super().__init__()
        self.execution, self.inputs = execution, execution.inputs
        scratch: list[torch.Tensor] = []
        callers = torch.cuda.current_stream()
        stream = torch.cuda.ExternalStream(capture_stream, self.inputs.device)
        with torch.inference_mode(False):
            usable = [self.inputs.usable(place, tensor) for place, tensor in enumerate(tensors)]
            self.copies_inputs = copies_inputs or any(a.data_ptr() != b.data_ptr() for a, b in zip(usable, tensors))
            stream.wait_stream(callers)
            try:
                outputs = execution.run(usable, capture_stream, scratch)
            finally:
                callers.wait_stream(stream)  # the memory is of the caller's stream
            own = [] if self.copies_inputs else [x.detach() for x in tensors], outputs if borrow else []
            self.own = sum(x.nbytes for xs in own for x in xs)
            self.need, places = _side_by_side(
                [0 if own[0] else x.nbytes for x in usable]
                + [0 if own[1] else x.nbytes for x in outputs]
                + [execution.scratch]
            )
            self.kept = own, memory(self.need, self.own)
        start, nothing = self.kept[1].data_ptr(), execution.loaded.placeholder.data_ptr()
        shared = [start + place if x.nbytes else nothing for place, x in zip(places, [*usable, *outputs])]
        read = [x.data_ptr() or nothing for x in own[0]] or shared[: len(usable)]
        written = [x.data_ptr() or nothing for x in own[1]] or shared[len(usable) :]
        execution.move([*read, *written], start + places[-1])
        copied_in = list(zip(read, usable)) if self.copies_inputs else []
        copied_out = [] if borrow else list(zip(outputs, written))
        self.graph = self._capture(capture_stream, copied_in, copied_out)
        found = self.graph.copies()
        self.replay = self.graph.replay_on(callers.cuda_stream)
        self.sources = [found_copy(found, y, x.data_ptr(), x.nbytes) for y, x in copied_in] or [None] * len(usable)
        self.addresses, self.outputs = read, own[1]
        self.results = [
            (tuple(x.shape), x.stride(), x.dtype, found_copy(found, x.data_ptr(), y, x.nbytes)) for x, y in copied_out
        ]

    def _capture(
        self, stream: int, copied_in: list[tuple[int, torch.Tensor]], copied_out: list[tuple[torch.Tensor, int]]
    ) -> CapturedGraph:
        """The last call of the execution context, recorded with the copies before and after it."""
        if not self.execution.can_be_captured(stream):
            raise CaptureError(UNCAPTURABLE)
        try:
            with LOG.capture(), CapturedGraph(stream) as graph:
                for address, x in copied_in:
                    if x.nbytes:
                        graph.copy(address, x.data_ptr(), x.nbytes)
                self.execution.enqueue(stream)
                for x, address in copied_out:
                    if x.nbytes:
                        graph.copy(x.data_ptr(), address, x.nbytes)
            return graph
        except EngineError as error:
            raise CaptureError(str(error).rstrip(".")) from error


def _side_by_side(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """How many bytes these take one after the other, aligned as TensorRT wants them, and where each begins."""
    ends = list(itertools.accumulate(-(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT for size in sizes))
    return ends[-1], [0, *ends[:-1]]


def found_copy(found: dict[tuple[int, int], Copy], target: int, source: int, size: int) -> Copy | None:
    """The copy from one address to another, which tensors with elements must have."""
    if size and (target, source) not in found:
        raise CaptureError("CUDA has captured a copy in a way that cannot be changed")
    return found.get((target, source)) if size else None
