"""`torch2rt cache`: what is kept between processes, read without TensorRT and without a GPU."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from torch2rt.backend import disk_cache
from torch2rt.bench.models import Table
from torch2rt.engine import artifact
from torch2rt.errors import EngineError
from torch2rt.usage import Failure

WHAT = {
    ".engine": "engine",
    ".kernels": "compiled kernels",
    ".segments": "segments of a module",
    ".timings": "kernel timings",
    ".partial": "half written",
}


def listed(show: Table) -> None:
    """Print each file, the most recently used first."""
    where = _folder()
    for file, status in disk_cache.files(where):
        used = datetime.datetime.fromtimestamp(status.st_mtime).strftime("%Y-%m-%d %H:%M")
        show.row(file.stem[:12], WHAT[file.suffix], f"{status.st_size / 2**20:.1f} MiB, used {used}", _of_engine(file))


def info(show: Table) -> None:
    """Print the folder, and how much is in it."""
    where = _folder()
    found = disk_cache.files(where)
    total = sum(status.st_size for _, status in found)
    show.row("folder", str(where), "" if os.path.isdir(where) else "does not exist yet")
    for suffix, what in WHAT.items():
        sizes = [status.st_size for file, status in found if file.suffix == suffix]
        if sizes:
            show.row(what, str(len(sizes)), f"{sum(sizes) / 2**20:.1f} MiB")
    show.row("in all", f"{total / 2**20:.1f} MiB", f"of at most {disk_cache.limit() / 2**30:g} GiB")


def clear(show: Table) -> None:
    """Remove all files; raises `Failure` if some cannot be removed."""
    where = _folder()
    found = disk_cache.files(where)
    kept = [file for file, _ in found if not disk_cache.remove(file)]
    show.row("removed", str(len(found) - len(kept)), f"from {where}")
    if kept:
        raise Failure(f"{len(kept)} files in {where} cannot be removed, such as {kept[0].name}.")


def _folder() -> Path:
    if (where := disk_cache.folder()) is None:
        asked = os.environ.get(disk_cache.ENVIRONMENT)
        raise Failure(f"Nothing is kept: {disk_cache.ENVIRONMENT} is {asked!r}.")
    return where


def _of_engine(file: Path) -> str:
    """Inputs and outputs of an engine, or that its file is damaged; empty for other files."""
    if file.suffix != ".engine":
        return ""
    content: Any = disk_cache.read(file, is_use=False)
    try:
        if content is None:
            raise EngineError("damaged")
        data, header = artifact.split(content)
        return artifact.of_description(data, artifact.unseal(header, artifact.KEYS)).describe().splitlines()[0]
    except (EngineError, ValueError):
        return "damaged"
