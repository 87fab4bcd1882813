"""Host time of a call, beside TensorRT's own: what TRTModule adds to a bare `execute_async_v3`.

    NVIDIA_TF32_OVERRIDE=0 python benchmarks/overhead.py [--json FILE]

Median of many calls, from the side of Python, on a side stream and on the default stream; and how many calls a second
one module makes in 1 to 8 threads, each with a stream of its own. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision

from torch2rt import torch2rt


class Sums(torch.nn.Module):
    """As many outputs as inputs, with one small layer each."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x + i for i, x in enumerate(tensors, 1))


def microseconds(function, calls: int = 50, repeats: int = 100) -> float:
    """The host's part of one: few calls in a row, as they wait for the GPU once CUDA's queue is full."""
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def measure(name: str, model: torch.nn.Module, inputs: list[torch.Tensor]) -> dict[str, float | str]:
    model_trt = torch2rt(model, inputs, max_batch_size=4)
    outputs = model_trt(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    row: dict[str, float | str] = {"model": name, "tensors": len(inputs) + len(outputs)}
    context = model_trt.context
    for key, tensor in [*zip(model_trt.input_names, inputs), *zip(model_trt.output_names, outputs)]:
        context.set_tensor_address(key, tensor.data_ptr())
    for key, tensor in zip(model_trt.input_names, inputs):
        context.set_input_shape(key, tuple(tensor.shape))
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        row["bare"] = microseconds(lambda: context.execute_async_v3(side.cuda_stream))
        row["call"] = microseconds(lambda: model_trt(*inputs))
    with torch.no_grad():
        row["call, default stream"] = microseconds(lambda: model_trt(*inputs))
        row["eager"] = microseconds(lambda: model(*inputs))
        model_trt.cuda_graph = True
        row["graph"] = microseconds(lambda: model_trt(*inputs))
        copies = [x.clone() for x in inputs]
        row["graph, other inputs"] = microseconds(lambda: model_trt(*copies))
        model_trt.borrow_outputs = True
        row["graph, borrowed"] = microseconds(lambda: model_trt(*copies))
    return row


def calls_a_second(model: torch.nn.Module, x: torch.Tensor, threads: int, graph: bool, seconds: float = 0.5) -> float:
    """Of one module, in so many threads at once."""
    start, end = threading.Barrier(threads + 1, timeout=60), threading.Event()
    model.cuda_graph = graph

    def work() -> int:
        count = 0
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                model(x)
            torch.cuda.current_stream().synchronize()
            start.wait()
            while not end.is_set():
                for _ in range(10):
                    model(x)
                torch.cuda.current_stream().synchronize()
                count += 10
        return count

    with ThreadPoolExecutor(threads) as pool:
        counts = [pool.submit(work) for _ in range(threads)]
        start.wait()
        begun = time.perf_counter()
        time.sleep(seconds)
        end.set()
        return sum(count.result() for count in counts) / (time.perf_counter() - begun)


def measure_threads(name: str, model: torch.nn.Module, x: torch.Tensor) -> dict[str, float | str]:
    model_trt = torch2rt(model, [x])
    row: dict[str, float | str] = {"calls a second": name}
    for graph in (False, True):
        for threads in (1, 2, 4, 8):
            rate = calls_a_second(model_trt, x, threads, graph)
            row[f"{'graph' if graph else 'plain'}, {threads}"] = rate
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    x = torch.randn(1, 3, 32, 32, device="cuda")
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval().cuda()
    rows = [measure("conv + relu", conv, [x])]
    rows += [measure(f"{n} sums", Sums(), [torch.randn(2, 64, device="cuda") for _ in range(n)]) for n in (1, 2, 8)]
    rows.append(measure_threads("conv + relu", conv, x))
    resnet = torchvision.models.resnet18(weights=None).eval().half().cuda()
    rows.append(measure_threads("resnet18", resnet, torch.randn(1, 3, 224, 224, device="cuda").half()))
    for row in rows:
        print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
