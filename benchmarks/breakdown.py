"""Where the time goes: the seconds of each step of a build, and the kernels of a call.

    python benchmarks/breakdown.py [--rows NAME,...] [--batch 1,16] [--kernels N]

For models of `benchmarks/table.py`, each in a process of its own with empty caches, after a small module was built.
Beside the seconds on the clock stand those of all threads together, which say how much of a step runs in parallel; the
kernels are those of a replayed CUDA graph, longest first. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from table import jobs

from torch2rt import TRTModule, build, lower, torch2rt, trace
from torch2rt.backend import FLAVOUR, VERSION
from torch2rt.measuring import make

REPLAYS = 10
STEPS = {
    "trace": "trace", "lower": "lower", "build": "TensorRT's builder", "load": "load, and compile kernels",
    "call": "first call", "capture": "capture",
}  # fmt: skip


class Clock:
    """Seconds of steps: on the clock, and of the processor in all threads."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}

    def __call__(self, step: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter(), time.process_time()
        result = function()
        torch.cuda.synchronize()
        self.steps[step] = time.perf_counter() - start[0], time.process_time() - start[1]
        return result


def measure(name: str, batch: int) -> dict[str, Any]:
    """The steps of one model's build, and its kernels by name: microseconds and how often, in one replay."""
    job = jobs()[name][batch]
    module, inputs = make({"model": job.model, "inputs": job.inputs, "dtype": job.dtype})
    torch.cuda.set_stream(torch.cuda.Stream())
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval().half().cuda()
    warm = torch2rt(small, [torch.randn(2, 3, 8, 8, device="cuda").half()], cuda_graph=True)
    warm(torch.randn(2, 3, 8, 8, device="cuda").half())
    module, inputs = module.cuda(), [x.cuda() for x in inputs]
    torch.cuda.synchronize()
    clock = Clock()
    graph = clock("trace", lambda: trace(module, inputs))
    network = clock("lower", lambda: lower(graph))
    engine = clock("build", lambda: build(network))
    model_trt = TRTModule(engine, network.interface, made_by={"flavour": FLAVOUR, "version": VERSION})
    clock("load", lambda: model_trt.engine)
    clock("call", lambda: model_trt(*inputs))
    model_trt.cuda_graph = True
    clock("capture", lambda: model_trt(*inputs))
    return {"layers": network.num_layers, "steps": clock.steps, "kernels": kernels(lambda: model_trt(*inputs))}


def kernels(call: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """What a call runs on the GPU: microseconds and how often, by name."""
    for _ in range(REPLAYS):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            call()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.device_time_total > 0]
    return {event.key: (event.device_time_total / REPLAYS, event.count / REPLAYS) for event in found}


def in_a_process(name: str, batch: int) -> dict[str, Any]:
    """`measure` with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCH2RT_CACHE": folder, "CUDA_CACHE_PATH": folder}
        command = [sys.executable, __file__, "--rows", name, "--batch", str(batch), "--measure"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def show_steps(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds on the clock / of all threads."""
    lines = [f"| | layers | {' | '.join(STEPS.values())} | all |", f"|---|---:{'|---:' * (len(STEPS) + 1)}|"]
    for name, row in rows.items():
        steps = row["steps"]
        total = sum(clock for clock, _ in steps.values())
        cells = " | ".join(f"{steps[step][0]:.2f} / {steps[step][1]:.2f}" for step in STEPS)
        lines.append(f"| {name} | {row['layers']} | {cells} | {total:.2f} |")
    return "\n".join(lines)


def show_kernels(row: Mapping[str, Any], most: int) -> str:
    """The kernels that take most of a call."""
    ordered = sorted(row["kernels"].items(), key=lambda item: -item[1][0])
    total, count = (sum(numbers) for numbers in zip(*row["kernels"].values()))
    lines = [f"{total:9.1f} us {count:5.0f} x  all"]
    return "\n".join(lines + [f"{us:9.1f} us {count:5.0f} x  {key[:100]}" for key, (us, count) in ordered[:most]])


def main(argv: Sequence[str] | None = None) -> int:
    every = jobs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(every), help=f"some of {','.join(every)} (default: all)")
    parser.add_argument("--batch", default="1,16", help="batch sizes, separated by commas (default: 1,16)")
    parser.add_argument("--kernels", type=int, default=12, metavar="N", help="how many of each model (default: 12)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    names, batches = arguments.rows.split(","), [int(size) for size in arguments.batch.split(",")]
    if unknown := [name for name in names if name not in every]:
        parser.error(f"there is no row {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU and torch sees none", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    if arguments.measure:
        print(json.dumps(measure(names[0], batches[0])))
        return 0
    rows: dict[str, Any] = {}
    for name in names:
        for batch in (batch for batch in batches if batch in every[name]):
            rows[f"{name}, batch {batch}"] = row = in_a_process(name, batch)
            print(f"{name}, batch {batch}\n{show_kernels(row, arguments.kernels)}\n", flush=True)
    print(f"{torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}, torch {torch.__version__}; seconds / of all threads\n")
    print(show_steps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
