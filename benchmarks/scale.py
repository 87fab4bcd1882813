"""How tracing and lowering grow with a model: in time with its calls, in memory with its weights.

    python benchmarks/scale.py [--json FILE] [--check]
    python benchmarks/scale.py --weights GIB [--json FILE] [--check]

The first traces and lowers transformers of up to 48 layers and residual networks of up to 400 blocks, all narrow, and
prints processor time per recorded call, which stays the same where time is linear in the calls; each number is the best
of three. The second converts a stack of linear layers with that many GiB of weights, in a process of its own, and
prints the peak of memory beyond the model up to each stage. TensorRT's builder holds the engine, which is as large as
the weights, and so does what it returns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from meter import Meter, in_a_process, verdict

from torch2rt import build, lower, trace

SIZES = {"transformer": (6, 12, 24, 48), "resnet": (50, 100, 200, 400)}
LINEAR_AIM = 1.5  # the largest model takes at most this many times the seconds per call of the smallest; noise is 1.3
MEMORY_AIM = 0.5  # times the weights, for trace and lower together
WIDTH = 4096  # of the linear layers of --weights: 64 MiB each


class Layer(torch.nn.Module):
    """A transformer's layer: attention and a feed-forward part, each behind a norm."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(torch.nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None, None, :] > 0
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Block(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = (torch.nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = torch.nn.BatchNorm2d(width), torch.nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def example(family: str, size: int) -> tuple[torch.nn.Module, list[torch.Tensor], dict[str, Any]]:
    """A model, its inputs, and the range of its dynamic shapes."""
    if family == "transformer":
        shapes = {f"{end}_shapes": [(b, s, 32), (b, s)] for end, b, s in (("min", 1, 1), ("opt", 2, 9), ("max", 8, 64))}
        return Transformer(size).eval(), [torch.randn(2, 9, 32), torch.ones(2, 9)], shapes
    blocks = torch.nn.Sequential(*(Block() for _ in range(size)))
    return blocks.eval(), [torch.randn(2, 8, 16, 16)], {"max_batch_size": 8}


def seconds(family: str, size: int, repeats: int = 3) -> dict[str, Any]:
    """The calls that a model makes, and how long it takes to trace and to lower them."""
    model, inputs, shapes = example(family, size)
    best = {"trace": float("inf"), "lower": float("inf")}
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        graph = trace(model, inputs, **shapes)
        traced = time.process_time()
        network = lower(graph)
        lowered = time.process_time()
        best = {"trace": min(best["trace"], traced - start), "lower": min(best["lower"], lowered - traced)}
    calls = sum(node.op == "call_function" for node in graph.graph.nodes)
    return {"size": size, "calls": calls, "layers": network.num_layers, "seconds": best}


def table(curves: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'model':<19}{'calls':>7}{'layers':>8}{'trace':>11}{'lower':>10}{'trace':>14}{'lower':>10} a call"]
    for family, curve in curves.items():
        for point in curve:
            stages = [point["seconds"][stage] for stage in ("trace", "lower")]
            whole = "".join(f"{s:>8.2f} s" for s in stages)
            each = "".join(f"{1e3 * s / point['calls']:>7.2f} ms" for s in stages)
            name = f"{family} {point['size']}"
            lines.append(f"{name:<19}{point['calls']:>7}{point['layers']:>8} {whole}    {each}")
    return "\n".join(lines)


def growth(curve: list[dict[str, Any]], stage: str) -> float:
    """Seconds per call of the largest model, in those of the smallest: 1 where the time is linear in the calls."""
    first, last = (point["seconds"][stage] / point["calls"] for point in (curve[0], curve[-1]))
    return last / first


def aims(curves: dict[str, list[dict[str, Any]]]) -> list[tuple[bool, str]]:
    checks = []
    for family, curve in curves.items():
        for stage in ("trace", "lower"):
            factor = growth(curve, stage)
            text = f"{family}: {curve[-1]['calls'] / curve[0]['calls']:.1f} times the calls"
            checks.append((factor <= LINEAR_AIM, f"{text}, {factor:.2f} times the {stage} time of each"))
    return checks


def memory(gib: float) -> dict[str, Any]:
    """The conversion of a stack of linear layers in this process."""
    small = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
    build(lower(trace(small, [torch.randn(2, 4)], max_batch_size=8)), progress=False)  # imports, TensorRT's start
    count = max(1, round(gib * 2**30 / (4 * WIDTH * WIDTH)))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    meter = Meter()
    graph = meter.stage("trace", lambda: trace(model, [torch.randn(2, WIDTH)], max_batch_size=8))
    network = meter.stage("lower", lambda: lower(graph))
    engine = len(meter.stage("build", lambda: build(network, progress=False)).data)
    return {"weights": weights, "engine": engine, "seconds": meter.seconds, "peak": meter.peak}


def report(result: dict[str, Any]) -> str:
    weights = result["weights"]
    lines = [f"{weights / 2**30:.2f} GiB of weights, an engine of {result['engine'] / 2**30:.2f} GiB"]
    for stage, peak in result["peak"].items():
        lines.append(
            f"up to {stage:<6}{result['seconds'][stage]:>8.2f} s {peak / 2**20:>8.0f} MiB beyond the model, "
            f"{peak / weights:.3f} times the weights"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=float, metavar="GIB", help="memory of a conversion with so many weights")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(memory(arguments.weights)))
        return 0
    results: dict[str, Any] = {"torch": torch.__version__, "cpus": os.cpu_count()}
    if arguments.weights:
        results["memory"] = result = in_a_process(__file__, "--measure", "--weights", str(arguments.weights))
        if "error" in result:
            print(result["error"], file=sys.stderr)
            return 1
        print(report(result))
        factor = result["peak"]["lower"] / result["weights"]
        checks = [(factor <= MEMORY_AIM, f"trace and lower take {factor:.3f} times the weights")]
    else:
        for family in SIZES:
            seconds(family, 2, 1)  # not counted: imports and TensorRT's start
        curves = {family: [seconds(family, size) for size in sizes] for family, sizes in SIZES.items()}
        results["time"] = curves
        print(table(curves))
        checks = aims(curves)
    status = verdict(checks, arguments.check)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
