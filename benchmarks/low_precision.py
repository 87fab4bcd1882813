"""Quantised products on a GPU: does the engine compute what its network says, how far is that from float32, how fast?

    python benchmarks/low_precision.py [--rows 16,2048] [--size 4096] [--layers 4]

For a chain of linear layers with a GELU between them, in each format: the distance of the engine's outputs from the
reference's, which should be that of roundings, and from eager float32, both in parts of their norm; and the median
latency of CUDA-graph replays. Then the same for convolutions in int8, and in fp8, which torch2rt does not quantise
(`torch2rt.backend.quirks.builds_fp8_convolutions`): here they are, to see whether a TensorRT computes them right.
Needs a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from precision import distance, latency

from torch2rt import torch2rt
from torch2rt.backend.tensorrt import FLAVOUR, VERSION
from torch2rt.errors import Torch2RTError
from torch2rt.passes.quantization import formats

WAYS = "fp16 bf16 int8 int8+bf16 fp8 fp8+bf16 int8_weights int4_weights int4_weights+bf16".split()


def linear(rows: int, size: int, layers: int) -> tuple[torch.nn.Module, torch.Tensor]:
    parts = [part for _ in range(layers) for part in (torch.nn.Linear(size, size), torch.nn.GELU())]
    return torch.nn.Sequential(*parts).eval().cuda(), torch.randn(rows, size, device="cuda")


def convolutions(layers: int) -> tuple[torch.nn.Module, torch.Tensor]:
    parts = [part for _ in range(layers) for part in (torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.ReLU())]
    return torch.nn.Sequential(*parts).eval().cuda(), torch.randn(16, 128, 56, 56, device="cuda")


def measure(name: str, module: torch.nn.Module, x: torch.Tensor, ways: list[str]) -> None:
    with torch.no_grad():
        expected = module(x)
    for way in ways:
        options: dict[str, Any] = {"precision": way}
        if way.startswith(("int8", "fp8")) and "weights" not in way:
            options |= {"calibration": [x], "calibration_method": "minmax"}
        try:
            model_trt = torch2rt(module, [x], verify=False, **options)
            found = model_trt(x)
            own = distance(found, model_trt.reference()(x))
            errors = f"{own:>12.1e}{distance(found, expected):>12.1e}"
            size = f"{len(model_trt.engine_bytes) / 2**20:.1f}"
            print(f"{name:<20}{way:<20}{errors}{latency(model_trt, [x]):>10.1f}{size:>10}", flush=True)
        except Torch2RTError as error:
            print(
                f"{name:<20}{way:<20}{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="16,2048")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}")
    print(f"{'':<20}{'':<20}{'reference':>12}{'eager':>12}{'us':>10}{'MiB':>10}")
    for rows in map(int, arguments.rows.split(",")):
        module, x = linear(rows, arguments.size, arguments.layers)
        measure(f"linear, {rows} rows", module, x, WAYS)
    module, x = convolutions(6)
    measure("convolutions", module, x, ["fp16", "int8"])
    with mock.patch.object(formats, "builds_fp8_convolutions", lambda: True):
        measure("convolutions", module, x, ["fp8"])


if __name__ == "__main__":
    main()
