"""What torch does not say about CUDA, or says too slowly for every call: the current stream, memory, plain copies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torch2rt.errors import EngineError

# torch.cuda.current_stream() makes an object, which takes 4 us; a torch without CUDA has none of these
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


def public_empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the current GPU, not yet filled."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


try:  # half the host time of the public one; torch.compile allocates with it
    from torch._C._dynamo.guards import _empty_strided_cuda as empty
except ImportError:
    empty = public_empty


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a dense tensor of this shape."""
    sizes = [max(size, 1) for size in reversed(shape[1:])]
    return tuple(itertools.accumulate([1, *sizes], lambda a, b: a * b))[: len(shape)][::-1]


def on_device(index: int) -> Any:
    """Make a GPU the current one."""
    return contextlib.nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


@functools.cache
def driver_version() -> str:
    """The version of NVIDIA's driver, which torch does not tell; nothing if there is none."""
    text = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError):  # there is no NVML where the GPU is part of the chip
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    ask = getattr(torch._C, "_cuda_getDriverVersion", int)
    return str(ask() or "")


NO_CONTEXT = 201  # of CUDA's errors: see `enter_context`


class CaptureError(EngineError):
    """CUDA could not record work in a graph."""


# The driver -----------------------------------------------------------------------------------------------------------


def make_stream(blocking: bool) -> int:
    """A new stream on the current GPU. A blocking one is ordered by CUDA with its default stream; torch's are not."""
    handle = ctypes.c_void_p(0)
    _call("cuStreamCreate", ctypes.byref(handle), 0 if blocking else 1)
    return handle.value or 0


def destroy_stream(stream: int) -> None:
    """Let go of a stream of `make_stream`; what is enqueued on it is still done."""
    _call("cuStreamDestroy_v2", stream)


def synchronize(stream: int) -> bool:
    """Wait for a stream alone; `False`, at once, if it is being captured."""
    status = ctypes.c_int(0)
    if _driver().cuStreamIsCapturing(stream, ctypes.byref(status)) or status.value:
        return False  # an error: it is the default stream, and another is being captured that is ordered with it
    _call("cuStreamSynchronize", stream)
    return True


class Copy:
    """A copy within a captured graph, whose addresses may be others at each replay.

    Changing one takes a third of the host time of a copy beside the graph, and does not affect replays under way.
    """

    SOURCE, TARGET = 6, 17  # places in CUDA_MEMCPY3D, all of whose members are as wide as an address

    def __init__(self, executable: int, node: int | None, parameters: Any, context: int | None) -> None:
        self.parameters = parameters
        self.arguments = executable, node, ctypes.addressof(parameters), context
        self.set = _driver().cuGraphExecMemcpyNodeSetParams

    def move(self, end: int, address: int) -> None:
        """Read from (`SOURCE`) or write to (`TARGET`) another address of the same size."""
        if self.parameters[end] != address:
            self.parameters[end] = address
            if error := self.set(*self.arguments):
                self.parameters[end] = 0  # unknown
                raise EngineError(f"CUDA cannot change a copy of a graph: error {error}.")


class CapturedGraph:
    """What one thread enqueues on one stream within `with`, recorded instead of done, to be replayed as one piece.

    The stream is one of `make_stream(blocking=False)`, which nobody else uses meanwhile. CUDA's own stream capture
    records it, in the mode that concerns this thread alone. `torch.cuda.CUDAGraph` would tell torch's default generator
    and its allocator too: other threads could then draw no random numbers until the capture has ended. Torch does not
    hear of this capture, so the memory that the work uses is allocated before, and belongs to whoever keeps the graph.

    CUDA lets no thread wait for the whole device during a capture. So the calls that it consists of do not let go of
    Python's lock, for another thread may take it for milliseconds: a capture is to take as long as its own calls do.

    Raises `CaptureError` at the end of the block if CUDA could not record the work.
    """

    THREAD_LOCAL, FREE_ON_LAUNCH = 1, 1  # of CUstreamCaptureMode, of CUgraphInstantiate_flags

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.graph, self.executable = ctypes.c_void_p(0), ctypes.c_void_p(0)

    def __enter__(self) -> CapturedGraph:
        if error := _driver(alone=True).cuStreamBeginCapture_v2(self.stream, self.THREAD_LOCAL):
            raise CaptureError(f"CUDA cannot begin to capture a graph: error {error}")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        error = _driver(alone=True).cuStreamEndCapture(self.stream, ctypes.byref(self.graph))
        if error == 0 and kind is None:
            error = _driver().cuGraphInstantiateWithFlags(
                ctypes.byref(self.executable), self.graph, self.FREE_ON_LAUNCH
            )
        if error and kind is None:
            raise CaptureError(f"CUDA cannot capture a graph: error {error}")

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes from one address on the GPU to another, as part of the work."""
        if error := _driver(alone=True).cuMemcpyDtoDAsync_v2(target, source, size, self.stream):
            raise CaptureError(f"CUDA cannot capture a copy: error {error}")

    def replay_on(self, stream: int) -> Callable[[], int]:
        """A function that enqueues the work on a stream, and gives CUDA's error, 0 for none."""
        return functools.partial(_driver().cuGraphLaunch, self.executable, ctypes.c_void_p(stream))

    def copies(self) -> dict[tuple[int, int], Copy]:
        """The copies among the work, by target and source."""
        library, count, context = _driver(), ctypes.c_size_t(0), ctypes.c_void_p(0)
        _call("cuCtxGetCurrent", ctypes.byref(context))
        _call("cuGraphGetNodes", self.graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        _call("cuGraphGetNodes", self.graph, nodes, ctypes.byref(count))
        found = {}
        for node in nodes:
            parameters = (ctypes.c_uint64 * 25)()
            if library.cuGraphMemcpyNodeGetParams(node, parameters) == 0:  # else it is no copy
                ends = parameters[Copy.TARGET], parameters[Copy.SOURCE]
                found[ends] = Copy(self.executable.value or 0, node, parameters, context.value)
        return found

    def __del__(self) -> None:
        try:  # noqa: SIM105  (at the end of the process, this file's names may be gone)
            self._destroy()
        except Exception:
            pass  # CUDA is closing down, and takes everything along

    def _destroy(self) -> None:
        with beside_captures():
            if self.executable:
                _driver().cuGraphExecDestroy(self.executable)  # if it is running, it is done first
            if self.graph:
                _driver().cuGraphDestroy(self.graph)


class CapturePlace:
    """Where calls of torch are captured: a stream, and memory that torch gives to nothing but work on this stream.

    So a replay finds the memory that its work was captured with. Works that were captured in one place share what each
    needs while it runs: the workspace of a cuBLAS handle, for one, is that of a stream. So all of them are replayed on
    one stream, under `lock`, and work is prepared and captured under `lock` after what that stream does.
    The place belongs to the GPU that was the current one.
    """

    def __init__(self, index: int) -> None:
        self.index, self.stream = index, make_stream(blocking=False)
        self.pool, self.lock = torch.cuda.MemPool(), threading.RLock()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread work on the stream and take memory from there, after what torch's current stream does.

        That stream then waits for the work.
        """
        callers, stream = torch.cuda.current_stream(), torch.cuda.ExternalStream(self.stream, device=self.index)
        stream.wait_stream(callers)
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self.pool, self.index):
                yield
        finally:
            callers.wait_stream(stream)

    def held(self) -> int:
        """The bytes of the memory."""
        return sum(segment["total_size"] for segment in self.pool.snapshot())

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # CUDA is closing down, and takes everything along
            destroy_stream(self.stream)


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Allow this thread to allocate and to wait, which breaks what other threads capture in CUDA's default mode."""
    mode = ctypes.c_int(2)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def enter_context(index: int) -> None:
    """Give this thread the context of its current GPU, if it has none.

    A thread gets it with its first call of CUDA's runtime; without it the driver refuses most calls of this file.
    """
    context = ctypes.c_void_p(0)
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _call("cuCtxSetCurrent", _primary_context(index))


@functools.cache
def _primary_context(index: int) -> int:
    device, context = ctypes.c_int(0), ctypes.c_void_p(0)
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context.value or 0


def is_torchs(stream: int, index: int) -> bool:
    """Whether the current stream of a GPU, with this handle, is torch's own, which lives as long as the process.

    An `ExternalStream` is anyone's: it may be destroyed at any time, and its handle be another stream's from then on.
    """
    return not stream or torch._C._cuda_getCurrentStream(index)[0] != stream


def _call(name: str, *arguments: Any) -> None:
    error = getattr(_driver(), name)(*arguments)
    if error:
        raise EngineError(f"{name} failed: CUDA error {error}.")


@functools.cache
def _driver(alone: bool = False) -> Any:
    """CUDA's driver; other threads of Python run during its calls, unless they are to be made `alone`."""
    library = (ctypes.PyDLL if alone else ctypes.CDLL)("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    pointer = ctypes.c_void_p
    for name, arguments in {
        "cuMemcpyDtoDAsync_v2": [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, pointer],
        "cuStreamDestroy_v2": [pointer],
        "cuStreamSynchronize": [pointer],
        "cuStreamIsCapturing": [pointer, pointer],
        "cuStreamBeginCapture_v2": [pointer, ctypes.c_int],
        "cuStreamEndCapture": [pointer] * 2,
        "cuGraphInstantiateWithFlags": [pointer, pointer, ctypes.c_ulonglong],
        "cuGraphLaunch": [pointer] * 2,
        "cuGraphExecDestroy": [pointer],
        "cuGraphDestroy": [pointer],
        "cuCtxSetCurrent": [pointer],
        "cuGraphGetNodes": [pointer] * 3,
        "cuGraphMemcpyNodeGetParams": [pointer] * 2,
        "cuGraphExecMemcpyNodeSetParams": [pointer] * 4,
    }.items():
        getattr(library, name).argtypes = arguments
    return library
