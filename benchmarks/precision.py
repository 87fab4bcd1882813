"""Precision on a GPU: is a float32 module with `precision="fp16"` as fast as its half, and int8 faster, and how exact?

    python benchmarks/precision.py [--batch N] [--models A,B,...] [--int8] [--fp8]

For each model: the median latency of CUDA-graph replays, and the distance of the outputs from eager float32 in parts of
their norm, of `module.half()`, `precision="fp16"`, `"bf16"` and, with `--int8` and `--fp8`, these. The ratio is that of
`fp16` to `half`, which should be at most 1.05. Random weights; needs a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from table import Bert

from torch2rt import torch2rt
from torch2rt.bench.models import load_model
from torch2rt.errors import Torch2RTError

MODELS = "resnet50 mobilenet_v3_large efficientnet_b0 convnext_tiny vit_b_16 swin_t bert".split()
RUNS = 50


def latency(model_trt: Any, inputs: list[torch.Tensor]) -> float:
    """The median of microseconds that a replay takes on the GPU."""
    model_trt.cuda_graph = True
    for _ in range(10):
        model_trt(*inputs)
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model_trt(*inputs)
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def distance(actual: Any, expected: Any) -> float:
    """How far outputs are from others, in parts of their norm."""
    ours, theirs = (torch.utils._pytree.tree_leaves(value) for value in (actual, expected))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True))


def example(name: str, batch: int) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    if name == "bert":
        ids = torch.randint(0, 30000, (batch, 128), device="cuda")
        return Bert().eval().cuda(), [ids, torch.ones_like(ids)]
    return load_model(f"torchvision:{name}").eval().cuda(), [torch.randn(batch, 3, 224, 224, device="cuda")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--int8", action="store_true", help="calibrate on the inputs, and measure int8 too")
    parser.add_argument("--fp8", action="store_true", help="the same of fp8, in which convolutions stay in float16")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, batch {arguments.batch}")
    print(f"{'model':<22}{'precision':<12}{'us':>10}{'to half':>10}{'distance':>12}  stays in float32")
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        module, inputs = example(name, arguments.batch)
        with torch.no_grad():
            expected = module(*inputs)
        half = [x.half() if x.is_floating_point() else x for x in inputs]
        ways: dict[str, dict[str, Any]] = {"half": {}, "fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"}}
        if arguments.int8:
            ways["int8"] = {"precision": "int8", "calibration": [inputs], "calibration_method": "percentile"}
        if arguments.fp8:
            ways["fp8"] = {"precision": "fp8", "calibration": [inputs]}
        base = None
        for way, options in ways.items():
            own = half if way == "half" else inputs
            try:
                model_trt = torch2rt(copy.deepcopy(module).half() if way == "half" else module, own, **options)
                time, error = latency(model_trt, own), distance(model_trt(*own), expected)
            except Torch2RTError as refused:
                print(f"{name:<22}{way:<12}{str(refused).splitlines()[0]}")
                continue
            base = base or time
            kept = sum("stays in float32" in text for text in model_trt.report.assumptions)
            print(f"{name:<22}{way:<12}{time:>10.1f}{time / base:>10.3f}{error:>12.2e}  {kept or ''}", flush=True)


if __name__ == "__main__":
    main()
