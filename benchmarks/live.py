"""How soon a converted model answers: in the background, from a file, and from a file that has its compiled kernels.

    python benchmarks/live.py resnet50 vit_b_16

For each model of torchvision, in seconds: eager's first call; how long `torch2rt(..., background=True)` takes, and that
and the first answer; until the engine is ready; eager's median call while the engine is built, beside that without a
build; and from `load()` to the first answer in a new process, without and with kernels in the file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

from torch2rt import save, torch2rt


def synchronized(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call, device):
    """What a call returns, and its seconds until the GPU is done."""
    start = time.perf_counter()
    result = call()
    synchronized(device)
    return result, time.perf_counter() - start


def measure(name, device, folder):
    """The numbers of a model."""
    make = getattr(torchvision.models, name)
    x = torch.randn(1, 3, 224, 224, device=device)
    found = {}
    with torch.no_grad():
        model = make(weights=None).eval().to(device)
        synchronized(device)
        _, found["eager's first call"] = timed(lambda: model(x), device)
        alone = statistics.median(timed(lambda: model(x), device)[1] for _ in range(50))
        expected = model(x)
        begin = time.perf_counter()
        soon, found["torch2rt(background=True)"] = timed(lambda: torch2rt(model, [x], background=True), device)
        first, _ = timed(lambda: soon(x), device)
        found["to the first answer"] = time.perf_counter() - begin
        assert torch.equal(first, expected)
        beside = []
        while not soon.ready and soon.error is None:
            beside.append(timed(lambda: soon(x), device)[1])
        found["until the engine is ready"] = time.perf_counter() - begin
        found["eager's median call"], found["while the engine is built"] = alone, statistics.median(beside)
        if soon.error is not None:
            return {**found, "no engine": str(soon.error).splitlines()[0]}
        last = soon(x)
        assert (last - expected).abs().max() <= 2e-2 * expected.abs().max()
        for kernels in (False, True):
            path = Path(folder) / f"{name}.{kernels}.t2rt"
            save(soon, path, inputs=[x], kernels=kernels)
            found[f"load to first answer, {'with' if kernels else 'without'} kernels"] = loaded(path)
    return found


LOADED = """
import json, sys, time, torch
import torch2rt
x = torch.randn(1, 3, 224, 224, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
torch2rt.load(sys.argv[1])(x)
torch.cuda.synchronize()
print(json.dumps(time.perf_counter() - start))
"""


def loaded(path):
    """The seconds from `load` to the first answer, in a new process without a cache folder."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(path)],
        env={**os.environ, "TORCH2RT_CACHE": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description="How soon a converted model answers.")
    parser.add_argument("models", nargs="*", default=["resnet50", "vit_b_16"])
    parser.add_argument("--json", help="write the result to a file")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            results[name] = measure(name, device, folder)
            print(json.dumps({name: results[name]}, indent=2), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
