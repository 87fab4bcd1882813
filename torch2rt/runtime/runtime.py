"""What happens at each call: an engine's contexts, streams and memory on one GPU, with little host time.

TensorRT waits for the whole device when it works on CUDA's default stream. Calls from there run on a stream of the
runtime's own instead, one of the kind that CUDA itself orders with the default stream: its work begins after what the
caller has enqueued and ends before what the caller enqueues next, without events, and memory that torch gives to the
default stream is safe to use. Calls from any other stream run on that stream.

All memory but the weights comes from torch: outputs, and the scratch memory of each call.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import current_device, current_stream, is_capturing, on_device
from torch2rt.backend.quirks import create_execution_context, why_no_dynamic_shapes
from torch2rt.backend.tensorrt import FLAVOUR, LOG, TORCH_DTYPES, VERSION, trt
from torch2rt.errors import EngineError, InputError
from torch2rt.interface import Interface
from torch2rt.runtime.execution import ALIGNMENT, NOT_WARM, UNCAPTURABLE, Execution, Graph, is_dense
from torch2rt.runtime.kernel_cache import KernelCache
from torch2rt.runtime.shared_lock import Gate

BUSY = "Other inputs need another CUDA graph, but a stream is being captured with which the current one is ordered."
TRIES = 3  # of captures, before an engine is taken for one that cannot be captured
GRAPHS = 16  # CUDA graphs that a runtime keeps, over all streams and shapes


class Runtime:
    """A deserialized engine on one GPU, for calls from any thread and stream.

    Each call takes an execution context that no other call uses, from those that last ran on the same stream, so that
    calls on one stream follow each other and calls on several run side by side, over one copy of the weights.
    """

    def __init__(
        self, engine_bytes: bytes, made_by: Mapping[str, str], interface: Interface | None = None,
        index: int | None = None,
    ) -> None:  # fmt: skip
        if not torch.cuda.is_available():
            raise EngineError(
                "Running an engine needs an NVIDIA GPU and torch sees none (torch.cuda.is_available() is False). "
                "Without one, model_trt.reference() evaluates the same network with torch."
            )
        if made_by["flavour"] != FLAVOUR or made_by["version"] not in (VERSION, "unknown"):
            raise EngineError(
                f"The engine was built by {made_by['flavour']} {made_by['version']}, this is {FLAVOUR} {VERSION}. "
                "Engines do not cross versions: convert the model again, or install that version."
            )
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.index = self.device.index
        self.made_by = made_by
        self.capability = torch.cuda.get_device_capability(self.device)
        self.lock = threading.RLock()  # to capture and to forget graphs, not to replay them
        self.gate = Gate()  # TensorRT for RTX 1.6 crashes if a context is made, or runs first, while another one runs
        self.idle: dict[int, list[Execution] | Travellers] = {}
        self.fresh: list[Execution] = []  # made, and not yet used on any stream
        self.travellers = Travellers()
        self.taken: list[Execution] = []  # by CUDA graphs that callers have captured
        self.graphs: collections.OrderedDict[Any, Graph] = collections.OrderedDict()
        self.uncapturable: str | None = None  # why calls cannot be captured in graphs, if they cannot
        self.failures = 0  # captures that have failed
        with on_device(self.index), cuda.beside_captures():
            with LOG.capture() as log:
                self.runtime = trt.Runtime(LOG)
                self.engine = self.runtime.deserialize_cuda_engine(engine_bytes)
            if self.engine is None:
                raise self.refusal(log)
            self.kernels = KernelCache(self.engine, engine_bytes, self.device)
            self.placeholder = torch.empty(ALIGNMENT, dtype=torch.uint8, device=self.device)
            self.stream, self.capture_stream = cuda.make_stream(blocking=True), cuda.make_stream(blocking=False)
        if interface is not None:
            self.serve(interface)

    def serve(self, interface: Interface) -> None:
        """Take the calling convention, and make the first execution context, which says whether the GPU fits."""
        if any(spec.dynamic for spec in interface.inputs) and (reason := why_no_dynamic_shapes(self.capability)):
            raise EngineError(reason)
        self.interface = interface
        self.names = [spec.name for spec in interface.inputs]
        self.dtypes = [spec.dtype for spec in interface.inputs]
        self.dense = [is_dense(spec.memory_format) for spec in interface.inputs]
        self.outputs = [(name, TORCH_DTYPES[self.engine.get_tensor_dtype(name)]) for name in interface.outputs]
        with on_device(self.index), cuda.beside_captures():
            self.fresh.append(Execution(self))
            if not self.fresh[0].can_be_captured(self.capture_stream):
                self.uncapturable = UNCAPTURABLE
        self.kernels.save()

    @functools.cached_property
    def context(self) -> Any:
        """A context with memory of its own, for the module's caller."""
        with self.gate.alone(), on_device(self.index):
            return create_execution_context(self.engine, self.capability, self.kernels.cache, own_memory=True)

    def refusal(self, log: Sequence[str]) -> EngineError:
        """Why TensorRT cannot use the engine here, in its own words."""
        name = torch.cuda.get_device_name(self.device)
        target = self.made_by.get("target", "an unknown GPU")
        return EngineError(
            f"The engine was built for {target}; {FLAVOUR} {VERSION} cannot use it on {name} (compute capability "
            f"{'.'.join(map(str, self.capability))}): {'; '.join(log) or 'it gave no reason'}."
        )

    def run(self, tensors: Sequence[torch.Tensor], graph: bool = False, borrow: bool = False) -> list[torch.Tensor]:
        """The engine's outputs for these tensors, in the order of the caller's current stream."""
        if current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.run(tensors, graph, borrow)
        stream = current_stream(self.index)
        idle = self.idle.get(stream)
        if idle is None:
            idle = self.idle.setdefault(stream, [] if cuda.is_torchs(stream, self.index) else self.travellers)
        capturing = stream and is_capturing()
        if graph and not (capturing or self.uncapturable or idle is self.travellers):
            outputs = self.replay(tensors, stream, idle, borrow)
            if outputs is not None:
                return outputs
        if capturing and self.uncapturable == UNCAPTURABLE:
            raise EngineError(f"{UNCAPTURABLE}: call the module outside of the capture.")
        execution = self.take(idle)
        try:
            outputs = execution.run(self, tensors, stream or self.stream)
        except BaseException:
            execution.shapes = None  # whatever it was told last is told again
            idle.append(execution)
            raise
        if capturing:
            self.taken.append(execution)  # the graph works with its state from now on
        else:
            idle.append(execution)
        return outputs

    def take(self, idle: list[Execution] | Travellers) -> Execution:
        """An idle execution context, or else one that no stream has used."""
        try:
            return idle.pop()
        except IndexError:
            if is_capturing():
                raise EngineError(NOT_WARM) from None
        with self.gate.alone(), cuda.beside_captures():
            return self.fresh.pop() if self.fresh else Execution(self)

    def replay(
        self, tensors: Sequence[torch.Tensor], stream: int, idle: list[Execution] | Travellers, borrow: bool
    ) -> list[torch.Tensor] | None:  # fmt: skip
        """The same by replaying a CUDA graph of this stream and these shapes, which the first call captures.

        `None` if it could not be captured, so that this call is to be made without a graph.
        """
        outputs = None
        try:
            key = (stream, borrow, *[tensor.shape for tensor in tensors])
            while outputs is None:
                if (graph := self.graphs.get(key)) is not None:
                    with graph.lock:
                        outputs = None if graph.gone else graph.run(self, tensors)
                if outputs is None and not self.capture(key, tensors, idle, graph):
                    return None
        except (AttributeError, RuntimeError):
            self.check(tensors)  # some are not what they should be, or not tensors at all
            raise
        try:  # noqa: SIM105  (contextlib.suppress takes a microsecond)
            self.graphs.move_to_end(key)
        except KeyError:
            pass  # another thread has let go of it meanwhile
        return outputs

    def capture(
        self, key: Any, tensors: Sequence[torch.Tensor], idle: list[Execution] | Travellers, before: Graph | None
    ) -> bool:  # fmt: skip
        """Capture a call in a graph, in place of the graph `before`; it keeps an execution context for good.

        `False` if that fails. It may do so now and then: CUDA breaks a capture off if another thread waits for the
        whole device meanwhile. After `TRIES` times no more is tried, for it breaks that thread's wait off, too.
        """
        with self.lock:
            if self.uncapturable:
                return False
            if self.graphs.get(key) is not before:
                return True  # another thread has done so
            self.check(tensors)
            cuda.enter_context(self.index)
            if before is not None and not self.forget(key):
                raise EngineError(BUSY)
            execution = self.take(idle) if before is None else before.execution
            try:
                with cuda.beside_captures():
                    graph = Graph(self, execution, tensors, borrow=key[1], own=before is not None)
            except BaseException as error:
                execution.shapes = None  # whatever it was told last is told again
                idle.append(execution)
                if not isinstance(error, cuda.CaptureError):
                    raise
                self.failures += 1
                if self.failures == TRIES:
                    self.uncapturable = str(error)
                return False
            self.graphs[key] = graph
            for oldest in list(self.graphs)[: -GRAPHS]:
                self.forget(oldest)
            return True

    def forget(self, key: Any) -> bool:
        """Let go of a graph, which may be running; `False` if its stream cannot be waited for now."""
        graph = self.graphs[key]
        with graph.lock:
            graph.gone = cuda.synchronize(key[0])
            if graph.gone:
                del self.graphs[key]
            return graph.gone

    # Inputs ----------------------------------------------------------------------------------------------------------

    def check(self, tensors: Sequence[Any]) -> None:
        """Raise `InputError` for what the engine does not take."""
        for position, tensor in enumerate(tensors):
            self.check_one(position, tensor)
        self.interface.check([tuple(tensor.shape) for tensor in tensors], self.dtypes)

    def check_one(self, position: int, tensor: Any) -> None:
        """Raise `InputError` for what the engine cannot read, whatever its shape."""
        spec = self.interface.inputs[position]
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, the engine takes {spec.describe()}.")
        if tensor.dtype != spec.dtype:
            raise InputError(
                f"Input '{spec.name}' is {tensor.dtype}, the engine takes {spec.dtype}: {spec.describe()}."
            )
        if tensor.device != self.device:
            raise InputError(f"Input '{spec.name}' is on {tensor.device}, the engine on {self.device}.")
        if tensor.numel() and not _has_memory(tensor):
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, without memory to read.")

    def usable(self, position: int, tensor: Any) -> torch.Tensor:
        """An input as TensorRT can read it: dense, aligned, and what it seems to be; `InputError` if it cannot be."""
        self.check_one(position, tensor)
        tensor = tensor.detach().resolve_neg().contiguous(memory_format=self.interface.inputs[position].memory_format)
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor

    def close(self) -> None:
        """Wait for the calls under way, and let go of the engine: what was made from what goes first.

        Where that is not possible, in the middle of a capture, and where a graph that the caller has captured may be
        replayed later, all of it stays until the process ends.
        """
        if self.engine is None:
            return
        own = [self.stream, self.capture_stream]
        with on_device(self.index), cuda.beside_captures():
            cuda.enter_context(self.index)
            streams = own + [stream for stream, idle in self.idle.items() if idle is not self.travellers]
            done = [cuda.synchronize(stream) for stream in streams]
            self.travellers.wait()
            self.kernels.save()
            if self.taken or not all(done):
                _KEPT.append(dict(self.__dict__))
                return
            self.graphs.clear()
            self.idle.clear()
            self.fresh.clear()
            self.travellers = Travellers()
            self.__dict__.pop("context", None)
            self.kernels.cache = None
            self.engine = None
            self.runtime = None
            for stream in own:
                cuda.destroy_stream(stream)

    def __del__(self) -> None:
        if getattr(self, "kernels", None) is not None:
            with contextlib.suppress(Exception):  # Python or CUDA is closing down, and takes everything along
                self.close()


class Travellers:
    """Idle execution contexts of streams that are not torch's, each with an event after its last work.

    Such a stream may be destroyed at any time, so its contexts wait for the next caller on any other.
    """

    def __init__(self) -> None:
        self.idle: list[tuple[Execution, torch.cuda.Event]] = []

    def pop(self) -> Execution:
        """One that the current stream may use; `IndexError` if there is none, or if it is being captured."""
        if is_capturing():
            raise IndexError
        execution, event = self.idle.pop()
        event.wait()
        return execution

    def append(self, execution: Execution) -> None:
        """Take back one that was used on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self.idle.append((execution, event))

    def wait(self) -> None:
        """Wait for all of them."""
        for _, event in self.idle:
            event.synchronize()


_KEPT: list[Any] = []  # what cannot be let go of


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:  # fake, or inside of torch.vmap
        return False


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of layout {value.layout} on {value.device}"
