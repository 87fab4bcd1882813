"""The process in which a way to run a module is built and measured.

`python -m torch2rt.bench.worker` reads a job from stdin, a line of JSON, makes the model, which takes no GPU memory,
and waits for the line "go". Then it imports what the way needs, builds and runs a small module in the same way, so that
loading libraries is not counted, says that it is ready and waits for another "go". Each variant's numbers are a line of
JSON on stdout.

All ways run on one CUDA stream, which is not the default stream: TensorRT would wait for the device there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.bench.models import example, load_model
from torch2rt.bench.runners import Call, Way, find
from torch2rt.structure import flatten

WARM = 0.2  # seconds to run before measuring, so that the GPU's clocks are up
LONG = 0.04  # seconds to measure latency, throughput and host time in a round, each at least
CALLS = 10  # the fewest calls that a median is taken of
ROUNDS = 12  # each after one more launch of a small kernel than the one before; in some processes the ninth counts


@dataclasses.dataclass
class Measurement:
    """What was measured of a way; only `way` and `failure`, the first line of its error, of one that failed.

    - `latency`: median milliseconds of a call between CUDA events, the GPU waiting before each.
    - `throughput`: samples per second of calls back to back; a sample is one of the first input's dimension 0.
    - `host`: median microseconds a call takes on the host until it returns, without waiting for the GPU.
      Of these, the best of several rounds: CUDA graphs have two speeds, which change when other kernels run between.
    - `build`: seconds from a module in GPU memory to the first finished output.
    - `memory`: MiB of GPU memory in use after calls, beyond what was in use before the model: weights, activations,
      the module where the way still needs it, and the graphs of the same way's variants before.
    - `error`: largest absolute difference over the largest absolute value of what the same weights give in float32;
      None where that says nothing, for the reason in `remark`.
    """

    way: str
    latency: float | None = None
    throughput: float | None = None
    host: float | None = None
    build: float | None = None
    memory: float | None = None
    error: float | None = None
    remark: str | None = None
    failure: str | None = None


class Difference:
    """The largest difference between two tensors, alone and relative to the largest expected value."""

    def __init__(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        a, b = (t.detach().double().flatten() for t in (actual, expected))
        same = (a == b) | (a.isnan() & b.isnan())
        errors = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
        scale = torch.where(b.isfinite(), b.abs(), 0.0)
        self.absolute = errors.max().item() if errors.numel() else 0.0
        largest = scale.max().item() if scale.numel() else 0.0
        self.relative = self.absolute / largest if largest else self.absolute


def wait(device: torch.device) -> None:
    """Until everything enqueued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used(device: torch.device) -> int:
    """Bytes of GPU memory in use, by everyone."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def tidy(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def milliseconds(call: Call, device: torch.device) -> float:
    """One call between two CUDA events on an idle GPU; on a CPU, what the clock on the wall says."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def repeat(seconds: float, calls: int, function: Callable[[], Any]) -> list[Any]:
    """Results of a function, called for so many seconds and at least so many times."""
    results: list[Any] = []
    end = time.perf_counter() + seconds
    while len(results) < calls or time.perf_counter() < end:
        results.append(function())
    return results


def timings(call: Call, device: torch.device, batch: int) -> dict[str, float]:
    """Latency, throughput and host time of a call, as `Measurement` has them."""
    repeat(WARM, 3, lambda: milliseconds(call, device))
    rounds, other = [], torch.zeros(1, device=device)
    for launches in range(ROUNDS):
        for _ in range(launches):
            other += 1
        wait(device)
        rounds.append(one_round(call, device, batch))
    best = {"latency": min, "throughput": max, "host": min}
    return {name: pick(r[name] for r in rounds) for name, pick in best.items()}


def one_round(call: Call, device: torch.device, batch: int) -> dict[str, float]:
    """The same in one go, on warm clocks."""
    latency = statistics.median(repeat(LONG, CALLS, lambda: milliseconds(call, device)))
    count = max(CALLS, int(LONG * 1e3 / latency))
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    throughput = count * batch / (time.perf_counter() - start)
    # Several calls in a row, as callers make them, but few enough that the host never waits for room in CUDA's queue.
    row = max(1, min(20, int(1 / latency)))

    def host() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(row):
            call()
        return (time.perf_counter() - start) / row * 1e6

    return {"latency": latency, "throughput": throughput, "host": statistics.median(repeat(LONG, CALLS, host))}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, on the CPU."""
    return [x.detach().cpu() for x in flatten(value, torch.is_tensor, "result")[0]]


def compare(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, Any]:
    """`error`, the largest of several outputs, or the `remark` why there is none.

    Raises `ValueError` where the outputs do not correspond.
    """
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the outputs have the shapes {shapes[0]}, the module's {shapes[1]}")
    if not any(x.numel() for x in expected):
        return {"remark": "nothing to compare: the module's output is empty"}
    if not any(x.any() for x in expected):
        return {"remark": "nothing to compare: the module's output is all zero"}
    if not all(x.isfinite().all() for x in expected):
        return {"remark": "nothing to compare: the module's output is not finite"}
    if not all(x.isfinite().all() for x in actual):
        return {"remark": "the output is not finite, the module's is"}
    return {"error": max(Difference(a, b).relative for a, b in zip(actual, expected, strict=True))}


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


# The process ---------------------------------------------------------------------------------------------------------


def make(job: Mapping[str, Any]) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A job's model and inputs on the CPU: the same ones in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many processes do this at once; and sums are rounded alike in all of them
    try:
        torch.manual_seed(0)
        module = load_model(job["model"]).eval().to(getattr(torch, job["dtype"]))
        cpu = torch.device("cpu")
        return module, [example(tuple(shape), getattr(torch, dtype), cpu) for shape, dtype in job["inputs"]]
    finally:
        torch.set_num_threads(threads)


def work(job: Mapping[str, Any], go: Callable[[], bool], tell: Callable[[dict[str, Any]], None]) -> None:
    """Build and measure a job's way, telling {"ready": True} and then the fields of each `Measurement`."""
    way, device, dtype = find(job["way"]), torch.device(job["device"]), getattr(torch, job["dtype"])
    module, inputs = make(job)
    if not go():
        return
    for package in way.needs:
        importlib.import_module(package)  # some start CUDA, whose memory another's measurement would see
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
        small = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
        )
        attempt(way, small.eval().to(device, dtype), [torch.randn(2, 3, 8, 8).to(device, dtype)])
        del small
        tidy(device)
        tell({"ready": True})
        if go():
            measure(way, module, inputs, device, job["expected"], tell)


def measure(
    way: Way,
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    expected: str,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Build a way of a module that is still on the CPU and measure its variants; `expected` is a file of outputs."""
    before = used(device)
    inputs = [x.to(device) for x in inputs]
    module.to(device)
    wait(device)
    start = time.perf_counter()
    run = way.build(module, inputs)
    seconds = time.perf_counter() - start
    del module
    for name, variant in way.variants.items():
        try:
            start = time.perf_counter()
            with variant(run, inputs) as call:
                call()
                wait(device)
                seconds += time.perf_counter() - start
                tidy(device)
                for _ in range(3):
                    call()
                wait(device)
                numbers = {"build": seconds, "memory": (used(device) - before) / 2**20}
                numbers |= timings(call, device, inputs[0].shape[0] if inputs[0].dim() else 1)
                outputs = tensors(call())
            tell({"way": name, **numbers, **compare(outputs, torch.load(expected))})
        except Exception as error:
            traceback.print_exc()
            tell({"way": name, "failure": first_line(error)})


def attempt(way: Way, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Build and run a module in every variant, as far as that is possible; measuring will say what is not."""
    with contextlib.suppress(Exception):
        run = way.build(module, inputs)
        for variant in way.variants.values():
            with variant(run, inputs) as call:
                call()
        wait(inputs[0].device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    torch.set_grad_enabled(False)
    try:
        work(job, lambda: sys.stdin.readline().strip() == "go", tell)
    except Exception as error:
        traceback.print_exc()
        tell({"failure": first_line(error)})


if __name__ == "__main__":
    main()
