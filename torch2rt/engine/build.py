"""Build: turn a network into an engine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from torch2rt.arguments import compute_capabilities as compute_capabilities_of
from torch2rt.arguments import severity, whole_number
from torch2rt.backend.float32 import convolutions_in_tf32, products_in_tf32
from torch2rt.backend.quirks import builds_refittable, computes_in_tf32_unasked
from torch2rt.backend.tensorrt import (
    DTYPES,
    FLAVOUR,
    LOG,
    LOGGER,
    VERSION,
    builds_without_gpu,
    has_timing_cache,
    has_weight_streaming,
    set_compute_capabilities,
    trt,
    type_of_layer,
)
from torch2rt.engine.engine import Engine
from torch2rt.engine.fingerprint import present
from torch2rt.engine.report import Report
from torch2rt.engine.timing_cache import TimingCache
from torch2rt.engine.weights import FACT, told
from torch2rt.errors import BuildError, InputError
from torch2rt.interface import Interface
from torch2rt.interrupts import interruptible
from torch2rt.network import Network
from torch2rt.progress import is_shown

MATMULS = ("MATRIX_MULTIPLY", "EINSUM", "ATTENTION_INPUT", "ATTENTION_OUTPUT")
CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")


def build(
    network: Network,
    *,
    max_workspace_size: int | None = None,
    compute_capabilities: Any = None,
    optimization_level: int | None = None,
    tf32: bool | None = None,
    progress: bool | None = None,
    log_level: Any = None,
    weight_budget: int | None = None,
    configure: Callable[[Any], None] | None = None,
    refittable: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Engine:
    """Build the engine of a network from `torch2rt.lower`, for `TRTModule(engine)`.

    - `max_workspace_size`: bytes of scratch memory that a layer may use; TensorRT's own limit if not given.
    - `compute_capabilities`: for TensorRT for RTX, the GPUs to build for, such as `["8.6", "8.9"]`, `[8.6, (8, 9)]` or
      `["current"]`.
      The present GPU if there is one, otherwise every GPU one engine can serve (`[]`).
    - `optimization_level`: 0 (quick to build) to 5 (thorough); TensorRT's default is 3.
    - `tf32`: whether float32 convolutions and matrix products may round their inputs to TF32. By default as torch is
      set (`torch.backends.cudnn.allow_tf32`, `torch.backends.cuda.matmul.allow_tf32`): only if every kind that the
      network has may. TensorRT for RTX uses TF32 whatever it is told, unless the environment variable
      `NVIDIA_TF32_OVERRIDE=0` is set when Python starts, to build and to run; without it `tf32=False` is refused.
    - `progress`: show a progress bar; by default where stderr is a terminal.
    - `log_level`: a `trt.Logger.Severity` or its name, such as `"verbose"`, from which on TensorRT's messages are given
      out; its errors by default. They go to Python's logger `torch2rt`, or to stderr where logging has no handlers.
    - `weight_budget`: the bytes of the GPU's memory that weights may take. The others stay in the host's memory, and
      each call streams them. 0 streams all that can be. It is kept with the engine; a TensorRT that has no weight
      streaming is an `InputError`.
    - `configure`: called with the `IBuilderConfig` last, for what has no argument here.
    - `refittable`: let the weights of the engine be changed, where TensorRT can; `engine.made_by` then has an entry
      `refittable`. Where it cannot build such an engine, it builds another.
    - `meanwhile`: called while TensorRT works in a thread of its own; it must not use the network. What it raises ends
      the build.

    Ctrl-C raises `KeyboardInterrupt` within a second. TensorRT may then go on for a while in a thread: it stops at its
    next step, and another build of this network waits for that.

    What TensorRT measures on the GPU while it builds is kept for later builds (see `torch2rt.backend.disk_cache`);
    `configure` may give the config another timing cache. TensorRT for RTX measures nothing.

    Raises `BuildError` with TensorRT's log.

    >>> from torch2rt import build, lower, trace
    >>> type(build(lower(trace(torch.nn.ReLU(), [torch.randn(2, 3)]))))
    <class 'torch2rt.engine.engine.Engine'>
    """
    builder, definition = network.builder, network.definition
    config = builder.create_builder_config()
    if (size := whole_number("max_workspace_size", max_workspace_size)) is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if (level := whole_number("optimization_level", optimization_level, 0, 5)) is not None:
        config.builder_optimization_level = level
    log_level = severity(log_level)
    if (budget := whole_number("weight_budget", weight_budget, 0)) is not None:
        if not has_weight_streaming():
            raise InputError(f"{weight_budget=}: {FLAVOUR} {VERSION} has no weight streaming.")
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if tf32 is False and uses_tf32(definition):
        raise InputError(
            f"tf32=False: {FLAVOUR} {VERSION} computes float32 products in TF32 whatever the builder is told. Start "
            "Python with the environment variable NVIDIA_TF32_OVERRIDE=0, to build and to run the engine."
        )
    _set_flag(config, trt.BuilderFlag.TF32, _torch_allows_tf32(definition) if tf32 is None else tf32)
    if builds_without_gpu():
        try:
            set_compute_capabilities(config, capabilities_asked(compute_capabilities))
        except ValueError as error:
            raise InputError(str(error)) from error
    elif compute_capabilities is not None and capabilities_asked(compute_capabilities):
        raise InputError(
            f"{compute_capabilities=}: {FLAVOUR} {VERSION} builds for the GPU it runs on; only RTX can choose."
        )
    _add_profiles(builder, config, network.interface)
    timings = TimingCache(config) if has_timing_cache() else None
    if configure is not None:
        configure(config)
    plan = None
    if refits := refittable and builds_refittable() and _name_weights(network):
        config.set_flag(trt.BuilderFlag.REFIT)
        plan, log = _serialize(network, config, progress, log_level, meanwhile)
        if plan is None:
            refits = False
            config.clear_flag(trt.BuilderFlag.REFIT)
    if plan is None:
        plan, log = _serialize(network, config, progress, log_level, meanwhile)
    if plan is None:
        said = [line for line in log if "CUDA driver version is insufficient" not in line] or log
        raise BuildError(f"{FLAVOUR} {VERSION} could not build the network:\n" + "\n".join(said[:20]))
    if timings is not None:
        timings.save()
    made_by = {"flavour": FLAVOUR, "version": VERSION, "target": target(compute_capabilities)}
    needs = [text for _, text in network.interface.constraints]
    report = Report(assumptions=list(network.assumptions), needs=needs)
    with network.building:  # TensorRT must not build a network while it is read
        facts = network.facts()
    if refits:
        made_by["refittable"] = "all weights"
        facts[FACT] = [told(network)]
    elif refittable:
        LOGGER.warning("%s %s cannot change the weights of an engine here: a refit builds it again.", FLAVOUR, VERSION)
    asked = capabilities_asked(compute_capabilities) if builds_without_gpu() else None
    facts["built"] = present(
        {
            "max_workspace_size": size,
            "compute_capabilities": asked,
            "optimization_level": level,
            "tf32": tf32,
            "weight_budget": budget,
            "configure": configure is not None,
        }
    )
    return Engine(bytes(plan), network.interface, made_by, report, facts)


def _name_weights(network: Network) -> bool:
    """Give the weights the names by which an engine is refitted; `False` if TensorRT does not take them."""
    names = network.weight_names()
    tensors = {weight.number: weight.tensor for weight in network.weights.values()}
    with network.building, LOG.capture():
        for number in {name: number for number, name in reversed(names.items())}.values():
            tensor = tensors[number]
            if tensor.dtype not in DTYPES:  # fp8
                return False
            weights = trt.Weights(DTYPES[tensor.dtype], tensor.data_ptr(), tensor.numel())
            if not network.definition.set_weights_name(weights, names[number]):
                return False
    return True


def capabilities_asked(asked: Any) -> list[str]:
    """The GPUs to build for; none means all that one engine can serve."""
    return compute_capabilities_of(asked) if asked is not None else ["current"] if torch.cuda.is_available() else []


def target(compute_capabilities: Any = None) -> str:
    """What an engine built now with these `compute_capabilities` runs on, in words."""
    asked = capabilities_asked(compute_capabilities)
    if builds_without_gpu() and not asked:
        return "every GPU that one engine can serve"
    if builds_without_gpu() and [c.lower() for c in asked] != ["current"]:
        return f"compute capability {', '.join(asked)}"
    if not torch.cuda.is_available():
        return "this machine"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _set_flag(config: Any, flag: Any, value: bool) -> None:
    (config.set_flag if value else config.clear_flag)(flag)


def uses_tf32(definition: Any) -> bool:
    """Whether TensorRT computes some layer of this network in TF32 without asking."""
    return computes_in_tf32_unasked() and _has(definition, MATMULS + CONVOLUTIONS)


def _has(definition: Any, kinds: Sequence[str]) -> bool:
    """Whether the network has a layer of one of these kinds on float32."""
    types = {getattr(trt.LayerType, name, None) for name in kinds}
    layers = (definition.get_layer(i) for i in range(definition.num_layers))
    return any(type_of_layer(layer) in types and layer.get_output(0).dtype == trt.DataType.FLOAT for layer in layers)


def _torch_allows_tf32(definition: Any) -> bool:
    return (not _has(definition, MATMULS) or products_in_tf32()) and (
        not _has(definition, CONVOLUTIONS) or convolutions_in_tf32()
    )


def rounds_to_tf32(definition: Any, asked: bool | None) -> bool:
    """Whether torch or an engine of this network, built with `tf32=asked`, rounds numbers to TF32 on a GPU."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    kinds = ((MATMULS, products_in_tf32()), (CONVOLUTIONS, convolutions_in_tf32()))
    unasked = computes_in_tf32_unasked() or asked
    return any(_has(definition, names) and (unasked or torchs) for names, torchs in kinds)


def _add_profiles(builder: Any, config: Any, interface: Interface) -> None:
    if not any(spec.dynamic for spec in interface.inputs):
        return
    for opts in interface.profiles:
        profile = builder.create_optimization_profile()
        for spec, opt in zip(interface.inputs, opts, strict=True):
            profile.set_shape(spec.name, *map(spec.in_memory, (spec.min, opt, spec.max)))
        with LOG.capture() as log:
            index = config.add_optimization_profile(profile)
        if index < 0:
            raise BuildError("TensorRT refuses the range of shapes:\n" + "\n".join(log))


def _serialize(
    network: Network, config: Any, progress: bool | None, log_level: Any, meanwhile: Callable[[], None]
) -> tuple[Any, list[str]]:
    """The plan that TensorRT builds, or `None`, and its errors. Ctrl-C ends it."""
    monitor = None
    if hasattr(trt, "IProgressMonitor") and config.progress_monitor is None:  # `configure` may have set its own
        monitor = config.progress_monitor = _Monitor(progress)
    device = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_initialized() else nullcontext()

    def run() -> tuple[Any, list[str]]:
        with network.building, device, LOG.capture(log_level) as log:
            return network.builder.build_serialized_network(network.definition, config), log

    try:
        return interruptible(run, monitor.cancel if monitor is not None else lambda: None, meanwhile)
    finally:
        if monitor is not None:
            monitor.close()


if hasattr(trt, "IProgressMonitor"):

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Cancels a build when it is told to, and shows a tqdm bar for each of the build's nested phases.

        TensorRT calls it from threads of its own.
        """

        def __init__(self, progress: bool | None) -> None:
            trt.IProgressMonitor.__init__(self)
            self._is_shown, self._is_cancelled = is_shown(progress), False
            self._bars: dict[str, Any] = {}
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            from tqdm import tqdm

            with self._lock:
                if self._is_shown:
                    where = len(self._bars)
                    self._bars[name] = tqdm(total=steps, desc=name, position=where, leave=False, file=sys.stderr)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if (bar := self._bars.get(name)) is not None:
                    bar.update(step + 1 - bar.n)
            return not self._is_cancelled

        def phase_finish(self, name: str) -> None:
            with self._lock:
                if (bar := self._bars.pop(name, None)) is not None:
                    bar.close()

        def cancel(self) -> None:
            """End the build at its next step."""
            self._is_cancelled = True
            self.close()

        def close(self) -> None:
            """Take the bars away, and show no others."""
            self._is_shown = False
            for name in list(self._bars):
                self.phase_finish(name)
