"""Measure the ways to run a module, each in a process of its own.

All processes get ready at once, which takes as long as the slowest: they import, make the model and start CUDA and
TensorRT. Then one after the other builds and runs, while the others wait and do nothing, so that times, memory and
crashes of one way are no other's. Kernel caches are empty, in a temporary folder. `measuring.py` is the other side.

With many jobs, some get ready together. Those that follow are begun meanwhile, one process as another builds and
measures: it imports torch and makes the model in one thread, without the GPU, and waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch2rt.bench.models import Failure, UsageError, by, check_inputs
from torch2rt.bench.runners import WAYS, Way, find
from torch2rt.bench.worker import Measurement, make, tensors, tidy

TIMEOUT = 300.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run: MODEL as `torch2rt convert` takes it, the inputs' shapes and dtypes, the dtype of the parameters."""

    model: str
    inputs: Sequence[tuple[Sequence[int], str]]
    dtype: str = "float32"

    def title(self) -> str:
        """Model, inputs and dtype in a line."""
        inputs = ", ".join(by(shape) + ("" if dtype == self.dtype else f":{dtype}") for shape, dtype in self.inputs)
        return f"{self.model} {inputs} {self.dtype}"


def benchmark(job: Job, ways: Sequence[str] | None = None, **options: Any) -> list[Measurement]:
    """A `Measurement` of every variant of every way, in their order; one that fails has a `failure`.

    `ways` are names of `WAYS`, or `package.module:NAME` of a `Way` of one's own; by default all whose packages are
    installed. `options` are those of `benchmarks`.

    Raises `UsageError` for a way that there is not and a model that does not run, and `Failure` without a GPU.
    """
    return next(benchmarks([job], ways, **options))


def benchmarks(
    jobs: Sequence[Job],
    ways: Sequence[str] | None = None,
    *,
    together: int | None = None,
    device: str = "cuda",
    timeout: float = TIMEOUT,
    say: Callable[[str], None] | None = None,
) -> Iterator[list[Measurement]]:
    """What `benchmark` gives, for several jobs; the processes of so many jobs `together` get ready at once (all).

    `timeout` is in seconds, for getting ready and again for building and measuring a way. `say` is given lines about
    the progress; by default they go to stderr.
    """
    chosen = {name: _find(name) for name in (installed() if ways is None else ways)}
    if device != "cpu" and not torch.cuda.is_available():
        raise Failure("a benchmark needs an NVIDIA GPU and torch sees none (torch.cuda.is_available() is False).")
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="torch2rt-bench-", ignore_cleanup_errors=True)
        scratch = Path(stack.enter_context(folder))
        orders = [
            {**dataclasses.asdict(job), "device": device, "expected": str(scratch / f"{i}.pt")}
            for i, job in enumerate(jobs)
        ]
        workers: dict[tuple[int, str], Worker] = {}

        def begin(i: int, name: str) -> None:
            workers[i, name] = Worker({**orders[i], "way": name}, scratch / f"{i}-{len(workers)}")
            stack.callback(workers[i, name].close)

        size = together or max(1, len(jobs))
        for first in range(0, len(jobs), size):
            here, following = (range(len(jobs))[k : k + size] for k in (first, first + size))
            later = ((i, name) for i in following for name in chosen)
            say(f"{len(here) * len(chosen)} processes get ready")
            start = time.monotonic()
            for i in here:
                for name in chosen:
                    if (i, name) not in workers:
                        begin(i, name)
                    workers[i, name].go()
            for i in here:
                torch.save(expected(orders[i]), orders[i]["expected"])
            for i in here:
                for name in chosen:
                    workers[i, name].get_ready(start + timeout)
            say(f"they are, after {time.monotonic() - start:.1f} s")
            for i in here:
                measurements = []
                for name, way in chosen.items():
                    if (following_worker := next(later, None)) is not None:
                        begin(*following_worker)
                    worker, start = workers[i, name], time.monotonic()
                    rows = worker.measure(list(way.variants), timeout)
                    worker.close()
                    say(f"{jobs[i].title()}, {name}: {time.monotonic() - start:.1f} s")
                    if any(m.failure for m in rows):
                        say(worker.said())
                    measurements += rows
                yield measurements


def installed() -> list[str]:
    """The ways whose packages can be imported here."""
    return [name for name, way in WAYS.items() if all(importlib.util.find_spec(p) is not None for p in way.needs)]


def _find(name: str) -> Way:
    try:
        way = find(name)
    except (ImportError, AttributeError, ValueError):
        way = None
    if not isinstance(way, Way):
        raise UsageError(f"there is no way {name!r} to run a model, but {', '.join(WAYS)}.")
    return way


def expected(job: dict[str, Any]) -> list[torch.Tensor]:
    """What the job's weights give in float32, without TF32; raises `UsageError` for inputs that the model refuses."""
    module, inputs = make(job)
    device = torch.device(job["device"])
    module = module.float().to(device)
    inputs = [(x.float() if x.is_floating_point() else x).to(device) for x in inputs]
    kinds = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        check_inputs(module, inputs)
        with torch.no_grad():
            return tensors(module(*inputs))
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.allow_tf32 = value
        del module, inputs
        tidy(device)


class Worker:
    """The process of one way. What goes wrong in it becomes `failure`, a line of text."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        caches = ("TORCH2RT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "TMPDIR")
        for name in caches:
            (folder / name.lower()).mkdir(parents=True)
        environment = {**os.environ, **{name: str(folder / name.lower()) for name in caches}}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.failure: str | None = None
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch2rt.bench.worker"],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.messages: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(json.dumps(job))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(line)
        self.messages.put("")

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; the next message says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        """The next message, or one with a failure."""
        try:
            line = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.process.kill()
            return {"failure": f"timeout: it took too long to {what}"}
        return json.loads(line) if line else {"failure": self._death()}

    def _death(self) -> str:
        code = self.process.wait()
        last = self.said(1).strip() or "it said nothing"
        return f"the process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: {last[:200]}"

    def said(self, lines: int = 30) -> str:
        """The last lines that it, or a library in it, has printed."""
        text = self.errors.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def go(self) -> None:
        """Let it use the GPU: to get ready, and then to build and measure."""
        self._send("go")

    def get_ready(self, deadline: float) -> None:
        self.failure = self._receive(deadline, "get ready").get("failure")

    def measure(self, names: Sequence[str], timeout: float) -> list[Measurement]:
        """Let it build and measure; a measurement for each of these names."""
        done: dict[str, Measurement] = {}
        self.go()
        deadline = time.monotonic() + timeout
        while self.failure is None and len(done) < len(names):
            message = self._receive(deadline, "build and measure")
            if "way" in message:
                done[message["way"]] = Measurement(**message)
            else:
                self.failure = message["failure"]
        return [done.get(name) or Measurement(name, failure=self.failure) for name in names]

    def close(self) -> None:
        """End the process, and wait until its GPU memory is free."""
        self.process.kill()  # all is told; to end CUDA, TensorRT and Python in good order takes seconds
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended before it read everything
                self.process.stdin.close()


def facts() -> dict[str, dict[str, str | None]]:
    """The machine and the versions that measurements depend on."""
    from torch2rt import __version__
    from torch2rt.backend.cuda import driver_version
    from torch2rt.backend.tensorrt import FLAVOUR, VERSION

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {name: _version(name) for name in ("torch_tensorrt", "onnx", "onnxscript")}
    return {
        "machine": {"gpu": gpu, "driver": driver_version() or None, "cpu": _cpu()},
        "versions": {"torch2rt": __version__, "torch": torch.__version__, FLAVOUR: VERSION, **packages},
    }


def _version(package: str) -> str | None:
    """The version of a package by the name it is imported by, without importing it."""
    names = importlib.metadata.packages_distributions().get(package, ())
    return importlib.metadata.version(names[0]) if names else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
