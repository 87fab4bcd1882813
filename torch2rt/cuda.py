"""What torch does not say about CUDA, or says too slowly for every call: the current stream, memory, plain copies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Sequence
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


def blocking_stream() -> int:
    """A stream that CUDA orders with its default stream, as those of torch are not."""
    handle = ctypes.c_void_p(0)
    error = torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))
    if int(error):
        raise EngineError(f"CUDA gives no stream to run on: {error}.")
    return handle.value or 0


def copy(target: int, source: int, size: int, stream: int) -> None:
    """Copy bytes from one address on a GPU to another, in a stream's order, in a quarter of a `Tensor.copy_`'s time."""
    error = _driver().cuMemcpyDtoDAsync_v2(target, source, size, stream)
    if error:
        raise EngineError(f"CUDA could not copy {size} bytes: error {error}.")


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    library.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return library
