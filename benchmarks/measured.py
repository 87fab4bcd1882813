"""What `fallback="measure"` chooses for models that torch.compile may run faster, beside each way's own time.

    python benchmarks/measured.py                                # convnext_tiny and vit_b_16, float16 and float32
    python benchmarks/measured.py convnext_tiny --dtypes float16 --batch 16

Needs a GPU. Each line is printed as soon as it is known: eager torch and torch.compile, each captured in a CUDA graph;
one engine with CUDA graphs; last, `fallback="measure"` with `cuda_graph=True`: what it measured, what it chose, and how
long its calls take. The last column is how much longer than the fastest other way. A model in one type takes about half
a minute, most of it torch's compiler; `--skip eager` and the like leave ways out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision

from torch2rt import torch2rt

NAMES = ("convnext_tiny", "vit_b_16")
AIM = 1.01  # of the fastest other way
WAYS = ("eager", "torch.compile", "engine", "measure")


def milliseconds(call: Callable[[], Any], rounds: int = 20, calls: int = 20) -> float:
    """The median time of a call, over rounds of calls back to back."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[len(times) // 2] * 1e3


def captured(run: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    """Replays of a call."""
    for _ in range(3):
        run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run(x)
    return graph.replay


@torch.no_grad()
def measure(name: str, dtype: torch.dtype, batch: int, skipped: list[str]) -> None:
    """The lines of a model in a type."""
    module = getattr(torchvision.models, name)().eval().to("cuda", dtype)
    for parameter in module.parameters():  # heads and layer scales that are nearly zero
        if parameter.abs().max() < 1e-4:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)
    expected, best = module(x), float("inf")
    for way in WAYS:
        if way in skipped:
            continue
        start, run, call = time.perf_counter(), module, None
        if way == "torch.compile":
            torch.compiler.reset()
            run = torch.compile(module)
        elif way != "eager":
            fallback: Any = {"engine": False, "measure": "measure"}[way]
            run = torch2rt(module, [x], fallback=fallback, cuda_graph=True, verify=False, progress=False)
        call = captured(run, x) if way in ("eager", "torch.compile") else lambda run=run: run(x)
        error = ((run(x) - expected).abs().max() / expected.abs().max()).item()
        took = time.perf_counter() - start
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
            ms = milliseconds(call)
        where = f"{name}, {str(dtype).removeprefix('torch.')}, batch {batch}"
        ratio = f", {ms / best:.3f} of the best other" if way == "measure" and best < float("inf") else ""
        print(f"{where}: {way:<14}{ms:8.3f} ms{ratio} (error {error:.1e}; {took:.0f} s to make)", flush=True)
        if way == "measure":
            print(f"  {type(run).__name__}; without graphs: {run.cuda_graph_refused}", flush=True)
            print("\n".join(f"  {line}" for line in str(run.report).splitlines()), flush=True)
        else:
            best = min(best, ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), help="models of torchvision")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--skip", nargs="*", default=[], choices=WAYS)
    options = parser.parse_args()
    for name in options.names:
        for dtype in options.dtypes:
            measure(name, getattr(torch, dtype), options.batch, options.skip)


if __name__ == "__main__":
    main()
