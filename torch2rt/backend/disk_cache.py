"""Files that outlive the process: what TensorRT has built, measured or compiled, where other processes find it.

They lie in the folder that `TORCH2RT_CACHE` names, by default `torch2rt` in the user's cache folder; if it is empty,
nothing is kept. The folder may be shared, also by machines with other GPUs: a file's name is a digest of all that its
content depends on. Files are replaced as a whole and carry a digest of their name and content, so that a reader sees an
old one, a new one or none. Above `limit()` bytes, those that were used least recently are removed. A folder that cannot
be used means no cache, never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from torch2rt.backend.cuda import driver_version
from torch2rt.backend.tensorrt import FLAVOUR, VERSION

ENVIRONMENT = "TORCH2RT_CACHE"
LIMIT = 4 * 2**30  # bytes of all files together, unless `TORCH2RT_CACHE_LIMIT` says how many GiB
PATIENCE = 5.0  # seconds to wait for another process that holds the lock
WRITING = 3600.0  # seconds that a process may take to write a file
CHUNK = 2**24  # bytes that one thread digests at a time
_DIGEST = hashlib.sha256().digest_size
_PARTIAL = ".partial"
KINDS = (".engine", ".kernels", ".segments", ".timings")


def folder() -> Path | None:
    """Where caches are kept, or `None` if they are not."""
    try:
        if (asked := os.environ.get(ENVIRONMENT)) is not None:
            return Path(asked).expanduser() if asked else None
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch2rt"
    except RuntimeError:  # there is no such home
        return None


def limit() -> int:
    """The bytes that all files may have together; what `TORCH2RT_CACHE_LIMIT` says is in GiB, if it is a number."""
    try:
        return int(float(os.environ["TORCH2RT_CACHE_LIMIT"]) * 2**30)
    except (KeyError, ValueError, OverflowError):
        return LIMIT


def of_key(kind: str, key: str) -> Path | None:
    """The file of something that depends on no more than is in its key; `None` where caches are not kept."""
    where = folder()
    return None if where is None else where / f"{key}.{kind}"


def files(where: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of caches in a folder, the most recently used first; also what processes have left half written.

    A folder that is not there, or cannot be read, has none.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(where) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has just removed it
                if entry.name.endswith((*KINDS, _PARTIAL)) and entry.is_file():
                    found.append((where / entry.name, entry.stat()))
    return sorted(found, key=lambda each: (-each[1].st_mtime, each[0]))


def remove(file: Path) -> bool:
    """Remove a file, and say whether that was possible."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def gpu(device: torch.device | None = None) -> list[str]:
    """What tells a GPU, the current one if not given, and its driver from others."""
    return [driver_version(), *_gpu(device)]


def path(kind: str, device: torch.device | None = None, *parts: str) -> Path | None:
    """The file of what depends on this TensorRT, on a GPU (the current one if not given), and on `parts`.

    `None` where caches are not kept, or where there is no GPU.
    """
    where = folder()
    if where is None or not torch.cuda.is_available():
        return None
    key = hashlib.sha256()
    for part in (FLAVOUR, VERSION, str(torch.version.cuda), driver_version(), *_gpu(device), *parts):
        key.update(part.encode() + b"\0")
    return where / f"{key.hexdigest()}.{kind}"


def _gpu(device: torch.device | None) -> list[str]:
    """What tells GPUs apart for which TensorRT chooses differently: models, their variants, and parts of one (MIG)."""
    properties = torch.cuda.get_device_properties(device)
    facts = (properties.major, properties.minor, properties.multi_processor_count, properties.total_memory)
    return [properties.name, *map(str, facts)]


def digest(data: bytes | memoryview) -> str:
    """A digest of an engine, which may have gigabytes."""
    return hashlib.sha256(b"".join(_digests(data))).hexdigest()


def _digests(*content: bytes | memoryview) -> list[bytes]:
    """Digests of content in parts, in pieces of `CHUNK` bytes: each takes a core a second, so many share the work."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda piece: hashlib.sha256(piece).digest(), _pieces(content)))


def _pieces(content: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Parts one after the other, in pieces of `CHUNK` bytes but for the last; no more is copied than pieces of two."""
    rest = b""
    for part in content:
        view = memoryview(part)
        lacks = CHUNK - len(rest) if rest else 0
        rest, view = rest + bytes(view[:lacks]), view[lacks:]
        if len(rest) == CHUNK:
            yield rest
            rest = b""
        whole = len(view) - len(view) % CHUNK
        yield from (view[start : start + CHUNK] for start in range(0, whole, CHUNK))
        rest = rest or bytes(view[whole:])
    if rest:
        yield rest


def _seal(file: Path, *content: bytes | memoryview) -> bytes:
    """What a file has before its content: a digest of this and of its name, so that no file is taken for another."""
    return hashlib.sha256(file.name.encode() + b"\0" + b"".join(_digests(*content))).digest()


def _bytes_of(file: Path) -> memoryview:
    """What is in a file; all cores copy a large one. Raises `OSError` and `MemoryError`."""
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= CHUNK or not hasattr(os, "preadv"):  # which Windows does not have
            return memoryview(stream.readall())
        data = np.empty(size, np.uint8).data

        def fill(start: int) -> None:
            end = min(start + CHUNK, size)
            while start < end:
                if not (count := os.preadv(stream.fileno(), [data[start:end]], start)):
                    raise OSError(f"{file} has become shorter")
                start += count

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, size, CHUNK)))
        return data


def read(file: Path, is_use: bool = True) -> memoryview | None:
    """The content of a file; `None` if it is not there, not readable, damaged, or not one of ours.

    `is_use`: whether it counts as used now.
    """
    try:
        if not file.is_file():  # of a pipe, a reader would wait for ever
            return None
        data = _bytes_of(file)
    except (OSError, MemoryError):
        return None
    content = data[_DIGEST:]
    if _seal(file, content) != data[:_DIGEST]:
        return None
    with contextlib.suppress(OSError):
        if is_use:
            os.utime(file)  # so that the least recently used ones are known
    return content


def write(file: Path, *content: bytes | memoryview) -> bool:
    """Replace a file, whose content may be in parts, and say whether that was possible."""
    partial, seal = None, _seal(file, *content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=_PARTIAL, delete=False) as stream:
            partial = stream.name
            stream.write(seal)
            for part in content:
                stream.write(part)
        os.replace(partial, file)
    except OSError:
        return False
    finally:  # also after Ctrl-C
        with contextlib.suppress(OSError):
            if partial is not None:
                os.unlink(partial)  # it is gone if it has become the file
    _trim(file.parent, keep=file)
    return True


def _trim(where: Path, keep: Path) -> None:
    """Remove the files that were used least recently, until the others have no more than `limit()` bytes."""
    found, most = files(where), limit()
    total = sum(status.st_size for _, status in found)
    for file, status in reversed(found):
        if total <= most:
            return
        if file != keep and not _is_being_written(file, status) and remove(file):
            total -= status.st_size


def _is_being_written(file: Path, status: os.stat_result) -> bool:
    """Whether another process may be writing a file, which a process that was killed is not any more."""
    return file.suffix == _PARTIAL and time.time() - status.st_mtime < WRITING


@contextlib.contextmanager
def locked(where: Path) -> Iterator[None]:
    """Keep the other processes that ask for the same out of a folder.

    Where that is not possible (the folder cannot be written to, a process does not let go), go on without a lock: of
    several processes that write at once, the last has written then, and the content of the others is made anew.
    """
    from filelock import FileLock  # not at the top: it takes 35 ms, and only a build that has measured needs it

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # filelock's Timeout is an OSError
            where.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(where / "lock", timeout=PATIENCE).acquire(poll_interval=0.01))
        yield
