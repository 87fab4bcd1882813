"""What TensorRT's builder has measured on this GPU, kept in a file for later builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch2rt.backend import disk_cache
from torch2rt.backend.tensorrt import LOG


class TimingCache:
    """What TensorRT's builder has measured on this GPU: one file for the layers of all networks."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cache: Any = None
        self.known: memoryview | None = None
        self.path: Path | None = disk_cache.path("timings")
        if self.path is None:
            return
        self.known = disk_cache.read(self.path)
        with LOG.capture():
            # TensorRT refuses what another TensorRT has measured, or what was measured on another GPU
            self.cache = self._used(self.known) or self._used(memoryview(b""))

    def _used(self, blob: memoryview | None) -> Any:
        """A timing cache that the config uses from now on, or `None` if it refuses this one."""
        cache = None if blob is None else self.config.create_timing_cache(bytes(blob))
        return cache if cache is not None and self.config.set_timing_cache(cache, False) else None

    def save(self) -> None:
        """Write what was measured, together with what other processes have written meanwhile."""
        if self.path is None or self.cache is None:
            return
        with disk_cache.locked(self.path.parent), LOG.capture():
            stored = disk_cache.read(self.path)
            if stored is not None and stored != self.known:
                theirs = self.config.create_timing_cache(bytes(stored))
                if theirs is not None:
                    # A cache that cannot be combined is of another TensorRT or GPU, and is replaced.
                    self.cache.combine(theirs, False)
            blob = bytes(self.cache.serialize())
            if blob != stored:
                disk_cache.write(self.path, blob)
