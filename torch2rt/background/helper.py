"""The helper process: it makes one call, and ends with the process that has started it."""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend.float32 import put_tf32, tf32_switches
from torch2rt.registry import REGISTRY

CALL, TENSORS, ERROR = "call", "tensors", "error"
ALIGNMENT = 64
START = (
    "import json, sys; folder = sys.argv.pop(1); "
    "sys.path[:] = json.load(open(folder + '/start.json'))['path']; "
    "from torch2rt.background.helper import main; main(folder)"
)
TABLES = ("converters", "on_complex", "composites")


def main(folder: str) -> None:
    """Make the call in a folder, and leave its error there if it has one."""
    where = Path(folder)
    start = json.loads((where / "start.json").read_text())
    _end_with_parent(where, start["parent"])
    with contextlib.suppress(AttributeError, OSError):
        os.nice(start["niceness"])
    torch.set_num_threads(1)
    try:
        function, args, kwargs, switches, converters = _unpacked(where, start["tensors"])
        _apply(switches, converters)
        with with_settings(switches):
            function(where, *args, **kwargs)
    except BaseException as error:
        (where / ERROR).write_bytes(pickle.dumps(_described(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the seconds of taking Python down


def _end_with_parent(where: Path, parent: int) -> None:
    """End, and remove the files, when the process that has started this one is gone: it holds our stdin open."""

    def end() -> None:
        shutil.rmtree(where, ignore_errors=True)
        os._exit(1)

    def at_end_of_stdin() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1 << 10):
                pass
        end()

    def at_other_parent() -> None:  # a process that the parent has forked may hold our stdin, too
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=at_end_of_stdin, daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=at_other_parent, daemon=True).start()


def mapped(file: Path) -> mmap.mmap:
    """The memory of a file; writes to it do not reach the file."""
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def storage_of(memory: mmap.mmap, offset: int, size: int) -> torch.UntypedStorage:
    """A part of a file's memory as that of tensors."""
    whole = torch.empty(0, dtype=torch.uint8)
    if size:
        whole = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=size)
    return whole.untyped_storage()


def _unpacked(where: Path, listed: Any) -> Any:
    memory = mapped(where / TENSORS)
    with contextlib.suppress(OSError):  # so that nothing of it stays, whoever is killed
        (where / TENSORS).unlink()
    storages: dict[int, torch.UntypedStorage] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            number, dtype = pid
            if number not in storages:
                offset, size, device = listed[number]
                whole = torch.empty(0, dtype=torch.uint8).set_(storage_of(memory, offset, size))
                storages[number] = whole.to(device).untyped_storage()
            return torch.storage.TypedStorage(wrap_storage=storages[number], dtype=dtype, _internal=True)

    with open(where / CALL, "rb") as file:
        return Unpickler(file).load()


def _described(error: BaseException) -> tuple[str, str, bytes | None]:
    try:
        import cloudpickle

        pickled = cloudpickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        pickled = None
    return type(error).__name__, str(error), pickled


# What a conversion depends on beside its arguments -------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Switches of the process that say how float32 is computed, and what tensors are made as."""
    return {
        "tf32": tf32_switches(),
        "dtype": torch.get_default_dtype(),
        "device": torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        "default": torch.get_default_device(),
        "autocast": {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)},
    }


def user_converters() -> dict[str, Any]:
    """Converters that are not torch2rt's own: the modules that register them, and those of `__main__` themselves."""
    modules: dict[str, None] = {}
    own: list[tuple[str, Any, Any]] = []
    for table in TABLES:
        for target, entry in getattr(REGISTRY, table).items():
            module = getattr(getattr(entry, "function", entry), "__module__", "")
            if module == "__main__":
                own.append((table, target, entry))
            elif not module.startswith("torch2rt."):
                modules[module] = None
    return {"modules": list(modules), "own": own}


@contextlib.contextmanager
def with_settings(switches: Mapping[str, Any]) -> Iterator[None]:
    """A context that has what belongs to a thread as `settings` has found it."""
    with contextlib.ExitStack() as stack:
        if switches["device"] is not None:
            stack.enter_context(torch.cuda.device(switches["device"]))
        if switches["default"].type != "cpu":
            stack.enter_context(switches["default"])
        for device, dtype in switches["autocast"].items():
            stack.enter_context(torch.autocast(device, dtype))
        yield


def _apply(switches: Mapping[str, Any], converters: Mapping[str, Any]) -> None:
    put_tf32(*switches["tf32"])
    torch.set_default_dtype(switches["dtype"])
    for module in converters["modules"]:
        importlib.import_module(module)
    for table, target, entry in converters["own"]:
        getattr(REGISTRY, table)[target] = entry
