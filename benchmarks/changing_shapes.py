"""Calls whose shapes change from one to the next: microseconds of the host, beside bare TensorRT and eager.

    NVIDIA_TF32_OVERRIDE=0 python benchmarks/changing_shapes.py [--seconds 2] [--limit 60] [--parts one,threads,many]

Two convolutions and a linear layer with dynamic batch, height and width; 1, 2, 8 and 64 shapes on a side stream, and
64 shapes in eight threads with a stream each. "Bare" tells a TensorRT context the shape of the input and two
addresses, and runs it; it allocates nothing. "Held" is what torch has reserved after the calls. The last rows are
calls of many shapes without and with a graph cache: how much memory torch holds then, and what the graphs of it need.
A new shape takes TensorRT milliseconds, so these rows end after `--limit` seconds in all, and say how many shapes there
were. Needs a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from torch2rt import TRTModule, torch2rt
from torch2rt.backend.tensorrt import FLAVOUR, VERSION

RANGES = {"min_shapes": [(1, 3, 32, 32)], "opt_shapes": [(2, 3, 128, 128)], "max_shapes": [(8, 3, 256, 256)]}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, padding=1)
        self.last = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.last(x.mean((2, 3)))


def drawn(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Different shapes within the range, at random."""
    choose, shapes = random.Random(seed), {}
    while len(shapes) < count:
        shapes[choose.randint(1, 8), 3, choose.randint(32, 256), choose.randint(32, 256)] = None
    return list(shapes)


def order(count: int, length: int, seed: int = 0) -> list[int]:
    """Which shape comes when: two in turn, more at random."""
    choose = random.Random(seed)
    return [i % count if count <= 2 else choose.randrange(count) for i in range(length)]


def bare(model_trt: TRTModule, inputs: list[torch.Tensor], threads: int) -> Callable[[], Callable[[int], Any]]:
    """Calls by TensorRT contexts with memory of their own, one for each thread, on the thread's stream.

    They are made before, and several threads tell and run them one after the other: TensorRT for RTX 1.6 crashes
    otherwise (see `torch2rt.backend.quirks.runs_alone_at_other_shapes`).
    """
    loaded = model_trt._ready().loaded
    contexts = [loaded.create_context(own_memory=True) for _ in range(threads)]
    outputs = [model_trt(x) for x in inputs]
    lock = threading.Lock() if threads > 1 else contextlib.nullcontext()
    for context in contexts:
        _bare(context, model_trt, inputs, outputs, lock)(0)
    torch.cuda.synchronize()
    return lambda: _bare(contexts.pop(), model_trt, inputs, [y.clone() for y in outputs], lock)


def _bare(
    context: Any, model_trt: TRTModule, inputs: list[torch.Tensor], outputs: list[torch.Tensor], lock: Any
) -> Callable[[int], Any]:
    (name,), (result,) = model_trt.input_names, model_trt.output_names
    stream = torch.cuda.current_stream().cuda_stream

    def call(i: int) -> None:
        x = inputs[i]
        with lock:
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
            context.set_tensor_address(result, outputs[i].data_ptr())
            context.execute_async_v3(stream)

    return call


def microseconds(call: Callable[[int], Any], count: int, repeats: int = 40) -> float:
    """Median of a call: few in a row, as they wait for the GPU once CUDA's queue is full."""
    for turn in range(60):
        for i in order(count, 50, turn):
            call(i)
        torch.cuda.current_stream().synchronize()
    times = []
    for turn in range(repeats):
        sequence = order(count, 50, 1000 + turn)
        start = time.perf_counter()
        for i in sequence:
            call(i)
        times.append((time.perf_counter() - start) / 50 * 1e6)
        torch.cuda.current_stream().synchronize()
    return statistics.median(times)


def ways(
    model: torch.nn.Module, converted: TRTModule, inputs: list[torch.Tensor], threads: int = 1
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Each way to run the model: what gives the function that a thread calls with the number of an input."""
    yield "eager", lambda: lambda i: model(inputs[i])
    yield "bare", bare(copy.copy(converted), inputs, threads)
    for name, graph in (("torch2rt", False), ("with graphs", True)):
        model_trt = copy.copy(converted)  # with contexts of its own
        model_trt.cuda_graph = graph
        model_trt(inputs[0])
        yield name, lambda made=model_trt: lambda i: made(inputs[i])  # type: ignore[misc]


def held() -> float:
    """MiB that torch has reserved."""
    return torch.cuda.memory_reserved() / 2**20


def released() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def one_thread(model: torch.nn.Module, converted: TRTModule, count: int) -> dict[str, Any]:
    inputs = [torch.randn(shape, device="cuda") for shape in drawn(count)]
    row: dict[str, Any] = {"shapes": count}
    with torch.cuda.stream(torch.cuda.Stream()):
        for name, way in ways(model, converted, inputs):
            released()
            before = held()
            row[name] = microseconds(way(), count)
            print(f"  {name}: {row[name]:.1f}", file=sys.stderr, flush=True)
            row[f"{name}, MiB held"] = held() - before
    return row


def rate(make: Callable[[], Callable[[int], Any]], count: int, threads: int, seconds: float) -> float:
    """Calls a second of so many threads, each with a stream of its own."""
    start, end = threading.Barrier(threads + 1, timeout=300), threading.Event()

    def work(seed: int) -> int:
        made = 0
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            call = make()
            for i in order(count, 2000, seed):
                call(i)
            torch.cuda.current_stream().synchronize()
            start.wait()
            while not end.is_set():
                for i in order(count, 20, seed + made):
                    call(i)
                torch.cuda.current_stream().synchronize()
                made += 20
        return made

    with ThreadPoolExecutor(threads) as pool:
        counts = [pool.submit(work, seed) for seed in range(threads)]
        start.wait()
        begun = time.perf_counter()
        time.sleep(seconds)
        end.set()
        return sum(made.result() for made in counts) / (time.perf_counter() - begun)


def many_threads(
    model: torch.nn.Module, converted: TRTModule, count: int, threads: int, seconds: float
) -> dict[str, Any]:
    inputs = [torch.randn(shape, device="cuda") for shape in drawn(count)]
    row: dict[str, Any] = {"calls a second of threads": threads, "shapes": count}
    for name, way in ways(model, converted, inputs, threads):
        released()
        before = held()
        row[name] = rate(way, count, threads, seconds)
        print(f"  {name}: {row[name]:.1f}", file=sys.stderr, flush=True)
        row[f"{name}, MiB held"] = held() - before
    return row


def many_shapes(converted: TRTModule, count: int, limit: float) -> Iterator[dict[str, Any]]:
    """What torch holds after calls of so many shapes, some of which come back more often than others.

    One half of the calls brings a new shape each, while there are such.
    """
    shapes = drawn(count, 1)
    for graph in (False, True):
        choose = random.Random(2)
        model_trt = copy.copy(converted)
        model_trt.cuda_graph = graph
        with torch.cuda.stream(torch.cuda.Stream()):
            model_trt(torch.randn(shapes[0], device="cuda"))
            released()
            before, most, calls, new = held(), 0.0, 0, 1
            begun = said = time.perf_counter()
            while (now := time.perf_counter()) - begun < limit / 2 and calls < 3 * count:
                if calls % 2 == 0 and new < count:
                    i, new = new, new + 1
                else:
                    i = int(choose.paretovariate(0.3)) % new
                model_trt(torch.empty(shapes[i], device="cuda"))
                most, calls = max(most, held()), calls + 1
                if now - said > 5:
                    said = now
                    print(f"  {calls} calls, {new} shapes: {held() - before:.1f} MiB held", file=sys.stderr, flush=True)
            torch.cuda.current_stream().synchronize()
            seconds = time.perf_counter() - begun
        pool = model_trt._ready()
        yield {
            "shapes": new,
            "calls": calls,
            "with graphs": graph,
            "microseconds": seconds / calls * 1e6,
            "MiB held": held() - before,
            "at most": most - before,
            "graphs": len(pool.graphs),
            "MiB of graphs": pool.memory.held() / 2**20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long the threads call")
    parser.add_argument("--shapes", type=int, default=10_000, help="the most shapes that the last rows call with")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that the last rows may take")
    parser.add_argument("--parts", default="one,threads,many", help="which rows: one thread, eight, or many shapes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = Net().eval().cuda()
    print(f"{torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}, torch {torch.__version__}")
    converted = torch2rt(model, [torch.randn(2, 3, 128, 128, device="cuda")], verify=False, **RANGES)
    rows: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "one": lambda: (one_thread(model, converted, count) for count in (1, 2, 8, 64)),
        "threads": lambda: iter([many_threads(model, converted, 64, 8, arguments.seconds)]),
        "many": lambda: many_shapes(converted, arguments.shapes, arguments.limit),
    }
    for part in arguments.parts.split(","):
        for row in parts[part]():
            rows.append(row)
            cells = (f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  ".join(cells), flush=True)
            released()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "tensorrt": f"{FLAVOUR} {VERSION}", "rows": rows}, file)


if __name__ == "__main__":
    main()
