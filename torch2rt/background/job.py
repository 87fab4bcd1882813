"""A call that a helper process makes: of which function, with which arguments, and their tensors in shared memory.

A thread would do as well but for the GIL: tracing in one slows a model beside it about ten times, and switches in torch
that are of the whole process make other threads' compiled code run eagerly meanwhile.

The helper is started anew and imports what the arguments need. It does not run the main script again, as
`multiprocessing` would: what is defined in `__main__`, in a script or a notebook, is sent as code by cloudpickle.
Tensors are not pickled: their memory is written to a file that both processes map, in memory where there is room.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend.cuda import beside_captures
from torch2rt.background.helper import (
    ALIGNMENT,
    CALL,
    ERROR,
    START,
    TENSORS,
    mapped,
    settings,
    storage_of,
    user_converters,
)
from torch2rt.errors import BuildError, EngineError, InputError

IN_MEMORY = Path("/dev/shm")
POLITE = 10  # steps of priority below the process that answers calls
CHUNK = 1 << 26  # bytes that are copied from a GPU at a time
GRACE = 5.0  # seconds in which a helper that was killed is to end


class Job:
    """A call of `function(folder, *args, **kwargs)` in a process of its own; `run` waits for its end, `stop` ends it.

    The function leaves its results in `folder`, which is gone after `close`.

    Raises `InputError` for arguments that cannot be sent. Tensors are read when `run` starts the helper: `received` is
    called with the memory that it was given then. Python's path, the environment and the working folder are those of
    now.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise InputError("background=True starts a Python, and there is none to start (sys.executable).")
        self.owner, self.environment = os.getpid(), dict(os.environ)
        self.where, self.path = _working_folder(), list(sys.path)
        self.received: Callable[[Sequence[torch.UntypedStorage]], None] | None = None
        self.numbers: dict[int, int] = {}  # of storages, by what tells them apart
        self.storages: list[torch.UntypedStorage] = []
        self.call = self._packed((function, args, kwargs, settings(), user_converters()))
        self.events = [_event(device) for device in {s.device for s in self.storages if s.device.type == "cuda"}]
        self.folder = Path(tempfile.mkdtemp(prefix="torch2rt-", dir=_where(sum(s.nbytes() for s in self.storages))))
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self._lock = threading.RLock()  # garbage may be collected while it is held, and `stop` be called then

    def _packed(self, call: Any) -> bytes:
        numbers = self.numbers

        def number(storage: Any) -> tuple[Any, ...] | None:
            if not isinstance(storage, torch.storage.TypedStorage):
                return None
            untyped = storage._untyped_storage
            if untyped._cdata not in numbers:
                numbers[untyped._cdata] = len(self.storages)
                self.storages.append(untyped)
            return numbers[untyped._cdata], storage.dtype

        file = io.BytesIO()
        try:
            _pickler(file, number).dump(call)
        except Exception as error:
            raise InputError(
                f"background=True sends the module and the arguments to a helper process, which cannot be done "
                f"({type(error).__name__}: {error}). Convert without background=True."
            ) from error
        return file.getvalue()

    def run(self) -> None:
        """Make the call; raises what it raises, and `EngineError` where it was stopped."""
        with self._lock:  # `stop` waits for the memory to be written
            self._check_stopped()
            sent = self._write()
            self._check_stopped()
            command = [sys.executable, "-c", START, str(self.folder)]
            with _without_interrupts() as how:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, cwd=self.where, env=self.environment, **how
                )
        if self.received is not None:
            self.received(sent)
        del sent
        code = self.process.wait()
        self._check_stopped()
        if (self.folder / ERROR).exists():
            raise _read_error((self.folder / ERROR).read_bytes())
        if code:
            raise BuildError(f"The helper process of a conversion in the background ended with the exit code {code}.")

    def _check_stopped(self) -> None:
        if self.stopped:
            raise EngineError("The conversion in the background was stopped.")

    def _write(self) -> list[torch.UntypedStorage]:
        """Write the files of the call; returns the memory that the helper is given."""
        on_gpu = any(storage.device.type == "cuda" for storage in self.storages)
        with beside_captures() if on_gpu else contextlib.nullcontext():
            for event in self.events:
                event.synchronize()
            listed = self._write_tensors()
        (self.folder / CALL).write_bytes(self.call)
        start = {"path": self.path, "tensors": listed, "parent": self.owner, "niceness": POLITE}
        (self.folder / "start.json").write_text(json.dumps(start))
        if self.received is None:
            return []
        memory = mapped(self.folder / TENSORS)
        return [storage_of(memory, offset, size) for offset, size, _ in listed]

    def _write_tensors(self) -> list[Any]:
        """Write the memory of all tensors to a file; returns where each is, and on which device it was."""
        listed = []
        with open(self.folder / TENSORS, "wb", buffering=0) as file:
            for storage in self.storages:
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                listed.append([file.tell(), storage.nbytes(), str(storage.device)])
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                for start in range(0, len(whole), CHUNK):
                    data = memoryview(whole[start : start + CHUNK].cpu().numpy())
                    while data:
                        data = data[file.write(data) :]
            file.truncate(max(file.tell(), 1))  # an empty file cannot be mapped
        self.storages = []
        return listed

    def stop(self) -> None:
        """End the helper, if it runs, and remove its files; a process that was forked leaves both alone."""
        if os.getpid() != self.owner:
            return
        with self._lock:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                try:
                    self.process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    return
        self.close()

    def close(self) -> None:
        """Remove the files of the call; what is mapped of them stays."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _pickler(file: io.BytesIO, number: Callable[[Any], Any]) -> pickle.Pickler:
    try:
        from cloudpickle import CloudPickler
    except ImportError as error:
        raise ImportError("it needs cloudpickle: pip install cloudpickle") from error

    class Pickler(CloudPickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            return number(obj)

    return Pickler(file)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without_interrupts() -> Iterator[dict[str, Any]]:
    """Options of a process that Ctrl-C in a terminal, or a notebook's interrupt, does not end.

    They are for the process that has started it. What a thread blocks, a process that it starts blocks, too.
    """
    if os.name == "nt":
        yield {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield {}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _event(device: torch.device) -> torch.cuda.Event:
    """What the caller's stream has to do until now: tensors are read after it."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _where(size: int) -> str | None:
    """The folder for files of about this size, thrice: in memory if there is room, else where files are temporary."""
    try:
        return str(IN_MEMORY) if shutil.disk_usage(IN_MEMORY).free > 4 * size + (1 << 28) else None
    except OSError:
        return None


def _read_error(data: bytes) -> BaseException:
    kind, text, pickled = pickle.loads(data)  # of our own process
    try:
        error = pickle.loads(pickled) if pickled is not None else None
    except Exception:
        error = None
    return error if isinstance(error, Exception) else BuildError(f"{kind}: {text}")
