"""Kernels that TensorRT for RTX has compiled for this GPU, kept between processes.

An engine of TensorRT for RTX is compiled for the GPU when an execution context is made, which takes seconds. Its
runtime cache holds the result: for all contexts of an engine, and in a folder (`TORCH2RT_CACHE`, by default `torch2rt`
in the user's cache folder) for later processes. An empty `TORCH2RT_CACHE` turns the folder off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend import FLAVOUR, IS_RTX, VERSION

ENVIRONMENT = "TORCH2RT_CACHE"


def folder() -> Path | None:
    """Where caches are kept, or `None` if they are not."""
    asked = os.environ.get(ENVIRONMENT)
    if asked is not None:
        return Path(asked).expanduser() if asked else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch2rt"


class KernelCache:
    """The runtime cache of one engine on one GPU; `cache` is `None` where TensorRT has none."""

    def __init__(self, engine: Any, engine_bytes: bytes, device: torch.device) -> None:
        self.cache: Any = None
        self.path: Path | None = None
        self.saved = 0
        if not IS_RTX:
            return
        self.cache = engine.create_runtime_config().create_runtime_cache()
        where = folder()
        if where is None or self.cache is None:
            return
        key = hashlib.sha256(engine_bytes)
        for part in (FLAVOUR, VERSION, torch.cuda.get_device_name(device), _driver()):
            key.update(b"\0" + part.encode())
        self.path = where / f"{key.hexdigest()}.kernels"
        try:
            blob = self.path.read_bytes()
        except OSError:
            return
        if self.cache.deserialize(blob):  # else it is of another driver or TensorRT, or damaged, and made anew
            self.saved = len(blob)

    def save(self) -> None:
        """Write what was compiled since the last time; a folder that cannot be written to is no reason to fail."""
        if self.path is None:
            return
        blob = bytes(self.cache.serialize())
        if len(blob) == self.saved:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as partial:
                partial.write(blob)
            os.replace(partial.name, self.path)
        except OSError:
            return
        self.saved = len(blob)


def _driver() -> str:
    """The driver's version, or nothing if it does not say."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    known = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0
    return text.value.decode() if known else ""
