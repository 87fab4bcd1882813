"""An engine deserialized on one GPU, and all that its calls share there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch2rt.backend import cuda, plugins
from torch2rt.backend.cuda import on_device
from torch2rt.backend.quirks import create_execution_context, why_no_dynamic_shapes
from torch2rt.backend.tensorrt import FLAVOUR, LOG, TORCH_DTYPES, VERSION, scratch_of_all_shapes, trt
from torch2rt.engine.engine import Engine
from torch2rt.errors import EngineError
from torch2rt.runtime.fits import Fits
from torch2rt.runtime.inputs import ALIGNMENT, Inputs
from torch2rt.runtime.kernel_cache import KernelCache
from torch2rt.runtime.shared_lock import SharedLock

SHARE = 64  # scratch memory of up to this part of a GPU's may be taken for all shapes alike


class Deserialized(NamedTuple):
    """TensorRT's objects for a plan on a GPU: the `ICudaEngine`, and the `Runtime` that must outlive it."""

    device: torch.device
    runtime: Any
    engine: Any


def deserialize(data: bytes | memoryview, made_by: Mapping[str, str], index: int | None = None) -> Deserialized:
    """Have TensorRT read a plan, on this GPU or the current one; raises `EngineError` where it cannot be used."""
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
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    plugins.register()
    with on_device(device.index), cuda.beside_captures(), LOG.capture() as log:
        runtime = trt.Runtime(LOG)
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise _refusal(made_by, device, log)
    return Deserialized(device, runtime, engine)


class LoadedEngine:
    """A deserialized engine with one copy of its weights, of which any number of execution contexts are made.

    - `profiles`: how many optimization profiles it has that calls choose from.
    - `inputs`: what it takes; `outputs`: name and dtype of what it gives.
    - `scratch`: the bytes of scratch memory that serve all shapes; `None` where that is much, or shapes never change.
    - `fits`: what is known of shapes, for all contexts.
    - `lock`: shared by the contexts that run. One is made, and runs at other shapes, under `lock.exclusive()` (see
      `torch2rt.backend.quirks.runs_alone_at_other_shapes`).
    - `kernels`: what TensorRT for RTX has compiled for this GPU.
    - `placeholder`: memory whose address stands for tensors without elements, which have none.
    - `refitter`: what has changed the weights before, as it compiles when it first does; `None` until then.
    """

    def __init__(self, built: Engine, index: int | None = None, deserialized: Deserialized | None = None) -> None:
        """Load an engine on a GPU, the current one if not given; `deserialized` is its plan's, if that was done."""
        self.made_by, self.interface = built.made_by, built.interface
        loaded = deserialized or deserialize(built.data, built.made_by, index)
        self.device, self.engine, self.runtime = loaded.device, loaded.engine, loaded.runtime
        self.index = self.device.index
        self.refitter: Any = None
        self._limit_weights(built.facts.get("built", {}).get("options", {}).get("weight_budget"))
        self.capability = torch.cuda.get_device_capability(self.device)
        if any(spec.dynamic for spec in self.interface.inputs) and (reason := why_no_dynamic_shapes(self.capability)):
            raise EngineError(reason)
        self.profiles = len(self.interface.profiles)
        self.lock = SharedLock()
        self.fits = Fits()
        self.scratch = self._scratch_of_all_shapes()
        self.inputs = Inputs(self.interface, self.device)
        self.outputs = [(name, TORCH_DTYPES[self.engine.get_tensor_dtype(name)]) for name in self.interface.outputs]
        with on_device(self.index), cuda.beside_captures():
            self.kernels = KernelCache(self.engine, built.data, self.device, built.kernels)
            self.placeholder = torch.empty(ALIGNMENT, dtype=torch.uint8, device=self.device)

    def _limit_weights(self, budget: int | None) -> None:
        """Have weights beyond so many bytes stream from the host's memory; before any execution context is made."""
        if budget is None:
            return
        wanted = min(budget, self.engine.streamable_weights_size)
        with on_device(self.index), cuda.beside_captures(), LOG.capture() as log:
            self.engine.weight_streaming_budget_v2 = wanted
            got = self.engine.weight_streaming_budget_v2
        if got != wanted:
            raise EngineError(f"TensorRT keeps {got} bytes of weights on the GPU, not {wanted}: {'; '.join(log)}.")

    def _scratch_of_all_shapes(self) -> int | None:
        """The bytes that serve every call, if shapes change at all and that is little beside the GPU's memory."""
        size = scratch_of_all_shapes(self.engine)
        most = torch.cuda.get_device_properties(self.device).total_memory // SHARE
        return size if any(spec.dynamic for spec in self.interface.inputs) and size <= most else None

    def create_context(self, own_memory: bool = False) -> Any:
        """An `IExecutionContext`, with scratch memory of its own or none; `None` if TensorRT refuses."""
        return create_execution_context(self.engine, self.capability, self.kernels.cache, own_memory)

    def refusal(self, log: Sequence[str]) -> EngineError:
        """The error that TensorRT cannot use the engine on this GPU, in its own words."""
        return _refusal(self.made_by, self.device, log)

    def close(self) -> None:
        """Let go of the engine, when nothing that was made of it is left."""
        self.kernels.cache = None
        self.refitter = None
        self.engine = None
        self.runtime = None


def _refusal(made_by: Mapping[str, str], device: torch.device, log: Sequence[str]) -> EngineError:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return EngineError(
        f"The engine was built for {made_by.get('target', 'an unknown GPU')}; {FLAVOUR} {VERSION} cannot use it on "
        f"{name} (compute capability {'.'.join(map(str, capability))}): {'; '.join(log) or 'it gave no reason'}."
    )
