"""Where the time goes: the seconds of each step of a build, and the kernels of a call.

    python benchmarks/breakdown.py [--rows NAME,...] [--batch 1,16] [--kernels N]

For models of `benchmarks/table.py`, each in a process of its own with empty caches, after a small module was built.
Beside the seconds on the clock stand those of all threads together, which say how much of a step runs in parallel; the
kernels are those of a replayed CUDA graph, longest first. Needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from meter import Meter, in_a_process, kernel_lines, kernel_times
from table import jobs

from torch2rt import TRTModule, build, lower, torch2rt, trace
from torch2rt.backend.tensorrt import FLAVOUR, VERSION
from torch2rt.bench.worker import make

STEPS = {
    "trace": "trace",
    "lower": "lower",
    "build": "TensorRT's builder",
    "load": "load, and compile kernels",
    "call": "first call",
    "capture": "capture",
}


def measure(name: str, batch: int) -> dict[str, Any]:
    """The steps of one model's build, and the kernels of one replay."""
    module, inputs = make(dataclasses.asdict(jobs()[name][batch]))
    torch.cuda.set_stream(torch.cuda.Stream())
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval().half().cuda()
    warm = torch2rt(small, [torch.randn(2, 3, 8, 8, device="cuda").half()], cuda_graph=True)
    warm(torch.randn(2, 3, 8, 8, device="cuda").half())
    module, inputs = module.cuda(), [x.cuda() for x in inputs]
    torch.cuda.synchronize()
    meter = Meter()
    graph = meter.stage("trace", lambda: trace(module, inputs))
    network = meter.stage("lower", lambda: lower(graph))
    engine = meter.stage("build", lambda: build(network))
    model_trt = TRTModule(engine)
    meter.stage("load", lambda: model_trt.engine)

    def finished() -> None:
        model_trt(*inputs)
        torch.cuda.synchronize()

    meter.stage("call", finished)
    model_trt.cuda_graph = True
    meter.stage("capture", finished)
    steps = {step: (meter.seconds[step], meter.of_threads[step]) for step in STEPS}
    return {"layers": network.num_layers, "steps": steps, "kernels": kernel_times(lambda: model_trt(*inputs))}


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
    total, count = sum(us for *_, us in row["kernels"]), sum(n for _, n, _ in row["kernels"])
    return "\n".join(kernel_lines([("all", count, total), *row["kernels"]], 1 + most))


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
    status = 0
    for name, batch in ((name, batch) for name in names for batch in batches if batch in every[name]):
        with tempfile.TemporaryDirectory() as folder:
            empty = {"TORCH2RT_CACHE": folder, "CUDA_CACHE_PATH": folder}
            command = ("--rows", name, "--batch", str(batch), "--measure")
            row = in_a_process(__file__, *command, environment=empty)
        title = f"{name}, batch {batch}"
        if "error" in row:
            print(f"{title}: {row['error']}", file=sys.stderr)
            status = 1
            continue
        rows[title] = row
        print(f"{title}\n{show_kernels(row, arguments.kernels)}\n", flush=True)
    print(f"{torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}, torch {torch.__version__}; seconds / of all threads\n")
    print(show_steps(rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
