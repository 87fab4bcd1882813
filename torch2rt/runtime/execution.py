"""One execution context of an engine, told only what has changed since its last call; and calls as CUDA graphs."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import CapturedGraph, CaptureError, Copy, contiguous_strides, empty, is_capturing
from torch2rt.backend.quirks import create_execution_context
from torch2rt.backend.tensorrt import LOG
from torch2rt.errors import EngineError, InputError

if TYPE_CHECKING:
    from torch2rt.runtime.runtime import Runtime

ALIGNMENT = 256  # bytes; TensorRT reads and writes no other addresses
NOT_WARM = (
    "CUDA graph capture needs a context that has run with these shapes on this stream: call the module once on it, as "
    "the warm-up for a capture does, before each capture"
)
UNCAPTURABLE = "TensorRT cannot run this engine in a CUDA graph"
NOWHERE = 1 << 32  # no GPU's memory begins below; a tensor whose storage was freed seems to be at its offset
Result = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]  # name, shape, strides, dtype


def is_dense(memory_format: torch.memory_format) -> Callable[[torch.Tensor], bool]:
    """Whether a tensor lies in memory as this format says, without gaps."""
    if memory_format is torch.contiguous_format:
        return torch.Tensor.is_contiguous  # a third of the host time of one with an argument
    return functools.partial(torch.Tensor.is_contiguous, memory_format=memory_format)


class Execution:
    """An execution context, with the shapes and addresses that it knows."""

    def __init__(self, runtime: Runtime) -> None:
        with LOG.capture() as log:
            context = create_execution_context(runtime.engine, runtime.capability, runtime.kernels.cache)
        if context is None:
            raise runtime.refusal(log)
        self.context = context
        self.execute, self.set_address = context.execute_async_v3, context.set_tensor_address
        self.shapes: list[Any] | None = None
        self.addresses: list[int] = []
        self.results: list[Result] = []
        self.scratch, self.scratch_address = 0, -1
        self.warm = False

    def run(
        self, runtime: Runtime, tensors: Sequence[torch.Tensor], stream: int, kept: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:  # fmt: skip
        """Enqueue one call on a stream; the outputs belong to torch's current one, as does the scratch memory.

        The latter is torch's to give away again, unless `kept` takes it.
        """
        held: Any = None  # inputs that were copied, until the engine is enqueued
        try:
            if not self.warm or self.shapes != [tensor.shape for tensor in tensors]:
                self.fit(runtime, tensors)
            addresses, dtypes, dense, index, place = self.addresses, runtime.dtypes, runtime.dense, runtime.index, 0
            for tensor in tensors:
                if (
                    tensor.dtype is not dtypes[place] or tensor.get_device() != index or not dense[place](tensor)
                    or tensor.is_neg() or (address := tensor.data_ptr()) < NOWHERE or address % ALIGNMENT
                ):  # fmt: skip
                    tensor = runtime.usable(place, tensor)
                    held = held, tensor
                    address = tensor.data_ptr() or runtime.placeholder.data_ptr()
                if address != addresses[place]:
                    self.set_address(runtime.names[place], address)
                    addresses[place] = address
                place += 1
        except (AttributeError, RuntimeError):
            runtime.check(tensors)  # some are not what they should be, or not tensors at all
            raise
        outputs = []
        for name, shape, stride, dtype in self.results:
            output = empty(shape, stride, dtype)
            address = output.data_ptr() or runtime.placeholder.data_ptr()
            if address != addresses[place]:
                self.set_address(name, address)
                addresses[place] = address
            outputs.append(output)
            place += 1
        if self.scratch:
            scratch = empty((self.scratch,), (1,), torch.uint8)
            if (address := scratch.data_ptr()) != self.scratch_address:
                self.context.set_device_memory(address, self.scratch)
                self.scratch_address = address
            if kept is not None:
                kept.append(scratch)
        self.enqueue(runtime, stream)
        return outputs

    def enqueue(self, runtime: Runtime, stream: int) -> None:
        """Do the last call again, on the same memory."""
        gate = runtime.gate
        if self.warm:
            try:
                gate.enter(self)
                done = self.execute(stream)
            finally:
                gate.leave(self)
        else:
            with gate.alone():
                done = self.execute(stream)
        if not done:
            raise EngineError("TensorRT could not run the engine: " + ("; ".join(LOG.recent()) or "it gave no reason"))
        self.warm = True

    def can_be_captured(self, stream: int) -> bool:
        """Whether calls may be part of a CUDA graph, as far as TensorRT says; only that for RTX does."""
        return bool(getattr(self.context, "is_stream_capturable", lambda _: True)(stream))

    def fit(self, runtime: Runtime, tensors: Sequence[torch.Tensor]) -> None:
        """Prepare for other shapes than those of the last call."""
        context = self.context
        runtime.check(tensors)
        shapes = [tensor.shape for tensor in tensors]
        sizes = [tuple(shape) for shape in shapes]
        if is_capturing():
            raise EngineError(NOT_WARM)
        self.shapes, self.warm = None, False
        with LOG.capture() as log:
            for spec, shape in zip(runtime.interface.inputs, sizes, strict=True):
                if not context.set_input_shape(spec.name, spec.in_memory(shape)):
                    raise InputError(f"TensorRT refuses the shape {shape} of input '{spec.name}': {'; '.join(log)}")
            self.scratch = context.update_device_memory_size_for_shapes()
        if self.scratch < 0:
            raise EngineError("TensorRT cannot tell how much memory these shapes need: " + "; ".join(log))
        self.results = []
        for name, dtype in runtime.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(f"TensorRT cannot tell the shape of output '{name}' before it has run.")
            self.results.append((name, shape, contiguous_strides(shape), dtype))
        self.addresses = [-1] * (len(sizes) + len(self.results))
        self.scratch_address = -1
        self.shapes = shapes


class Graph:
    """A captured call: the engine on fixed inputs and outputs, replayed as one piece.

    It is captured on the tensors of its first call, so that a caller who passes the same ones again copies nothing. A
    call with others makes it be captured again, with copies to inputs of its own. Outputs that are not borrowed are
    copied to fresh ones. The copies are part of the graph, and told their addresses before a replay if these have
    changed, which takes as long as all the rest of a call. Where a caller still holds one call's outputs at the next,
    they change each time: the next ones are made ready, and the copies told, while the GPU works on the call before.
    Where not, torch gives the same memory again.

    All of its memory is torch's and of the caller's stream, on which it is replayed. So torch gives it to others in
    their turn when the graph is gone.

    `lock` is to be held from looking at `gone` until the replay is enqueued. Of a graph that is gone, the memory may be
    another's.
    """

    def __init__(
        self, runtime: Runtime, execution: Execution, tensors: Sequence[torch.Tensor], borrow: bool, own: bool
    ) -> None:  # fmt: skip
        self.lock, self.gone, self.execution = threading.Lock(), False, execution
        self.scratch: list[torch.Tensor] = []
        callers, stream = torch.cuda.current_stream(), torch.cuda.ExternalStream(runtime.capture_stream, runtime.device)
        with torch.inference_mode(False):
            usable = [runtime.usable(place, tensor) for place, tensor in enumerate(tensors)]
            self.own = own or any(a.data_ptr() != b.data_ptr() for a, b in zip(usable, tensors))
            self.inputs = [x.clone() for x in usable] if self.own else [x.detach() for x in tensors]
            stream.wait_stream(callers)
            try:
                self.outputs = execution.run(runtime, self.inputs, runtime.capture_stream, self.scratch)
            finally:
                cuda.synchronize(runtime.capture_stream)  # the memory is of the caller's stream, which does not wait
            fresh = [] if borrow else [torch.empty_like(output) for output in self.outputs]
        self.graph = self._capture(runtime, usable, fresh)
        found = self.graph.copies()
        self.replay = self.graph.replay_on(callers.cuda_stream)
        self.sources = [_found(found, x, y) if self.own else None for x, y in zip(self.inputs, usable)]
        self.addresses = [x.data_ptr() for x in self.inputs]
        self.results = [
            (tuple(x.shape), x.stride(), x.dtype, _found(found, x, y)) for x, y in zip(fresh, self.outputs)
        ]
        self.ready: list[torch.Tensor] | None = None
        self.last: Any = lambda: None  # a weak reference to an output of the last call

    def _capture(
        self, runtime: Runtime, given: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
    ) -> CapturedGraph:  # fmt: skip
        """The last call of the execution context, from copying the given inputs to copying the results."""
        if not self.execution.can_be_captured(runtime.capture_stream):
            raise CaptureError(UNCAPTURABLE)
        try:
            with LOG.capture(), CapturedGraph(runtime.capture_stream) as graph:
                if self.own:
                    _copy(graph, self.inputs, given)
                self.execution.enqueue(runtime, runtime.capture_stream)
                _copy(graph, results, self.outputs)
            return graph
        except EngineError as error:
            raise CaptureError(str(error).rstrip(".")) from error

    def run(self, runtime: Runtime, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Replay it on torch's current stream; `None` if the tensors are not those it was captured on and must be."""
        held: Any = None  # inputs that were copied, until the graph is enqueued
        dtypes, dense, index, place = runtime.dtypes, runtime.dense, runtime.index, 0
        for tensor in tensors:
            if (
                tensor.dtype is not dtypes[place] or tensor.get_device() != index or not dense[place](tensor)
                or tensor.is_neg() or (address := tensor.data_ptr()) < NOWHERE
            ):  # fmt: skip
                tensor = runtime.usable(place, tensor)
                held = held, tensor
                address = tensor.data_ptr()
            if not self.own:
                if address != self.addresses[place]:
                    return None
            elif (source := self.sources[place]) is not None:
                source.move(Copy.SOURCE, address)
            place += 1  # noqa: SIM113  (enumerate makes a tuple a turn)
        outputs, self.ready = self.ready, None
        if outputs is None or outputs[0].is_inference() != torch.is_inference_mode_enabled():
            outputs = self.fresh()
        if error := self.replay():
            self.replay_in_a_new_thread(runtime, error)
        if not outputs:
            return self.outputs
        if self.last() is not None:
            try:  # noqa: SIM105  (contextlib.suppress takes a microsecond)
                self.ready = self.fresh()
            except RuntimeError:
                pass  # out of memory, say: the next call tries again, and raises it
        self.last = weakref.ref(outputs[0])
        return outputs

    def replay_in_a_new_thread(self, runtime: Runtime, error: int) -> None:
        """Replay where CUDA gave this error, which a thread's first call gets; raises `EngineError` for others."""
        if error == cuda.NO_CONTEXT:
            cuda.enter_context(runtime.index)
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


def _copy(graph: CapturedGraph, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors, as part of a graph's work."""
    for target, source in zip(targets, sources):
        if target.nbytes:
            graph.copy(target.data_ptr(), source.data_ptr(), target.nbytes)


def _found(found: dict[tuple[int, int], Copy], target: torch.Tensor, source: torch.Tensor) -> Copy | None:
    """The copy from one tensor to another, which those with elements must have."""
    ends = target.data_ptr(), source.data_ptr()
    if target.nbytes and ends not in found:
        raise CaptureError("CUDA has captured a copy in a way that cannot be changed")
    return found.get(ends)
