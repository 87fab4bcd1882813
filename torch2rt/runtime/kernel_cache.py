"""Kernels that TensorRT for RTX has compiled for this GPU, kept between processes.

An engine of TensorRT for RTX is compiled for the GPU when an execution context is made, which takes seconds. Its
runtime cache holds the result: for all contexts of an engine, and in a file (see `torch2rt.backend.disk_cache`) for
later processes. Runtime caches cannot be united, so of two processes that write at once the last has written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torch2rt.backend import disk_cache
from torch2rt.backend.tensorrt import LOG, has_runtime_cache


class KernelCache:
    """The runtime cache of one engine on one GPU; `cache` is `None` where TensorRT has none."""

    def __init__(self, engine: Any, engine_bytes: bytes, device: torch.device) -> None:
        self.cache: Any = None
        self.path: Path | None = None
        self.saved = b""
        if not has_runtime_cache():
            return
        self.cache = engine.create_runtime_config().create_runtime_cache()
        if disk_cache.folder() is None or self.cache is None:
            return
        self.path = disk_cache.path("kernels", device, disk_cache.digest(engine_bytes))
        if self.path is None or (blob := disk_cache.read(self.path)) is None:
            return
        with LOG.capture():
            if self.cache.deserialize(blob):
                self.saved = blob
            else:  # it is made anew
                self.cache.reset()

    def save(self) -> None:
        """Write what was compiled since the last time; a folder that cannot be written to is no reason to fail."""
        if self.path is None:
            return
        blob = bytes(self.cache.serialize())
        if blob != self.saved and disk_cache.write(self.path, blob):
            self.saved = blob
