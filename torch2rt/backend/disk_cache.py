"""Files that outlive the process: what TensorRT has measured or compiled on this GPU, where other processes find it.

They lie in the folder that `TORCH2RT_CACHE` names, by default `torch2rt` in the user's cache folder; if it is empty,
nothing is kept. The folder may be shared, also by machines with other GPUs: a file's name is a digest of all that its
content depends on. Files are replaced as a whole and carry their own digest, so that a reader sees an old one, a new
one or none. Above `LIMIT` bytes, those that were used least recently are removed. A folder that cannot be used means no
cache, never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from torch2rt.backend.cuda import driver_version
from torch2rt.backend.tensorrt import FLAVOUR, VERSION

ENVIRONMENT = "TORCH2RT_CACHE"
LIMIT = 4 * 2**30  # bytes of all files together
PATIENCE = 5.0  # seconds to wait for another process that holds the lock
CHUNK = 2**24  # bytes that one thread digests at a time
_DIGEST = hashlib.sha256().digest_size
_PARTIAL = ".partial"


def folder() -> Path | None:
    """Where caches are kept, or `None` if they are not."""
    try:
        if (asked := os.environ.get(ENVIRONMENT)) is not None:
            return Path(asked).expanduser() if asked else None
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch2rt"
    except RuntimeError:  # there is no such home
        return None


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


def digest(data: bytes) -> str:
    """A digest of an engine, which may have gigabytes: each takes a core a second, so many share the work."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = (memoryview(data)[start : start + CHUNK] for start in range(0, len(data), CHUNK))
        parts = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def read(file: Path) -> bytes | None:
    """The content of a file; `None` if it is not there, not readable, damaged, or not one of ours."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    content = data[_DIGEST:]
    if hashlib.sha256(content).digest() != data[:_DIGEST]:
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # so that the least recently used ones are known
    return content


def write(file: Path, content: bytes) -> bool:
    """Replace a file, and say whether that was possible."""
    partial = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=_PARTIAL, delete=False) as stream:
            partial = stream.name
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
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
    """Remove the files that were used least recently, until the others have no more than `LIMIT` bytes."""
    found = []
    for suffix in (".kernels", ".timings", _PARTIAL):
        for file in where.glob(f"*{suffix}"):
            with contextlib.suppress(OSError):  # another process has just removed it
                found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= LIMIT:
            return
        if file != keep:
            with contextlib.suppress(OSError):
                file.unlink()
            total -= size


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
