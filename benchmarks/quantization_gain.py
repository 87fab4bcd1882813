"""Which products are faster in int8 and fp8 on this GPU, and does torch2rt choose them (`quantization/gain.py`)?

    python benchmarks/quantization_gain.py [--rows 16,128,512,2048,8192] [--sizes 128x128,768x3072] [--formats int8,fp8]
        [--processes 8] [--seconds 90]

A size `768x3072` is a chain of six layers (two, where weights are large) as in a transformer: a layer norm, a product
of 768 inputs and 3072 outputs, GELU, a product of 3072 inputs and 768 outputs, and a sum. For each number of rows and
each size, a line of CSV says how many microseconds one layer takes on the GPU in float16 and quantised, and whether the
rule quantises its products (1) or not (0). Processes build side by side for two thirds of so many seconds. Then one
after the other measures, so that nothing else runs on the GPU meanwhile. Needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
from torch import multiprocessing

from torch2rt import passes, torch2rt, trace
from torch2rt.backend.tensorrt import FLAVOUR, VERSION
from torch2rt.errors import Torch2RTError
from torch2rt.passes.order import run
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.gain import slower

SIZES = (
    "768x768,768x3072,128x128,128x512,384x1536,4096x4096,256x256,1024x1024,2048x2048,512x512,64x256,512x2048,"
    "1024x4096,256x1024,768x64,64x1024,4096x512"
)
LAYERS, FEW_LAYERS, LARGE = 6, 2, 2**20  # how many, and how many of weights with so many numbers
ROUNDS, CALLS = 15, 20  # the median of so many rounds of calls
AHEAD = 4_000_000  # cycles that the GPU waits while the calls of a round are queued: 2 ms


class Layer(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(inputs)
        self.first, self.second = torch.nn.Linear(inputs, outputs), torch.nn.Linear(outputs, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.nn.functional.gelu(self.first(self.norm(x))))


def time_on_gpu(model_trt: Any, x: torch.Tensor) -> float:
    """Microseconds that a call takes. The GPU is kept busy while calls are queued, so that it never waits for them."""
    model_trt.cuda_graph = True
    for _ in range(5):
        model_trt(x)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(CALLS):
            model_trt(x)
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def build(size: str, rows: int, format: str) -> tuple[str, list[Any], torch.Tensor, int]:
    """What is said of a chain, its engines, their input and the number of layers."""
    inputs, outputs = map(int, size.split("x"))
    torch.manual_seed(0)
    count = FEW_LAYERS if inputs * outputs >= LARGE else LAYERS
    model = torch.nn.Sequential(*(Layer(inputs, outputs) for _ in range(count))).eval().cuda()
    x = torch.randn(rows, inputs, device="cuda")
    options: dict[str, Any] = dict(calibration=[x], calibration_method="minmax", quantize_all=True)
    engines = [torch2rt(model, [x], verify=False, precision="fp16")]
    engines.append(torch2rt(model, [x], verify=False, precision=format, **options))
    for model_trt in engines:
        model_trt(x)  # kernels are compiled at the first call
    graph = run(trace(model, [x]), passes.default())
    slow = slower(graph, FORMATS[format], torch.float16)
    return f"{format},{rows},{inputs},{outputs},{{}},{int(not slow)}", engines, x, count


def work(tasks: Any, lock: Any, barrier: Any, until: float) -> None:
    """Build until no tasks are left, or until the time is over, and measure when all processes have built."""
    built = []
    while time.time() < until and (task := tasks.get()) is not None:
        try:
            built.append(build(*task))
        except (Torch2RTError, RuntimeError) as error:
            print(f"# {task}: {str(error).splitlines()[0]}", flush=True)
    barrier.wait()
    with lock:
        for text, engines, x, count in built:
            times = [f"{time_on_gpu(model_trt, x) / count:.2f}" for model_trt in engines]
            print(text.format(",".join(times)), flush=True)
    os._exit(0)  # TensorRT and CUDA take seconds to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="128,2048,16,512,8192")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--formats", default="int8")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90)
    arguments = parser.parse_args()
    end = time.time() + arguments.seconds
    until = end - arguments.seconds / 3
    print(f"# {torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}, microseconds a layer")
    print("format,rows,inputs,outputs,fp16,quantised,rule", flush=True)
    context = multiprocessing.get_context("spawn")
    tasks, lock, barrier = context.Queue(), context.Lock(), context.Barrier(arguments.processes)
    for format in arguments.formats.split(","):
        for size in arguments.sizes.split(","):
            for rows in map(int, arguments.rows.split(",")):
                tasks.put((size, rows, format))
    workers = [context.Process(target=work, args=(tasks, lock, barrier, until)) for _ in range(arguments.processes)]
    for worker in workers:
        tasks.put(None)
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end + 10 - time.time()))
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
