"""Named parts and a JSON value as one file, in which no changed byte stays unseen.

The file begins with a head of fixed size. The index follows, as JSON: the `manifest`, and name, size and digest of each
part. Then come the parts, each at a multiple of `ALIGNMENT` bytes. The head has the digest of the index and one of
itself. With a key it also has an HMAC-SHA256 of all before it, and so of everything.

A file is read through a memory map, so that a part of gigabytes is never copied.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from torch2rt.errors import EngineError, InputError

MAGIC = b"\x89T2RT\r\n\x1a"  # a transfer as text changes it
FORMAT = 1
ALIGNMENT = 4096  # of a page
CHUNK = 1 << 24  # bytes that one thread digests at a time; the format depends on it
SIGNED = 1
_HEAD = struct.Struct("<8sIIQQ32s")  # magic, format, flags, size of the index and of the file, digest of the index
HEAD = _HEAD.size + 64  # with the HMAC and the head's own digest
Buffer = bytes | bytearray | memoryview


def digest(data: Buffer) -> bytes:
    """The SHA-256 of the SHA-256 of each chunk, which many threads compute."""
    view = memoryview(data).cast("B")
    chunks = [view[start : start + CHUNK] for start in range(0, len(view), CHUNK)]
    if len(chunks) == 1:
        parts = [hashlib.sha256(chunks[0]).digest()]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks))
    return hashlib.sha256(b"".join(parts)).digest()


def check_key(key: Any) -> bytes | None:
    """A key as it is; raises `InputError` for what is none."""
    if key is None or (isinstance(key, (bytes, bytearray)) and key):
        return None if key is None else bytes(key)
    raise InputError("key= is not None and no bytes with at least one byte in them.")


def write(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], parts: Mapping[str, Buffer], key: bytes | None = None
) -> None:
    """Write a file, which is there whole or not at all."""
    listed = [(name, memoryview(data).nbytes, digest(data).hex()) for name, data in parts.items()]
    index = json.dumps({"manifest": dict(manifest), "parts": listed}).encode()
    size = HEAD + len(index)
    for _, length, _ in listed:
        size = _aligned(size) + length
    flags = SIGNED if key is not None else 0
    head = _HEAD.pack(MAGIC, FORMAT, flags, len(index), size, hashlib.sha256(index).digest())
    head += bytes(32) if key is None else hmac.digest(key, head, "sha256")
    head += hashlib.sha256(head).digest()
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            _write(file, memoryview(head + index))
            for data in parts.values():
                _write(file, memoryview(bytes(_aligned(file.tell()) - file.tell())))
                _write(file, memoryview(data).cast("B"))
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


class Container:
    """A file as it was read: its `manifest`, and its parts as memory of the file, writes to which do not reach it.

    The file must not be written to while one of its parts is in use; replacing it as a whole is safe.
    """

    def __init__(self, name: str, manifest: Any, parts: Mapping[str, memoryview], is_signed: bool) -> None:
        self.name, self.manifest, self.parts, self.is_signed = name, manifest, dict(parts), is_signed

    def part(self, name: Any) -> memoryview:
        """A part; raises `EngineError` where the manifest names one that is not there."""
        if not isinstance(name, str) or name not in self.parts:
            raise EngineError(f"{self.name} is damaged: it has no part {name!r}.")
        return self.parts[name]


def is_container(source: str | os.PathLike[str]) -> bool:
    """Whether a file begins as those of `write` do."""
    with open(source, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: str | os.PathLike[str], key: bytes | None = None) -> Container:
    """Read a file and check every byte of it; raises `EngineError` that says which part is damaged.

    With a key, a file that is not signed with it is refused before anything else of it is looked at.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b"")
    index, is_signed = _index(view, name, key)
    try:
        read = json.loads(index)
        manifest, listed = read["manifest"], [(str(n), int(length), str(stated)) for n, length, stated in read["parts"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineError(f"{name} is damaged: its index makes no sense ({type(error).__name__}: {error}).") from error
    return Container(name, manifest, dict(_parts(view, name, HEAD + len(index), listed)), is_signed)


def _index(view: memoryview, name: str, key: bytes | None) -> tuple[bytes, bool]:
    """The index, after all that the head says of the file."""
    if bytes(view[: len(MAGIC)]) != MAGIC:
        is_engine = bytes(view[-8:]) == b"torch2rt"
        advice = " TRTModule.from_engine reads it." if is_engine else " If it was one, its first bytes are damaged."
        raise EngineError(f"{name} is no file of torch2rt.save.{advice}")
    if len(view) < HEAD:
        raise EngineError(f"{name} is truncated: it has {len(view)} bytes.")
    _, version, flags, length, size, stated = _HEAD.unpack(view[: _HEAD.size])
    signature = bytes(view[_HEAD.size : _HEAD.size + 32])
    if hashlib.sha256(view[: HEAD - 32]).digest() != view[HEAD - 32 : HEAD]:
        raise EngineError(f"{name} is damaged: its head has not the digest that it states.")
    if version != FORMAT:
        raise EngineError(f"{name} was saved in format {version}, this torch2rt reads {FORMAT}.")
    if key is not None:
        if not flags & SIGNED:
            raise EngineError(f"{name} is not signed, and was to be checked with key=.")
        if not hmac.compare_digest(hmac.digest(key, view[: _HEAD.size], "sha256"), signature):
            raise EngineError(f"{name} was signed with another key, or changed since.")
    if size != len(view):
        kind = "truncated" if len(view) < size else "damaged"
        raise EngineError(f"{name} is {kind}: it has {len(view)} of {size} bytes.")
    index = bytes(view[HEAD : HEAD + length])
    if hashlib.sha256(index).digest() != stated:
        raise EngineError(f"{name} is damaged: its index has not the digest that its head states.")
    return index, bool(flags & SIGNED)


def _parts(
    view: memoryview, name: str, end: int, listed: list[tuple[str, int, str]]
) -> Iterator[tuple[str, memoryview]]:
    for part, length, stated in listed:
        start = _aligned(end)
        if any(view[end:start]):
            raise EngineError(f"{name} is damaged before its part '{part}'.")
        end = start + length
        data = view[start:end]
        if length < 0 or len(data) != length or digest(data).hex() != stated:
            raise EngineError(f"{name} is damaged: its part '{part}' has not the digest that its index states.")
        yield part, data
    if end != len(view):
        raise EngineError(f"{name} is damaged: {len(view) - end} bytes of it belong to no part.")
