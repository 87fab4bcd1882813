"""Where the time of a second conversion goes, whose engine was kept by the first.

    python benchmarks/second_conversion.py resnet50 vit_b_16 bert_base

Each conversion is one in a process of its own: the first builds and keeps the engine, and the others find it. A line is
printed for each, in seconds: until the first result, and of that what tracing took, the key of the graph, reading the
file, TensorRT's deserialisation, the kernels' cache, the execution context, the first call, and verification. With
`--refittable`, engines that take new weights, and at the end one whose weights are others. Without a GPU the reference
stands for the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from refit import DEVICE, made, waited  # noqa: E402

from torch2rt import torch2rt  # noqa: E402
from torch2rt.conversion import conversion  # noqa: E402
from torch2rt.debug import verify  # noqa: E402
from torch2rt.engine import engine_cache  # noqa: E402
from torch2rt.runtime import loaded_engine, refit  # noqa: E402


@contextlib.contextmanager
def timed(*steps: tuple[Any, str, str]) -> Iterator[dict[str, float]]:
    """The seconds of functions while this lasts: of each owner's attribute, under a name."""
    spent: dict[str, float] = {name: 0.0 for _, _, name in steps}

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in steps]
    for (owner, attribute, function), (_, _, name) in zip(originals, steps, strict=True):
        setattr(owner, attribute, watched(function, name))
    try:
        yield spent
    finally:
        for owner, attribute, function in originals:
            setattr(owner, attribute, function)


STEPS = (
    (conversion, "trace_variants", "trace"),
    (conversion, "run", "passes"),
    (conversion, "lower_with_values", "lower"),
    (conversion, "build", "build"),
    (engine_cache, "file_of", "key"),
    (engine_cache, "read", "read"),
    (engine_cache, "write", "write"),
    (verify.Verifying, "finish", "verification"),
    (loaded_engine, "deserialize", "deserialise"),
    (loaded_engine, "KernelCache", "kernels"),
    (loaded_engine, "create_execution_context", "context"),
    (refit, "_refit", "refit"),
)


def one(name: str, tiny: bool, refittable: bool, factor: float) -> dict[str, Any]:
    """A conversion in this process, and its first result."""
    model, x = made(name, tiny)
    model, x = model.to(DEVICE).eval(), x.to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
        expected = model(x)
    stages: dict[str, float] = {}
    with timed(*STEPS) as spent:
        seconds, model_trt = waited(lambda: torch2rt(model, [x], refittable=refittable))
        run = model_trt if DEVICE.type == "cuda" else model_trt.reference()
        first, result = waited(lambda: run(x))
    again, _ = waited(lambda: run(x))
    error = ((result - expected).abs().max() / expected.abs().max()).item()
    stages |= {"until the first result": seconds + first, "conversion": seconds, "first call": first, "call": again}
    return {**stages, **{name: value for name, value in spent.items() if value}, "error": error}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Where the time of a second conversion goes.")
    parser.add_argument("models", nargs="*", default=["resnet50", "vit_b_16", "bert_base"])
    parser.add_argument("--again", type=int, default=2, help="conversions after the first (default: 2)")
    parser.add_argument("--refittable", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", type=float, help="a single conversion in this process, of weights times this number")
    parser.add_argument("--json", help="write the result to a file")
    asked = parser.parse_args(arguments)
    if asked.one is not None:
        found = one(asked.models[0], asked.tiny, asked.refittable, asked.one)
        print(json.dumps(found))
        return found
    results: dict[str, Any] = {}
    flags = ["--refittable"] * asked.refittable + ["--tiny"] * asked.tiny
    for name in asked.models:
        results[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            runs = {"first": 1.0, **{f"again {i + 1}": 1.0 for i in range(asked.again)}}
            for run, factor in {**runs, **({"other weights": 1.01} if asked.refittable else {})}.items():
                command = [sys.executable, __file__, name, *flags, "--one", str(factor)]
                environment = {**os.environ, "TORCH2RT_CACHE": folder}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                results[name][run] = json.loads(done.stdout.splitlines()[-1])
                words = "  ".join(f"{key} {value:.3g}" for key, value in results[name][run].items())
                print(f"{name:<12}{run:<16}{words}", flush=True)
        if asked.json:
            Path(asked.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
