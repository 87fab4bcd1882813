"""An `Engine` as a file, which TensorRT itself can read, too: the plan, and after it what only torch2rt reads.

The file ends in the header (all of the `Engine` but its plan, as JSON), the length of the header in eight bytes, and
`MAGIC`. Where an `Engine` has variants, their plans follow each other, and TensorRT reads the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from torch2rt.engine.container import MAGIC as CONTAINER
from torch2rt.engine.engine import Engine
from torch2rt.engine.report import Report
from torch2rt.engine.variant import EngineVariant
from torch2rt.errors import EngineError
from torch2rt.interface import Interface

FORMAT = 3  # 1 knew no memory formats, 2 no variants; a report and facts about the network may be missing
MAGIC = b"torch2rt"
KEYS = frozenset(("format", "engine", "interface", "digest", "report", "network", "variants"))
_SEAL = re.compile(rb', "check": "([0-9a-f]{64})"\}\Z')
CHUNK = 4 << 20
Source = str | os.PathLike[str] | bytes | bytearray | memoryview


def digest(data: bytes | memoryview) -> str:
    """The SHA-256 of a plan, by which a damaged one is found."""
    return hashlib.sha256(data).hexdigest()


def save(path: str | os.PathLike[str], engine: Engine) -> None:
    """Write an engine and its header to a file, which is there whole or not at all.

    The plan is never copied, and hashed while it is written.
    """
    target, view, hashed = Path(os.path.realpath(path)), memoryview(engine.data), hashlib.sha256()
    is_file = target.is_file() or not target.exists()  # and no device or pipe
    partial = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.partial") if is_file else target
    try:
        with open(partial, "wb", buffering=0) as file:
            with ThreadPoolExecutor(1) as pool:  # side by side: both leave Python's lock alone
                try:
                    for start in range(0, len(view), CHUNK):
                        pool.submit(hashed.update, chunk := view[start : start + CHUNK])
                        _write(file, chunk)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            text = header(engine, hashed.hexdigest())
            _write(file, memoryview(text + len(text).to_bytes(8, "little") + MAGIC))
        os.replace(partial, target)
    finally:
        if is_file:
            partial.unlink(missing_ok=True)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def load(source: Source) -> tuple[bytes, bytes | None]:
    """The plan in a file, and its header for `parse`; a file without a header is taken for a plain engine.

    Raises `EngineError` that says what the file is, if it is something else.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _load(BytesIO(source), "These bytes are")
    with open(source, "rb") as file:
        return _load(file, f"{os.fspath(source)} is")


def _load(file: BinaryIO, subject: str) -> tuple[bytes, bytes | None]:
    size = file.seek(0, os.SEEK_END)
    end = size - len(MAGIC) - 8
    file.seek(max(end, 0))
    tail = file.read()
    if tail.endswith(MAGIC):
        length = int.from_bytes(tail[:8], "little") if end >= 0 else -1
        if not 0 <= length <= end:
            raise EngineError(f"{subject} a damaged engine file: its header has no sensible length.")
        file.seek(end - length)
        header = file.read(length)
        file.seek(0)
        return file.read(end - length), header
    file.seek(0)
    head = file.read(4096)
    if (problem := _foreign(head, size)) is not None:
        raise EngineError(f"{subject} {problem}")
    file.seek(0)
    return file.read(), None


def split(data: memoryview) -> tuple[memoryview, bytes]:
    """The plan and the header in memory that was read from a file; raises `EngineError` where it is no such file."""
    end = len(data) - len(MAGIC) - 8
    length = int.from_bytes(data[end : end + 8], "little") if end >= 0 and data[end + 8 :] == MAGIC else -1
    if not 0 <= length <= end:
        raise EngineError("The file has no calling convention.")
    return data[: end - length], bytes(data[end - length : end])


def seal(data: Mapping[str, Any]) -> bytes:
    """JSON values as text that has its own digest at its end."""
    text = json.dumps(data).encode()
    return text[:-1] + b', "check": "' + digest(text).encode() + b'"}'


def unseal(text: bytes, keys: Container[str]) -> dict[str, Any]:
    """The values in a text of `seal`, or of an older version, which had no digest; raises `ValueError` for others."""
    sealed = _SEAL.search(text)
    if sealed is not None and digest(text[: sealed.start()] + b"}") != sealed[1].decode():
        raise ValueError("it has not the digest that it states")
    data = json.loads(text)
    if not isinstance(data, dict) or not all(key in keys or (sealed and key == "check") for key in data):
        raise ValueError("it has entries of no meaning")
    return data


def described(engine: Engine) -> dict[str, Any]:
    """All of an engine but its plan, as JSON values."""
    data = {
        "format": FORMAT if engine.variants else 2,  # which older versions read
        "engine": dict(engine.made_by),
        "interface": engine.interface.to_json(),
        "report": engine.report.to_json(),
        "network": dict(engine.facts),
    }
    if engine.variants:
        data["variants"] = [variant.to_json() for variant in engine.variants]
    return data


def header(engine: Engine, digest: str) -> bytes:
    """All of an engine but its plan, whose digest this is, as JSON."""
    return seal({**described(engine), "digest": digest})


def parse(data: bytes, header: bytes) -> Engine:
    """The engine of a plan and its header; raises `EngineError` if they are damaged or do not belong together."""
    try:
        read = json.loads(header)
        if read["format"] in range(1, FORMAT + 1):  # others may have other entries
            read = unseal(header, KEYS)
        stated = read["digest"]
    except Exception as error:
        raise EngineError(f"The engine's header is damaged ({type(error).__name__}: {error}).") from error
    engine = of_description(data, read)
    if digest(data) != stated:
        raise EngineError(f"The engine is truncated or damaged: its {len(data)} bytes have not the digest {stated}.")
    return engine


def of_description(data: bytes | memoryview, read: Mapping[str, Any]) -> Engine:
    """The inverse of `described`; raises `EngineError` for what is no description of an engine."""
    try:
        if read["format"] not in range(1, FORMAT + 1):
            known = f"this torch2rt reads 1 to {FORMAT}"
            raise EngineError(f"The engine was saved in format {read['format']}, {known}.")
        return Engine(
            data,
            Interface.from_json(read["interface"]),
            dict(read["engine"]),
            Report.from_json(read.get("report", {})),
            dict(read.get("network", {})),
            tuple(map(EngineVariant.from_json, read.get("variants", ()))),
        )
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"The engine's header is damaged ({type(error).__name__}: {error}).") from error


def doubt(data: bytes) -> str:
    """A sentence for an error about data that does not begin as TensorRT's engines do; empty for data that does."""
    return "" if data[1:4] == b"trt" else f"No engine that torch2rt has met begins with {data[:16]!r}. "


def _foreign(head: bytes, size: int) -> str | None:
    """For a file that holds no engine, or a part of one: what it is, and what to do. `None` if it may be an engine."""
    if not size:
        return "empty, and no engine."
    if head[:4] == b"vtrt":  # TensorRT for RTX, which begins with the engine's size
        whole = int.from_bytes(head[16:24], "little")
        if size < whole:
            return f"a truncated engine: it has {size} of {whole} bytes. Copy or save it again."
        if size > whole:
            return "a truncated engine file: the engine is there, its calling convention is not. Copy or save it again."
    if head[:8] == CONTAINER:
        return "no plain engine but a file of torch2rt.save: torch2rt.load(path) reads it."
    if head[:2] == b"\x80\x02" or (head[:4] == b"PK\x03\x04" and b"/data.pkl" in head[:256]):
        return (
            "no engine but a file of torch.save. If it holds a TRTModule, use torch.load(path, weights_only=False); "
            "if it holds one's state dict, TRTModule().load_state_dict(torch.load(path))."
        )
    if head[:4] == b"PK\x03\x04":
        return "no engine but a zip archive."
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "no engine but a safetensors file. Use TRTModule().load_state_dict(safetensors.torch.load_file(path))."
    if head[:1] == b"\x08" and re.search(b"onnx|pytorch", head[:64]):
        return "no engine but an ONNX model."
    if head.startswith(b"version https://git-lfs"):
        return "no engine but a pointer of Git LFS to a file that was not downloaded: git lfs pull."
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return f"no engine but a text, which begins with {text[:40]!r}."
    return None
