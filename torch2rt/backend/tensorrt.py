"""The one seam to TensorRT: which package is installed, and where 10.x, 11.x and TensorRT for RTX differ.

Everyone else imports `trt` from here and takes enums by name. Capabilities are asked of the bindings themselves, never
of a version string: the 1.x numbers of TensorRT for RTX mean nothing next to 10 and 11.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

PACKAGES = ("tensorrt", "tensorrt_rtx")
ENVIRONMENT = "TORCH2RT_TENSORRT"
_HINT = (
    "torch2rt needs NVIDIA TensorRT and found none. Install one of\n"
    "    pip install 'torch2rt[rtx]'        # TensorRT for RTX: builds engines without a GPU, runs on RTX GPUs\n"
    "    pip install 'torch2rt[tensorrt]'   # TensorRT 10.x or 11.x\n"
    "and run `torch2rt doctor` to see what is there."
)


def installed() -> list[str]:
    """The TensorRT packages that can be imported here, in order of preference."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def _import() -> Any:
    asked = os.environ.get(ENVIRONMENT)
    if asked and asked not in PACKAGES:
        raise ImportError(f"{ENVIRONMENT}={asked!r} is not one of {', '.join(PACKAGES)}.")
    names = [asked] if asked else installed()
    failures = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            failures.append(f"{name}: {error}")
    raise ImportError("\n".join([_HINT, *failures]))


trt = _import()
FLAVOUR: str = trt.__name__.split(".")[0]
VERSION: str = trt.__version__
IS_RTX = FLAVOUR == "tensorrt_rtx"

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: trt.DataType.FLOAT,
    torch.float16: trt.DataType.HALF,
    torch.bfloat16: trt.DataType.BF16,
    torch.int64: trt.DataType.INT64,
    torch.int32: trt.DataType.INT32,
    torch.int8: trt.DataType.INT8,
    torch.uint8: trt.DataType.UINT8,
    torch.bool: trt.DataType.BOOL,
}
TORCH_DTYPES: dict[Any, torch.dtype] = {value: key for key, value in DTYPES.items()}
QUANTIZED: dict[torch.dtype, Any] = {  # numbers in front of a layer that brings them back; int4 is two in a byte
    torch.int8: trt.DataType.INT8,
    torch.float8_e4m3fn: trt.DataType.FP8,
    torch.uint8: trt.DataType.INT4,
}


LOGGER = logging.getLogger("torch2rt")
LEVELS = {0: logging.CRITICAL, 1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}


class Log(trt.ILogger):  # type: ignore[name-defined,misc]
    """The process's one TensorRT logger. It gives messages out from `level` up, and errors to whoever captures them.

    Messages are records of Python's logger `torch2rt`: those from `level` up, and those that the logger is set to take.
    Where logging has no handlers, those from `level` up are printed. Captured errors are records too, of level DEBUG:
    they are either expected, or part of an exception.

    TensorRT also logs from threads of its own; such lines go to every capture that is open.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.level = int(trt.ILogger.Severity.ERROR)
        self._captures: dict[int, list[_Capture]] = {}  # per thread, innermost last
        self._recent: collections.deque[tuple[int, str]] = collections.deque(maxlen=32)  # errors, with their threads
        self._lock = threading.Lock()

    def log(self, severity: Any, message: str) -> None:
        with self._lock:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self._recent.append((threading.get_ident(), message))
            mine = self._captures.get(threading.get_ident(), [])[-1:]
            captures = mine or [stack[-1] for stack in self._captures.values()]
        level = LEVELS[int(severity)]
        is_asked_for = int(severity) <= max([c.level for c in captures], default=self.level)
        if captures and int(severity) <= int(trt.ILogger.Severity.ERROR):
            for capture in captures:
                capture.errors.append(message)
            level, is_asked_for = logging.DEBUG, False
        if not LOGGER.hasHandlers():
            if is_asked_for:
                print(f"[TensorRT] {message}", file=sys.stderr)
        elif is_asked_for or LOGGER.isEnabledFor(level):
            LOGGER.handle(LOGGER.makeRecord(LOGGER.name, level, "TensorRT", 0, message, (), None))

    def recent(self) -> list[str]:
        """This thread's last errors, for calls that cannot afford a capture; they are forgotten with that."""
        with self._lock:
            mine = [message for ident, message in self._recent if ident == threading.get_ident()]
            self._recent = collections.deque((e for e in self._recent if e[1] not in mine), maxlen=32)
        return mine

    @contextmanager
    def capture(self, level: Any = None) -> Iterator[list[str]]:
        """Collect this thread's errors instead of printing them, and print the rest from `level` up."""
        capture = _Capture(self.level if level is None else int(level), [])
        ident = threading.get_ident()
        with self._lock:
            self._captures.setdefault(ident, []).append(capture)
        try:
            yield capture.errors
        finally:
            with self._lock:
                self._captures[ident].pop()
                if not self._captures[ident]:
                    del self._captures[ident]


class _Capture(NamedTuple):
    level: int
    errors: list[str]


LOG = Log()


def create_builder() -> Any:
    """A builder on the process's logger."""
    return trt.Builder(LOG)


def create_network(builder: Any) -> Any:
    """An empty, strongly typed network."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def type_of_layer(layer: Any) -> Any:
    """A layer's `LayerType`, also while it is looked at as an activation or a pooling, whose own `type` hides it.

    Python has one object for a layer, so another thread may be doing so.
    """
    return trt.ILayer.type.__get__(layer)


def add_normalization(network: Any, input: Any, scale: Any, bias: Any, axes: int) -> Any:
    """The newest normalization layer there is; without groups both versions mean the same."""
    add = getattr(network, "add_normalization_v2", None) or network.add_normalization
    return add(input, scale, bias, axes)


def scales_groups_by_channel() -> bool:
    """Whether a normalization over groups is scaled per channel, as the newer layer does, or per group."""
    return hasattr(trt.INetworkDefinition, "add_normalization_v2")


def has_attention() -> bool:
    """Whether networks have a fused attention layer (TensorRT 10.14 and later, and every TensorRT for RTX)."""
    return hasattr(trt.INetworkDefinition, "add_attention") or hasattr(trt.INetworkDefinition, "add_attention_v2")


def add_attention(network: Any, query: Any, key: Any, value: Any, causal: bool) -> Any:
    """Softmax attention, in one kernel where there is one; if `causal`, query i sees the keys up to i."""
    norm = trt.AttentionNormalizationOp.SOFTMAX
    if hasattr(network, "add_attention_v2"):
        kind = trt.CausalMaskKind.UPPER_LEFT if causal else trt.CausalMaskKind.NONE
        layer = network.add_attention_v2(query, key, value, norm, kind)
    else:
        layer = network.add_attention(query, key, value, norm, causal)
    layer.decomposable = True
    return layer


def has_plugins() -> bool:
    """Whether networks take plugins: TensorRT 10 and 11, and no TensorRT for RTX."""
    return hasattr(trt.INetworkDefinition, "add_plugin_v3")


def has_cumulative() -> bool:
    """Whether networks have a layer for running sums (not in TensorRT 10.3, but in every TensorRT for RTX)."""
    return hasattr(trt.INetworkDefinition, "add_cumulative")


def can_slice_axes() -> bool:
    """Whether a slice layer can name the axes it works on and leave the others alone."""
    return hasattr(trt.ISliceLayer, "axes")


def set_compute_capabilities(config: Any, capabilities: Sequence[str]) -> None:
    """Ask TensorRT for RTX for engines that run on these GPUs, `"current"` or `"8.9"`; none means all it can."""
    names = [c.upper() if c.lower() == "current" else "SM" + c.replace(".", "") for c in capabilities]
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM") or name == "CURRENT"}
    for asked, name in zip(capabilities, names, strict=True):
        if name not in known:
            choices = sorted(f"{n[2:-1]}.{n[-1]}" for n in known if n.startswith("SM"))
            raise ValueError(
                f"compute_capabilities={asked!r}: this TensorRT for RTX knows 'current', {', '.join(choices)}."
            )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def is_listed(capability: tuple[int, int]) -> bool:
    """Whether this TensorRT names GPUs of a compute capability among those it builds for; only that for RTX does."""
    if not IS_RTX:
        return True
    return hasattr(trt.ComputeCapability, f"SM{capability[0]}{capability[1]}")


def scratch_of_all_shapes(engine: Any) -> int:
    """The bytes of scratch memory with which a context runs at every shape that the engine serves."""
    return int(engine.device_memory_size_v2)


def has_weight_streaming() -> bool:
    """Whether engines can keep weights in the host's memory, of which each call brings what it needs to the GPU."""
    return hasattr(trt.BuilderFlag, "WEIGHT_STREAMING") and hasattr(trt.ICudaEngine, "weight_streaming_budget_v2")


def builds_without_gpu() -> bool:
    """Whether engines are built without a GPU, for GPUs that `compute_capabilities` names: TensorRT for RTX alone."""
    return IS_RTX


def has_runtime_cache() -> bool:
    """Whether kernels are compiled when an execution context is made, and can be kept: TensorRT for RTX alone."""
    return IS_RTX


def has_timing_cache() -> bool:
    """Whether the builder measures kernels on the GPU, and can keep what it measured: not TensorRT for RTX."""
    return not IS_RTX
