"""Kernels that TensorRT for RTX has compiled for this GPU, kept between processes.

An engine of TensorRT for RTX is compiled for the GPU when an execution context is made, which takes seconds. Its
runtime cache holds the result: for all contexts of an engine, and in a file (see `torch2rt.backend.disk_cache`) for
later processes. Runtime caches cannot be united, so of two processes that write at once the last has written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend import disk_cache
from torch2rt.backend.cuda import driver_version
from torch2rt.backend.tensorrt import FLAVOUR, LOG, VERSION, has_runtime_cache


def gpu_key(device: torch.device | None = None) -> str:
    """What compiled kernels depend on beside the engine: TensorRT, CUDA, the driver, and the GPU."""
    gpu = torch.cuda.get_device_properties(device)
    facts = (FLAVOUR, VERSION, torch.version.cuda, driver_version(), gpu.name, f"{gpu.major}.{gpu.minor}")
    return ", ".join(map(str, (*facts, gpu.multi_processor_count)))


class KernelCache:
    """The runtime cache of one engine on one GPU; `cache` is `None` where TensorRT has none."""

    def __init__(
        self,
        engine: Any,
        engine_bytes: bytes | memoryview,
        device: torch.device,
        carried: Mapping[str, Sequence[bytes | memoryview]] | None = None,
    ) -> None:
        """`carried` are caches by GPU that came with the engine; they are used where none is kept on this machine."""
        self.cache: Any = None
        self.path: Path | None = None
        self.saved = b""
        if not has_runtime_cache():
            return
        self.cache = engine.create_runtime_config().create_runtime_cache()
        if self.cache is None:
            return
        if disk_cache.folder() is not None:
            self.path = disk_cache.path("kernels", device, disk_cache.digest(engine_bytes))  # type: ignore[arg-type]
        kept = None if self.path is None else disk_cache.read(self.path)
        if kept is not None and self._takes(bytes(kept)):
            self.saved = bytes(kept)
        elif carried and (blobs := carried.get(gpu_key(device))):
            self._takes(bytes(blobs[0]))

    def _takes(self, blob: bytes) -> bool:
        with LOG.capture():
            taken = bool(self.cache.deserialize(blob))
            if not taken:  # it is made anew
                self.cache.reset()
        return taken

    def blob(self) -> bytes:
        """All that was compiled until now; empty where there is no cache."""
        return bytes(self.cache.serialize()) if self.cache is not None else b""

    def save(self) -> None:
        """Write what was compiled since the last time; a folder that cannot be written to is no reason to fail."""
        if self.path is None:
            return
        blob = bytes(self.cache.serialize())
        if blob != self.saved and disk_cache.write(self.path, blob):
            self.saved = blob
