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
import ctypes
import functools
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch2rt.backend import FLAVOUR, LOG, TORCH_DTYPES, VERSION, create_execution_context, trt
from torch2rt.errors import EngineError, InputError
from torch2rt.interface import Interface
from torch2rt.kernels import KernelCache

ALIGNMENT = 256  # bytes; TensorRT reads and writes no other addresses
CONTEXTS = 32  # idle execution contexts that a runtime keeps, over all streams
GRAPHS = 16  # CUDA graphs that a runtime keeps, over all streams and shapes

# torch.cuda.current_stream() makes an object, which takes 4 us; a torch without CUDA has none of these
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


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
        self.lock = threading.RLock()
        self.free: dict[int, list[Execution]] = {}
        self.taken: list[Execution] = []  # by CUDA graphs that callers have captured
        self.graphs: collections.OrderedDict[Any, Graph] = collections.OrderedDict()
        with _on(self.index):
            with LOG.capture() as log:
                self.runtime = trt.Runtime(LOG)
                self.engine = self.runtime.deserialize_cuda_engine(engine_bytes)
            if self.engine is None:
                raise self.refusal(log)
            torch.cuda.current_stream()  # makes the CUDA context
            self.kernels = KernelCache(self.engine, engine_bytes, self.device)
            self.stream = _blocking_stream()
            self.placeholder = torch.empty(ALIGNMENT, dtype=torch.uint8, device=self.device)
        if interface is not None:
            self.serve(interface)

    def serve(self, interface: Interface) -> None:
        """Take the calling convention, and make the first execution context, which says whether the GPU fits."""
        self.interface = interface
        self.names = [spec.name for spec in interface.inputs]
        self.dtypes = [spec.dtype for spec in interface.inputs]
        self.outputs = [(name, TORCH_DTYPES[self.engine.get_tensor_dtype(name)]) for name in interface.outputs]
        with _on(self.index):
            self.free[0] = [Execution(self)]
        self.kernels.save()

    @functools.cached_property
    def context(self) -> Any:
        """A context with memory of its own, for the module's caller."""
        return self.engine.create_execution_context()

    def refusal(self, log: Sequence[str]) -> EngineError:
        """Why TensorRT cannot use the engine here, in its own words."""
        name = torch.cuda.get_device_name(self.device)
        target = self.made_by.get("target", "an unknown GPU")
        return EngineError(
            f"The engine was built for {target}; {FLAVOUR} {VERSION} cannot use it on {name} (compute capability "
            f"{'.'.join(map(str, self.capability))}): {'; '.join(log) or 'it gave no reason'}."
        )

    def __call__(
        self, tensors: Sequence[torch.Tensor], graph: bool = False, borrow: bool = False
    ) -> list[torch.Tensor]:  # fmt: skip
        """The engine's outputs for these tensors, in the order of the caller's current stream."""
        if _current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(tensors, graph, borrow)
        stream = _current_stream(self.index)
        if graph and not _is_capturing():
            return self.replay(tensors, stream, borrow)
        execution = self.take(stream)
        try:
            outputs = execution.run(self, tensors, stream or self.stream)
        except BaseException:
            execution.shapes = None  # whatever it was told last is told again
            self.free.setdefault(stream, []).append(execution)
            raise
        if stream and _is_capturing():
            self.taken.append(execution)  # the graph works with its state from now on
        else:
            self.free.setdefault(stream, []).append(execution)
        return outputs

    def take(self, stream: int) -> Execution:
        """An execution context that nobody uses and whose last work was on this stream, or a new one."""
        try:
            return self.free[stream].pop()
        except (KeyError, IndexError):
            pass
        if stream and _is_capturing():
            raise EngineError(NOT_WARM)
        with self.lock:
            if sum(map(len, list(self.free.values()))) >= CONTEXTS:
                torch.cuda.synchronize(self.index)  # so that any of them may go
                self.free = {}
            return Execution(self)

    # CUDA graphs -----------------------------------------------------------------------------------------------------

    def replay(self, tensors: Sequence[torch.Tensor], stream: int, borrow: bool) -> list[torch.Tensor]:
        """The same by replaying a CUDA graph of this stream and these shapes, which the first call captures."""
        key = (stream, *(tensor.shape for tensor in tensors))
        with self.lock:  # a graph's inputs and outputs are in use from the copy in to the copy out
            graph = self.graphs.get(key)
            if graph is None or not graph.accepts(tensors):
                own = graph is not None
                graph = self.graphs[key] = Graph(self, tensors, own)
                if len(self.graphs) > GRAPHS:
                    torch.cuda.synchronize(self.index)  # it may be running
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            return graph.run(self, tensors, borrow)

    # Inputs ----------------------------------------------------------------------------------------------------------

    def usable(self, position: int, tensor: Any) -> torch.Tensor:
        """An input as TensorRT can read it: dense, aligned, and what it seems to be; `InputError` if it cannot be."""
        spec = self.interface.inputs[position]
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, the engine takes {spec.describe()}.")
        if tensor.dtype != spec.dtype:
            raise InputError(
                f"Input '{spec.name}' is {tensor.dtype}, the engine takes {spec.dtype}: {spec.describe()}."
            )
        if tensor.device != self.device:
            raise InputError(f"Input '{spec.name}' is on {tensor.device}, the engine on {self.device}.")
        try:
            tensor = tensor.detach().resolve_neg().contiguous()
            if not tensor.numel():
                return tensor
            address = tensor.data_ptr()
        except RuntimeError as error:
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, without memory to read: {error}") from error
        if not address:
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, without memory to read.")
        return tensor.clone() if address % ALIGNMENT else tensor

    def close(self) -> None:
        """Wait for the calls under way, and let go of the engine: what was made from what goes first."""
        torch.cuda.synchronize(self.index)
        self.kernels.save()
        self.graphs.clear()
        self.free, self.taken = {}, []
        self.__dict__.pop("context", None)
        self.kernels.cache = None
        self.engine = None
        self.runtime = None

    def __del__(self) -> None:
        if getattr(self, "kernels", None) is not None:
            with contextlib.suppress(Exception):  # Python or CUDA is closing down, and takes everything along
                self.close()


NOT_WARM = (
    "CUDA graph capture needs a context that has run with these shapes on this stream: call the module once on it, as "
    "the warm-up for a capture does, before each capture"
)


class Execution:
    """One execution context, and what it was last told, which is not told again."""

    def __init__(self, runtime: Runtime) -> None:
        with LOG.capture() as log:
            self.context = create_execution_context(runtime.engine, runtime.capability, runtime.kernels.cache)
        if self.context is None:
            raise runtime.refusal(log)
        self.shapes: list[Any] | None = None
        self.addresses: list[int] = []
        self.results: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self.scratch, self.scratch_address = 0, -1
        self.warm = False

    def run(self, runtime: Runtime, tensors: Sequence[torch.Tensor], stream: int) -> list[torch.Tensor]:
        """Enqueue one call on a stream; the outputs belong to torch's current one."""
        context = self.context
        shapes = [tensor.shape for tensor in tensors]
        if shapes != self.shapes or not self.warm:
            self.fit(runtime, tensors, shapes)
        addresses, dtypes, index, held = self.addresses, runtime.dtypes, runtime.index, []
        place = 0
        for tensor in tensors:
            if (
                tensor.dtype is not dtypes[place] or tensor.get_device() != index or not tensor.is_contiguous()
                or tensor.is_neg() or not (address := _address(tensor)) or address % ALIGNMENT
            ):  # fmt: skip
                tensor = runtime.usable(place, tensor)
                held.append(tensor)
                address = tensor.data_ptr() or runtime.placeholder.data_ptr()
            if address != addresses[place]:
                context.set_tensor_address(runtime.names[place], address)
                addresses[place] = address
            place += 1
        outputs = []
        for name, shape, stride, dtype in self.results:
            output = _empty(shape, stride, dtype)
            address = output.data_ptr() or runtime.placeholder.data_ptr()
            if address != addresses[place]:
                context.set_tensor_address(name, address)
                addresses[place] = address
            outputs.append(output)
            place += 1
        if self.scratch:
            scratch = _empty((self.scratch,), (1,), torch.uint8)
            if (address := scratch.data_ptr()) != self.scratch_address:
                context.set_device_memory(address, self.scratch)
                self.scratch_address = address
        with runtime.lock:  # TensorRT for RTX 1.6 crashes if a context is made while another one runs
            done = context.execute_async_v3(stream)
        if not done:
            raise EngineError("TensorRT could not run the engine: " + ("; ".join(LOG.recent()) or "it gave no reason"))
        self.warm = True
        return outputs

    def fit(self, runtime: Runtime, tensors: Sequence[torch.Tensor], shapes: list[Any]) -> None:
        """Prepare for other shapes than those of the last call."""
        context = self.context
        if len(tensors) == len(runtime.dtypes):
            for place, tensor in enumerate(tensors):
                runtime.usable(place, tensor)
        sizes = [tuple(shape) for shape in shapes]
        runtime.interface.check(sizes, [tensor.dtype for tensor in tensors])
        if _is_capturing():
            raise EngineError(NOT_WARM)
        self.shapes, self.warm = None, False
        with LOG.capture() as log:
            for name, shape in zip(runtime.names, sizes, strict=True):
                if not context.set_input_shape(name, shape):
                    raise InputError(f"TensorRT refuses the shape {shape} of input '{name}': {'; '.join(log)}")
            self.scratch = context.update_device_memory_size_for_shapes()
        if self.scratch < 0:
            raise EngineError("TensorRT cannot tell how much memory these shapes need: " + "; ".join(log))
        self.results = []
        for name, dtype in runtime.outputs:
            shape = tuple(context.get_tensor_shape(name))
            self.results.append((name, shape, _contiguous_strides(shape), dtype))
        self.addresses = [-1] * (len(sizes) + len(self.results))
        self.scratch_address = -1
        self.shapes = shapes


class Graph:
    """A captured call: the engine on fixed inputs and outputs, replayed as one piece.

    It is captured on the tensors of its first call, so that a caller who passes the same ones again copies nothing. A
    call with others makes it be captured again, on inputs of its own.
    """

    def __init__(self, runtime: Runtime, tensors: Sequence[torch.Tensor], own: bool) -> None:
        stream = torch.cuda.Stream(runtime.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            usable = [runtime.usable(i, tensor) for i, tensor in enumerate(tensors)]
            self.own = own or any(a.data_ptr() != b.data_ptr() for a, b in zip(usable, tensors, strict=True))
            self.inputs = [x.clone() for x in usable] if self.own else [x.detach() for x in tensors]
            self.execution = Execution(runtime)
            self.execution.run(runtime, self.inputs, stream.cuda_stream)  # what happens once must not be captured
            if not getattr(self.execution.context, "is_stream_capturable", lambda _: True)(stream.cuda_stream):
                raise EngineError("TensorRT cannot run this engine in a CUDA graph: call it with cuda_graph = False.")
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.outputs = self.execution.run(runtime, self.inputs, stream.cuda_stream)
            finally:
                self.graph.capture_end()
        self.addresses = [x.data_ptr() for x in self.inputs]
        torch.cuda.current_stream().wait_stream(stream)

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self.own or all(
            t.data_ptr() == address and t.is_contiguous() for t, address in zip(tensors, self.addresses, strict=True)
        )

    def run(self, runtime: Runtime, tensors: Sequence[torch.Tensor], borrow: bool) -> list[torch.Tensor]:
        dtypes, index = runtime.dtypes, runtime.index
        for place, tensor in enumerate(tensors):
            if tensor.dtype is not dtypes[place] or tensor.get_device() != index or tensor.is_neg():
                tensor = runtime.usable(place, tensor)
            if tensor.data_ptr() != self.addresses[place]:
                self.inputs[place].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs if borrow else [output.clone() for output in self.outputs]


def _on(index: int) -> Any:
    """Make a GPU the current one."""
    return contextlib.nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _blocking_stream() -> int:
    """A stream that CUDA orders with its default stream, as those of torch are not."""
    handle = ctypes.c_void_p(0)
    error = torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))
    if int(error):
        raise EngineError(f"CUDA gives no stream to run on: {error}.")
    return handle.value or 0


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # fake, or inside of torch.vmap
        return 0


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate([1, *(max(s, 1) for s in reversed(shape[1:]))], lambda a, b: a * b))[
        : len(shape)
    ][::-1]


def _public_empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


try:  # half the host time of the public one; torch.compile allocates with it
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty
except ImportError:
    _empty = _public_empty


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of layout {value.layout} on {value.device}"
