"""What happens at each call: an engine's execution contexts, streams and CUDA graphs on one GPU.

TensorRT waits for the whole device when it works on CUDA's default stream. Calls from there run on a stream of the
pool's own instead, one of the kind that CUDA itself orders with the default stream: its work begins after what the
caller has enqueued and ends before what the caller enqueues next, without events, and memory that torch gives to the
default stream is safe to use. Calls from any other stream run on that stream.

All memory but the weights comes from torch: outputs, and the scratch memory of each call.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import current_device, current_stream, is_capturing, on_device
from torch2rt.errors import EngineError
from torch2rt.runtime.cuda_graph import UNCAPTURABLE, CudaGraph
from torch2rt.runtime.execution import NEEDS_WARM_UP, Execution
from torch2rt.runtime.loaded_engine import LoadedEngine

BUSY = "Other inputs need another CUDA graph, but a stream is being captured with which the current one is ordered."
TRIES = 3  # of captures, before an engine is taken for one that cannot be captured
GRAPHS = 16  # CUDA graphs that a pool keeps, over all streams and shapes


class IdleContexts(Protocol):
    """Execution contexts that no call uses and that calls on a stream may take: a list, for torch's own streams."""

    def pop(self) -> Execution:
        """Take one; raises `IndexError` if there is none."""

    def append(self, execution: Execution, /) -> None:
        """Give one back, after a call on the current stream."""


class ExternalStreamContexts:
    """Idle execution contexts of streams that torch has not made (`torch.cuda.ExternalStream`).

    Such a stream may be destroyed at any time. So its contexts are kept for the next caller on any other such stream,
    each with an event after its last work.
    """

    def __init__(self) -> None:
        self.idle: list[tuple[Execution, torch.cuda.Event]] = []

    def pop(self) -> Execution:
        """Take one, once its last work is done; raises `IndexError` if there is none, or in a capture."""
        if is_capturing():
            raise IndexError
        execution, event = self.idle.pop()
        event.wait()
        return execution

    def append(self, execution: Execution) -> None:
        """Give one back, after a call on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self.idle.append((execution, event))

    def synchronize(self) -> None:
        """Wait for the last work of all of them."""
        for _, event in self.idle:
            event.synchronize()


class ContextPool:
    """The execution contexts of an engine on one GPU, for calls from any thread and stream.

    Each call takes an execution context that no other call uses, from those that last ran on the same stream, so that
    calls on one stream follow each other and calls on several run side by side, over one copy of the weights.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        """Make the first execution context, too, which says whether the GPU fits; raises `EngineError` if not."""
        self.interface, self.inputs = loaded.interface, loaded.inputs
        self.device, self.index = loaded.device, loaded.index
        self.lock = threading.RLock()  # to capture and to drop graphs, not to replay them
        self.idle: dict[int, IdleContexts] = {}  # by stream
        self.unused: list[Execution] = []  # that have not run on any stream yet
        self.external = ExternalStreamContexts()
        self.captured: list[Execution] = []  # in CUDA graphs of the callers' own
        self.graphs: collections.OrderedDict[Any, CudaGraph] = collections.OrderedDict()
        self.uncapturable: str | None = None  # why calls cannot be captured in graphs, if they cannot
        self.failures = 0  # captures that have failed
        with on_device(self.index), cuda.beside_captures():
            self.stream, self.capture_stream = cuda.make_stream(blocking=True), cuda.make_stream(blocking=False)
        self.loaded = loaded
        self._make_first_context()

    def _make_first_context(self) -> None:
        with on_device(self.index), cuda.beside_captures():
            self.unused.append(Execution(self.loaded))
            if not self.unused[0].can_be_captured(self.capture_stream):
                self.uncapturable = UNCAPTURABLE
        self.loaded.kernels.save()

    @functools.cached_property
    def context(self) -> Any:
        """A context with memory of its own, for the module's caller."""
        with self.loaded.lock.exclusive(), on_device(self.index):
            return self.loaded.create_context(own_memory=True)

    def run(self, tensors: Sequence[torch.Tensor], graph: bool = False, borrow: bool = False) -> list[torch.Tensor]:
        """The engine's outputs for these tensors, in the order of the caller's current stream."""
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.run(tensors, graph, borrow)
        stream = current_stream(self.index)
        idle = self.idle.get(stream)
        if idle is None:
            idle = self.idle.setdefault(stream, [] if cuda.is_torchs(stream, self.index) else self.external)
        capturing = stream and is_capturing()
        if graph and not (capturing or self.uncapturable or idle is self.external):
            outputs = self.replay(tensors, stream, idle, borrow)
            if outputs is not None:
                return outputs
        if capturing and self.uncapturable == UNCAPTURABLE:
            raise EngineError(f"{UNCAPTURABLE}: call the module outside of the capture.")
        execution = self.take(idle)
        try:
            outputs = execution.run(tensors, stream or self.stream)
        except BaseException:
            execution.forget()
            idle.append(execution)
            raise
        if capturing:
            self.captured.append(execution)  # the graph works with its state from now on
        else:
            idle.append(execution)
        return outputs

    def take(self, idle: IdleContexts) -> Execution:
        """An idle execution context, or else one that no stream has used."""
        try:
            return idle.pop()
        except IndexError:
            pass  # contextlib.suppress would take a microsecond
        return self.unused_context()

    def unused_context(self) -> Execution:
        """An execution context that no stream has used, made if need be; raises `EngineError` in a capture."""
        if is_capturing():
            raise EngineError(NEEDS_WARM_UP)
        with self.loaded.lock.exclusive(), cuda.beside_captures():
            return self.unused.pop() if self.unused else Execution(self.loaded)

    # CUDA graphs -----------------------------------------------------------------------------------------------------

    def replay(
        self, tensors: Sequence[torch.Tensor], stream: int, idle: IdleContexts, borrow: bool
    ) -> list[torch.Tensor] | None:
        """The engine's outputs by replaying the CUDA graph of this stream and these shapes, captured at the first call.

        `None` if the call could not be captured, and is to be made without a graph.
        """
        outputs, graphs = None, self.graphs
        try:
            key = (stream, borrow, *[tensor.shape for tensor in tensors])
            while outputs is None:
                if (graph := graphs.get(key)) is not None:
                    with graph.lock:
                        outputs = None if graph.gone else graph.run(tensors)
                if outputs is None and not self.capture(key, tensors, idle, graph):
                    return None
        except (AttributeError, RuntimeError):
            self.inputs.check(tensors)  # some are not what they should be, or not tensors at all
            raise
        try:  # noqa: SIM105  (contextlib.suppress takes a microsecond)
            graphs.move_to_end(key)
        except KeyError:
            pass  # another thread has dropped it meanwhile
        return outputs

    def capture(self, key: Any, tensors: Sequence[torch.Tensor], idle: IdleContexts, before: CudaGraph | None) -> bool:
        """Capture a call in a graph, in place of the graph `before`; the graph keeps an execution context for good.

        `False` if the capture fails. That may happen now and then: CUDA breaks a capture off if another thread waits
        for the whole device meanwhile, and that thread's wait, too. So after `TRIES` failures no more is tried.
        """
        with self.lock:
            if self.uncapturable:
                return False
            if self.graphs.get(key) is not before:
                return True  # another thread has done so
            self.inputs.check(tensors)
            cuda.enter_context(self.index)
            if before is not None and not self.drop_graph(key):
                raise EngineError(BUSY)
            execution = self.take(idle) if before is None else before.execution
            try:
                with cuda.beside_captures():
                    graph = CudaGraph(
                        execution, tensors, self.capture_stream, borrow=key[1], copies_inputs=before is not None
                    )
            except BaseException as error:
                execution.forget()
                idle.append(execution)
                if not isinstance(error, cuda.CaptureError):
                    raise
                self.failures += 1
                if self.failures == TRIES:
                    self.uncapturable = str(error)
                return False
            self.graphs[key] = graph
            for oldest in list(self.graphs)[:-GRAPHS]:
                self.drop_graph(oldest)
            return True

    def drop_graph(self, key: Any) -> bool:
        """Let go of a graph, which may be running; `False` if its stream cannot be waited for now."""
        graph = self.graphs[key]
        with graph.lock:
            graph.gone = cuda.synchronize(key[0])
            if graph.gone:
                del self.graphs[key]
            return graph.gone

    # The end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the calls under way, and let go of the engine, after all that was made of it.

        Where that is not possible, in the middle of a capture, and where a graph that the caller has captured may be
        replayed later, all of it stays until the process ends.
        """
        if self.loaded.engine is None:
            return
        own = [self.stream, self.capture_stream]
        with on_device(self.index), cuda.beside_captures():
            cuda.enter_context(self.index)
            streams = own + [stream for stream, idle in self.idle.items() if idle is not self.external]
            done = [cuda.synchronize(stream) for stream in streams]
            self.external.synchronize()
            self.loaded.kernels.save()
            if self.captured or not all(done):
                _NEVER_FREED.append(dict(self.__dict__))
                return
            self.graphs.clear()
            self.idle.clear()
            self.unused.clear()
            self.external = ExternalStreamContexts()
            self.__dict__.pop("context", None)
            self.loaded.close()
            for stream in own:
                cuda.destroy_stream(stream)

    def __del__(self) -> None:
        if getattr(self, "loaded", None) is not None:
            with contextlib.suppress(Exception):  # Python or CUDA is closing down, and takes everything along
                self.close()


_NEVER_FREED: list[Any] = []  # what pools could not let go of when they were closed
