"""What happens at each call: an engine's execution contexts, streams and CUDA graphs on one GPU.

TensorRT waits for the whole device when it works on CUDA's default stream. Calls from there run on a stream of the
pool's own instead, one of the kind that CUDA itself orders with the default stream: its work begins after what the
caller has enqueued and ends before what the caller enqueues next, without events, and memory that torch gives to the
default stream is safe to use. Calls from any other stream run on that stream.

All memory but the weights comes from torch: outputs, and the scratch memory of each call.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import current_device, current_stream, is_capturing, on_device
from torch2rt.errors import EngineError
from torch2rt.runtime.cuda_graph import UNCAPTURABLE, CudaGraph
from torch2rt.runtime.execution import NEEDS_WARM_UP, Execution
from torch2rt.runtime.graph_cache import DEFAULT, GraphCache, Traffic, least_replayed
from torch2rt.runtime.graph_memory import GraphMemory, NoRoom
from torch2rt.runtime.idle_contexts import CHANGES, ExternalStreamContexts, IdleContexts, best, take_exact
from torch2rt.runtime.loaded_engine import LoadedEngine

BUSY = "Other inputs need another CUDA graph, but a stream is being captured with which the current one is ordered."
TRIES = 3  # of captures, before an engine is taken for one that cannot be captured


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
        self.profiles = loaded.profiles
        self.idle: dict[Any, IdleContexts] = {}  # by stream; by stream and profile, if there are several profiles
        self.unused: list[Execution] = []  # that no stream uses
        self.external = ExternalStreamContexts()
        self.captured: list[Execution] = []  # in CUDA graphs of the callers' own
        self.graphs: dict[Any, CudaGraph] = {}  # by stream, borrowing and shapes
        self.traffic, self.memory = Traffic(), GraphMemory()
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
            context = self.loaded.create_context(own_memory=True)
            if self.profiles > 1:
                context.set_optimization_profile_async(0, self.stream)
            return context

    def run(
        self, tensors: Sequence[torch.Tensor], graph: bool | GraphCache = False, borrow: bool = False
    ) -> list[torch.Tensor]:
        """The engine's outputs for these tensors, in the order of the caller's current stream."""
        if (lock := self.loaded.lock).turns > 0:
            lock.turns -= 1
            with lock.turn:
                return self._run(tensors, graph, borrow)
        return self._run(tensors, graph, borrow)

    def _run(self, tensors: Sequence[torch.Tensor], graph: bool | GraphCache, borrow: bool) -> list[torch.Tensor]:
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                return self._run(tensors, graph, borrow)
        stream = current_stream(self.index)
        place = stream if self.profiles == 1 else (stream, self.profile(tensors))
        idle = self.idle.get(place)
        if idle is None:
            idle = self.idle.setdefault(place, [] if cuda.is_torchs(stream, self.index) else self.external)
        capturing = stream and is_capturing()
        if graph and not (capturing or self.uncapturable or idle is self.external):
            cache = graph if isinstance(graph, GraphCache) else DEFAULT
            if (outputs := self.replay(tensors, stream, idle, borrow, cache)) is not None:
                return outputs
        if capturing and self.uncapturable == UNCAPTURABLE:
            raise EngineError(f"{UNCAPTURABLE}: call the module outside of the capture.")
        execution = self.take(idle, tensors)
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

    def profile(self, tensors: Sequence[torch.Tensor]) -> int:
        """The optimization profile for a call; any, if its arguments are not what they should be."""
        try:
            shapes = tuple([tensor.shape for tensor in tensors])
            fit = self.loaded.fits.get(shapes)
            return self.interface.nearest_profile(shapes) if fit is None else fit.profile
        except (AttributeError, RuntimeError, TypeError):
            return 0

    def take(self, idle: IdleContexts, tensors: Sequence[torch.Tensor]) -> Execution:
        """An idle execution context, the best of them for these shapes, or else one that no stream uses."""
        try:
            execution = idle.pop()
        except IndexError:
            pass  # contextlib.suppress would take a microsecond
        else:
            if isinstance(idle, list) and (idle or execution.changes > CHANGES):
                inexact = self.loaded.scratch is not None
                return best(execution, idle, tensors, inexact, lambda: self.unused_context(exact=False))
            return execution
        return self.unused_context()

    def unused_context(self, exact: bool = True) -> Execution:
        """An execution context that no stream uses, made if need be; raises `EngineError` in a capture."""
        if is_capturing():
            raise EngineError(NEEDS_WARM_UP)
        with self.loaded.lock.exclusive(), cuda.beside_captures():
            if (place := next((i for i, one in enumerate(self.unused) if one.exact == exact), None)) is not None:
                return self.unused.pop(place)
            return Execution(self.loaded, exact)

    def make_contexts(self, count: int) -> None:
        """Have so many execution contexts that no stream uses, for calls that streams will make at once."""
        while len(self.unused) < count:
            with self.loaded.lock.exclusive(), on_device(self.index), cuda.beside_captures():
                self.unused.append(Execution(self.loaded))

    # CUDA graphs -----------------------------------------------------------------------------------------------------

    def replay(
        self,
        tensors: Sequence[torch.Tensor],
        stream: int,
        idle: IdleContexts,
        borrow: bool,
        cache: GraphCache = DEFAULT,
    ) -> list[torch.Tensor] | None:
        """The engine's outputs by replaying the CUDA graph of this stream and these shapes, captured if that pays.

        `None` if the call is not worth a graph or could not be captured, and is to be made without one.
        """
        outputs, graphs = None, self.graphs
        try:
            key = (stream, borrow, tuple([tensor.shape for tensor in tensors]))
            while outputs is None:
                if (graph := graphs.get(key)) is not None:
                    with graph.lock:
                        outputs = None if graph.gone else graph.run(tensors)
                        graph.calls += 1
                elif not self.traffic.is_worth(key, tensors, graphs, cache):
                    return None
                if outputs is None and not self.capture(key, tensors, idle, graph, cache):
                    return None
        except (AttributeError, RuntimeError, TypeError):
            self.inputs.check(tensors)  # some are not what they should be, or not tensors at all
            raise
        return outputs

    def capture(
        self, key: Any, tensors: Sequence[torch.Tensor], idle: IdleContexts, before: CudaGraph | None, cache: GraphCache
    ) -> bool:
        """Capture a call in a graph, in place of the graph `before`; the graph keeps an execution context.

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
            copies_inputs = before is not None or self.traffic.brings_others(key, tensors)
            if before is not None and not self.drop_graph(key):
                raise EngineError(BUSY)
            execution = before.execution if before is not None else take_exact(idle) or self.unused_context()
            try:
                with cuda.beside_captures():
                    graph = CudaGraph(
                        execution,
                        tensors,
                        self.capture_stream,
                        borrow=key[1],
                        copies_inputs=copies_inputs,
                        memory=lambda need, own: self._memory(key[0], need, own, cache),
                    )
            except BaseException as error:
                execution.forget()
                idle.append(execution)
                if isinstance(error, NoRoom):
                    self.traffic.leave_alone(key)
                    return False
                if not isinstance(error, cuda.CaptureError):
                    raise
                self.failures += 1
                if self.failures == TRIES:
                    self.uncapturable = str(error)
                return False
            self.traffic.captured(key)
            self.graphs[key] = graph
            self._evict(key, cache)
            return True

    def drop_graph(self, key: Any) -> bool:
        """Let go of a graph, which may be running; `False` if its stream cannot be waited for now."""
        graph = self.graphs[key]
        with graph.lock:
            graph.gone = cuda.synchronize(key[0])
            if graph.gone:
                del self.graphs[key]
            return graph.gone

    def _evict(self, key: Any, cache: GraphCache) -> None:
        """Let go of the graphs that are replayed the least, beyond the number that is kept."""
        self._retire(least_replayed(self.graphs, cache.shapes, key))

    def _retire(self, keys: Sequence[Any]) -> None:
        """Let go of graphs, and of memory that the others of their streams do not need; others get their contexts."""
        streams = set()
        for key in keys:
            execution = self.graphs[key].execution
            if self.drop_graph(key):
                execution.forget()
                self.unused.append(execution)
                streams.add(key[0])
        for stream in streams:
            left = self._graphs_of(stream)
            if self.memory.is_too_large(stream, [self.graphs[key].need for key in left]):
                self._retire(left)

    def _replays(self, key: Any) -> int:
        """How often a graph was replayed of late."""
        graph = self.graphs[key]
        return graph.calls + graph.calls_before

    def _graphs_of(self, stream: int) -> list[Any]:
        """The keys of a stream's graphs."""
        return [key for key in self.graphs if key[0] == stream]

    def _memory(self, stream: int, need: int, own: int, cache: GraphCache) -> torch.Tensor:
        """The memory that the graphs of a stream share, for another one that has some of its own, too.

        Graphs of other streams that were not replayed of late give way to it; raises `NoRoom` if that is not enough.
        """
        total = torch.cuda.get_device_properties(self.index).total_memory
        most = total // 4 if cache.bytes is None else cache.bytes
        while True:
            most_shared = most - own - sum(graph.own for graph in self.graphs.values())
            try:
                return self.memory.block(stream, need, most_shared, lambda: self._retire(self._graphs_of(stream)))
            except NoRoom:
                idle = [key for key, graph in self.graphs.items() if key[0] != stream and not self._replays(key)]
                if not idle:
                    raise
                self._retire(idle[:1])

    # The end ---------------------------------------------------------------------------------------------------------

    def drop_graphs(self) -> None:
        """Let go of all CUDA graphs, but for those whose stream is being captured."""
        self._retire(list(self.graphs))

    def synchronize(self) -> bool:
        """Wait for the calls under way; `False` if a stream that they run on is being captured."""
        used = [place for place, idle in self.idle.items() if idle is not self.external]
        streams = [place[0] if isinstance(place, tuple) else place for place in used]
        done = [cuda.synchronize(stream) for stream in (self.stream, self.capture_stream, *streams)]
        self.external.synchronize()
        return all(done)

    def close(self) -> None:
        """Wait for the calls under way, and let go of the engine, after all that was made of it.

        Where that is not possible, in the middle of a capture, and where a graph that the caller has captured may be
        replayed later, all of it stays until the process ends.
        """
        if self.loaded.engine is None:
            return
        with on_device(self.index), cuda.beside_captures():
            cuda.enter_context(self.index)
            is_done = self.synchronize()
            self.loaded.kernels.save()
            if self.captured or not is_done:
                _NEVER_FREED.append(dict(self.__dict__))
                return
            self.graphs.clear()
            self.memory.blocks.clear()
            self.idle.clear()
            self.unused.clear()
            self.external = ExternalStreamContexts()
            self.__dict__.pop("context", None)
            self.loaded.close()
            for stream in (self.stream, self.capture_stream):
                cuda.destroy_stream(stream)

    def __del__(self) -> None:
        if getattr(self, "loaded", None) is not None:
            with contextlib.suppress(Exception):  # Python or CUDA is closing down, and takes everything along
                self.close()


_NEVER_FREED: list[Any] = []  # what pools could not let go of when they were closed
