"""What this machine has of torch, TensorRT and GPU, whether they fit, and what to do where they do not.

Nothing here assumes that anything is installed; `torch2rt.backend.tensorrt`, which does, is imported where its failure
is shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from torch2rt.backend.cuda import driver_version

PACKAGES = ("tensorrt", "tensorrt_rtx")


class Findings:
    """Lines that are printed as they are found, and what is wrong."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.problems: list[str] = []

    def line(self, topic: str, text: str) -> None:
        self.write(f"{topic:<12} {text}")

    def problem(self, topic: str, text: str, remedy: str) -> None:
        self.line(topic, text)
        self.problems.append(remedy)


def doctor(write: Callable[[str], None] = print) -> bool:
    """Print the findings; whether engines can be built and run here."""
    found = Findings(write)
    found.line("python", f"{platform.python_version()}, {sys.platform} {platform.machine()}")
    gpu = _torch_and_gpu(found)
    backend = _tensorrt(found)
    if backend is not None and _build_and_run(found, backend, gpu):
        write("\nEngines can be built and run here.")
    for remedy in found.problems:
        write(f"\n-> {remedy}")
    return not found.problems


def _torch_and_gpu(found: Findings) -> bool:
    """Report torch, the driver and the GPUs; whether torch can use one."""
    built_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    found.line("torch", f"{torch.__version__}, built {built_for}")
    driver = driver_version()
    if driver:
        found.line("driver", f"NVIDIA {driver}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            found.line(f"GPU {index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
        return True
    without = "Without one, engines can still be built (TensorRT for RTX) and checked (`model_trt.reference()`)."
    if not torch.version.cuda:
        remedy = "torch was built without CUDA: install a CUDA build of torch from https://pytorch.org to run engines. "
    elif driver:
        remedy = (
            f"torch cannot use a GPU with driver {driver}: update the driver, or install a torch for an older CUDA. "
        )
    else:
        remedy = "There is no NVIDIA driver: running engines needs an NVIDIA GPU and its driver. "
    found.problem("GPU", "torch sees none (torch.cuda.is_available() is False)", remedy + without)
    return False


def _tensorrt(found: Findings) -> Any:
    """Report the TensorRTs that are installed; the seam with the chosen one, or `None`."""
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            found.line(package, "not installed")
            continue
        versions = {name: importlib.metadata.version(name) for name in owners.get(package, ())}
        found.line(package, ", ".join(f"{version} ({name})" for name, version in versions.items()) or "version unknown")
    try:
        from torch2rt.backend import tensorrt as backend
    except ImportError as error:
        found.problem("chosen", "none", str(error))
        return None
    except Exception as error:  # such as bindings that load and lack what every TensorRT has
        found.problem(
            "chosen", "none", f"TensorRT is installed and broken ({type(error).__name__}: {error}): install it again."
        )
        return None
    asked = os.environ.get(backend.ENVIRONMENT)
    reason = (
        f"{backend.ENVIRONMENT}={asked}"
        if asked
        else f"the first that is installed; {backend.ENVIRONMENT} chooses another"
    )
    found.line("chosen", f"{backend.FLAVOUR} {backend.VERSION}: {reason}")
    if backend.builds_without_gpu():
        known = [name[2:] for name in dir(backend.trt.ComputeCapability) if name.startswith("SM")]
        found.line(
            "", "names the compute capabilities " + ", ".join(f"{k[:-1]}.{k[-1]}" for k in sorted(known, key=int))
        )
    return backend


def _build_and_run(found: Findings, backend: Any, gpu: bool) -> bool:
    """Convert a small module and run it where there is a GPU: the one sure sign that all parts fit."""
    from torch2rt.convert import torch2rt

    device = torch.device("cuda" if gpu else "cpu")
    module, x = torch.nn.Linear(3, 5).eval().to(device), torch.randn(2, 3, device=device)
    start = time.perf_counter()
    try:
        model_trt = torch2rt(module, [x], progress=False)
    except Exception as error:
        other = (
            " TensorRT needs a GPU to build engines; TensorRT for RTX (pip install 'torch2rt[rtx]') builds without one."
        )
        remedy = f"{backend.FLAVOUR} {backend.VERSION} cannot build an engine here: {error}"
        found.problem("builds", "no", remedy + ("" if gpu or backend.builds_without_gpu() else other))
        return False
    found.line("builds", f"yes ({time.perf_counter() - start:.1f} s for a small module)")
    if not gpu:
        found.line("runs", "no, without a GPU")
        return False
    try:
        with torch.no_grad():
            error_size = (model_trt(x) - module(x)).abs().max().item()
    except Exception as error:
        remedy = f"{error}\n   Install a TensorRT that supports this GPU: 'torch2rt[tensorrt]' for data-centre GPUs, "
        remedy += "'torch2rt[rtx]' for RTX GPUs"
        if len([p for p in PACKAGES if importlib.util.find_spec(p)]) > 1:
            remedy += f"; both are installed, so {backend.ENVIRONMENT} can choose the other"
        found.problem("runs", "no", remedy + ".")
        return False
    if not error_size < 1e-2:
        found.problem(
            "runs",
            f"wrongly (error {error_size})",
            "The engine's results are wrong: please report this with the above.",
        )
        return False
    found.line("runs", "yes")
    return True
