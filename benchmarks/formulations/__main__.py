"""Which way of writing a block in TensorRT layers runs fastest: the converters' own, and others that mean the same.

    python benchmarks/formulations [--only TEXT] [--batch 1,16] [--onnx] [--json FILE]
    python benchmarks/formulations --models all [--batch 1,16] [--json FILE]
    python benchmarks/formulations --build-only

Blocks of resnet50, mobilenet_v3_large, efficientnet_b0, convnext_tiny, vit_b_16, swin_t and BERT, in half precision and
in the shapes these models use them in. The first formulation of a block is the plain torch code, as the converters
lower it; the others are other torch code, or layers that no converter adds. With `--onnx` one more is what TensorRT's
own ONNX parser makes of the plain code, and `--models` puts whole models through both, with the time of each kernel.

Engines are built in processes of their own, many at a time, and then measured one after the other: the median over
replays of a CUDA graph of many calls. The error is the largest one against float32 in torch, over the largest value.
`--build-only` needs no GPU and shows how many kernels TensorRT makes of each formulation.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # meter.py

import attention
import building
import convolutions
import measuring
import tokens
import torch
from models import MODELS

from torch2rt.backend.tensorrt import FLAVOUR, VERSION

PATTERNS = {**convolutions.PATTERNS, **tokens.PATTERNS, **attention.PATTERNS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="patterns whose name has this text in it; several with |")
    parser.add_argument("--batch", default="1,16", help="batch sizes")
    parser.add_argument("--models", default="", help="whole models instead of blocks: all, or names with commas")
    parser.add_argument("--onnx", action="store_true", help="also what the ONNX parser makes of it")
    parser.add_argument("--build-only", action="store_true", help="build, without a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that build at a time")
    parser.add_argument("--patience", type=float, default=180, help="seconds for the engines of one pattern")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which nothing more is measured")
    parser.add_argument("--json", help="write all rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        pattern = {**PATTERNS, **MODELS}[arguments.worker]
        building.work(pattern, int(arguments.batch), Path(arguments.folder), arguments.onnx, arguments.build_only)
        return 0
    patterns = {name: pattern for name, pattern in PATTERNS.items() if re.search(arguments.only, name)}
    if arguments.models:
        names = MODELS if arguments.models == "all" else arguments.models.split(",")
        if unknown := [name for name in names if name not in MODELS]:
            parser.error(f"no models {', '.join(unknown)}; there are {', '.join(MODELS)}")
        patterns, arguments.onnx = {name: MODELS[name] for name in names}, True
    batches = [int(b) for b in arguments.batch.split(",")]
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH2RT_CACHE"] = str(Path(folder) / "kernels")
        os.environ["OMP_NUM_THREADS"] = "1"
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            jobs = {
                (name, batch): pool.submit(building.start, name, batch, arguments, Path(folder))
                for batch in sorted(batches, reverse=True)
                for name in reversed(patterns)
            }
        print(f"built in {time.perf_counter() - began:.0f} s", flush=True)
        for name, batch in ((n, b) for n in patterns for b in batches):
            if time.perf_counter() - began > arguments.limit and not arguments.build_only:
                print(f"{name}, batch {batch}: not measured, {arguments.limit:.0f} s are over")
                continue
            try:
                found = measuring.measure(jobs[name, batch].result(), arguments.build_only, bool(arguments.models))
            except Exception as error:
                found = [{"formulation": "all", "error": f"{type(error).__name__}: {error}"[:400]}]
            rows += [{"pattern": name, "batch": batch, "places": patterns[name].places, **row} for row in found]
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(rows, indent=1))
    measuring.table(rows)
    measuring.kernel_tables(rows)
    if not arguments.build_only:
        measuring.short_table(rows)
    print(f"\n{FLAVOUR} {VERSION}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s in all")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
