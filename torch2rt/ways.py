"""The ways to run a module on a GPU, and the process in which one of them is built and measured.

A `Way` has a function that turns a module into something callable, and variants: context managers that give a call
without arguments. `WAYS` is the table of them; another way is another row.

`python -m torch2rt.ways` builds and measures one way. It reads a job from stdin, a line of JSON, and makes the model,
which takes no GPU memory, and waits for the line "go". Then it imports what the way needs, builds and runs a small
module in the same way, so that loading libraries is not counted, says that it is ready and waits for another "go". Each
variant's numbers are a line of JSON on stdout.

All ways run on one CUDA stream, which is not the default stream: TensorRT would wait for the device there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torch2rt.commands import example, load_model
from torch2rt.structure import flatten
from torch2rt.verification import Difference

Call = Callable[[], Any]
Variant = Callable[[Any, Sequence[torch.Tensor]], contextlib.AbstractContextManager[Call]]
WARM = 0.2  # seconds to run before measuring, so that the GPU's clocks are up
LONG = 0.3  # seconds to measure latency, and throughput, at least
CALLS = 20  # the fewest calls that a median is taken of


@dataclasses.dataclass(frozen=True)
class Way:
    """How a module is built, how the result is called, and which packages that needs beside torch and torch2rt.

    `build(module, inputs)` gets a module and its inputs on the GPU. A variant gets what it returns, and the inputs.
    """

    build: Callable[[torch.nn.Module, Sequence[torch.Tensor]], Any]
    variants: Mapping[str, Variant]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass
class Measurement:
    """What was measured of a way; only `way` and `failure`, the first line of its error, of one that failed.

    - `latency`: median milliseconds of a call between CUDA events, the GPU waiting before each.
    - `throughput`: samples per second of calls back to back; a sample is one of the first input's dimension 0.
    - `host`: median microseconds a call takes on the host until it returns, without waiting for the GPU.
    - `build`: seconds from a module in GPU memory to the first finished output.
    - `memory`: MiB of GPU memory in use after calls, beyond what was in use before the model: weights, activations,
      and the module where the way still needs it.
    - `error`: largest absolute difference over the largest absolute value of what the same weights give in float32;
      None where that says nothing, for the reason in `remark`.
    """

    way: str
    latency: float | None = None
    throughput: float | None = None
    host: float | None = None
    build: float | None = None
    memory: float | None = None
    error: float | None = None
    remark: str | None = None
    failure: str | None = None


# The ways ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """Call what was built."""
    yield lambda: run(*inputs)


@contextlib.contextmanager
def captured(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """Capture a call in a CUDA graph and replay it; its outputs are overwritten by the next replay."""
    for _ in range(3):
        run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # TensorRT has threads of its own
        outputs = run(*inputs)

    def replay() -> Any:
        graph.replay()
        return outputs

    yield replay


def eager(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.nn.Module:
    return module


def compiled(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    torch.compiler.reset()  # or it takes sizes for dynamic that were others in the small module
    return torch.compile(module, mode="reduce-overhead")


def converted(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    from torch2rt import torch2rt

    return torch2rt(module, list(inputs), keep_network=False, progress=False)


@contextlib.contextmanager
def cuda_graph(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """torch2rt's own CUDA graphs; each output is a fresh tensor."""
    run.cuda_graph = True
    try:
        yield lambda: run(*inputs)
    finally:
        run.cuda_graph = False


class OnnxEngine:
    """torch.onnx.export, TensorRT's parser and builder, and an engine on outputs allocated once."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        from torch2rt.backend import LOG, TORCH_DTYPES, trt

        plan = self.plan(module, inputs)
        with LOG.capture() as log:
            self.runtime = trt.Runtime(LOG)
            self.engine = self.runtime.deserialize_cuda_engine(plan)
            self.context = self.engine and self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError(f"TensorRT cannot run the engine here: {'; '.join(log)}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        takes = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(takes) != len(inputs):
            raise RuntimeError(f"the ONNX model takes {', '.join(takes)}, the module {len(inputs)} inputs")
        for name, x in zip(takes, inputs, strict=True):
            self.context.set_tensor_address(name, x.data_ptr())
        self.inputs = list(inputs)
        self.outputs = []
        for name in names:
            if name not in takes:
                dtype = TORCH_DTYPES[self.engine.get_tensor_dtype(name)]
                y = torch.empty(tuple(self.engine.get_tensor_shape(name)), dtype=dtype, device=inputs[0].device)
                self.context.set_tensor_address(name, y.data_ptr())
                self.outputs.append(y)

    @staticmethod
    def plan(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
        """The serialized engine."""
        from torch2rt.backend import IS_RTX, create_builder, create_network, set_compute_capabilities, trt

        builder = create_builder()
        network = create_network(builder)
        config = builder.create_builder_config()
        if IS_RTX and torch.cuda.is_available():
            set_compute_capabilities(config, ["current"])  # as torch2rt does
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.onnx")
            torch.onnx.export(module, tuple(inputs), path, dynamo=True)
            parser = trt.OnnxParser(network, builder.logger)
            if not parser.parse_from_file(path):
                raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("TensorRT could not build the network")
        return plan

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        return self.outputs


def torch_tensorrt_compiled(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    import torch_tensorrt

    options = {"use_explicit_typing": True, "min_block_size": 1}
    return torch_tensorrt.compile(module, ir="dynamo", inputs=list(inputs), **options)


@contextlib.contextmanager
def enable_cudagraphs(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """Torch-TensorRT's own CUDA graphs."""
    from torch_tensorrt.runtime import enable_cudagraphs as graphs

    with graphs(run) as graphed:
        yield lambda: graphed(*inputs)


WAYS: dict[str, Way] = {
    "eager": Way(eager, {"eager": plain, "eager + graph": captured}),
    "torch.compile": Way(compiled, {"torch.compile": plain}),
    "torch2rt": Way(converted, {"torch2rt": plain, "torch2rt + graph": cuda_graph}),
    "onnx": Way(OnnxEngine, {"onnx": plain, "onnx + graph": captured}, ("onnx", "onnxscript")),
    "torch-tensorrt": Way(
        torch_tensorrt_compiled,
        {"torch-tensorrt": plain, "torch-tensorrt + graph": enable_cudagraphs},
        ("torch_tensorrt",),
    ),
}


def find(name: str) -> Way:
    """A row of `WAYS`, or the `Way` that a `package.module:NAME` names."""
    if name in WAYS:
        return WAYS[name]
    source, _, attribute = name.partition(":")
    return getattr(importlib.import_module(source), attribute)


# Measuring -----------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until everything enqueued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used(device: torch.device) -> int:
    """Bytes of GPU memory in use, by everyone."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def tidy(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def milliseconds(call: Call, device: torch.device) -> float:
    """One call between two CUDA events on an idle GPU; on a CPU, what the clock on the wall says."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def repeat(seconds: float, calls: int, function: Callable[[], Any]) -> list[Any]:
    """Results of a function, called for so many seconds and at least so many times."""
    results: list[Any] = []
    end = time.perf_counter() + seconds
    while len(results) < calls or time.perf_counter() < end:
        results.append(function())
    return results


def timings(call: Call, device: torch.device, batch: int) -> dict[str, float]:
    """Latency, throughput and host time of a call, as `Measurement` has them."""
    repeat(WARM, 3, lambda: milliseconds(call, device))
    latency = statistics.median(repeat(LONG, CALLS, lambda: milliseconds(call, device)))
    count = max(CALLS, int(LONG * 1e3 / latency))
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    throughput = count * batch / (time.perf_counter() - start)
    # Several calls in a row, as callers make them, but few enough that the host never waits for room in CUDA's queue.
    row = max(1, min(20, int(1 / latency)))

    def host() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(row):
            call()
        return (time.perf_counter() - start) / row * 1e6

    return {"latency": latency, "throughput": throughput, "host": statistics.median(repeat(LONG / 2, CALLS, host))}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, on the CPU."""
    return [x.detach().cpu() for x in flatten(value, torch.is_tensor, "result")[0]]


def compare(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, Any]:
    """`error`, the largest of several outputs, or the `remark` why there is none.

    Raises `ValueError` where the outputs do not correspond.
    """
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the outputs have the shapes {shapes[0]}, the module's {shapes[1]}")
    if not any(x.numel() for x in expected):
        return {"remark": "nothing to compare: the module's output is empty"}
    if not any(x.any() for x in expected):
        return {"remark": "nothing to compare: the module's output is all zero"}
    if not all(x.isfinite().all() for x in expected):
        return {"remark": "nothing to compare: the module's output is not finite"}
    if not all(x.isfinite().all() for x in actual):
        return {"remark": "the output is not finite, the module's is"}
    return {"error": max(Difference(a, b).relative for a, b in zip(actual, expected, strict=True))}


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


# The process ---------------------------------------------------------------------------------------------------------


def make(job: Mapping[str, Any]) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A job's model and inputs on the CPU: the same ones in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many processes do this at once; and sums are rounded alike in all of them
    try:
        torch.manual_seed(0)
        module = load_model(job["model"]).eval().to(getattr(torch, job["dtype"]))
        cpu = torch.device("cpu")
        return module, [example(tuple(shape), getattr(torch, dtype), cpu) for shape, dtype in job["inputs"]]
    finally:
        torch.set_num_threads(threads)


def work(job: Mapping[str, Any], go: Callable[[], bool], tell: Callable[[dict[str, Any]], None]) -> None:
    """Build and measure a job's way, telling {"ready": True} and then the fields of each `Measurement`."""
    way, device, dtype = find(job["way"]), torch.device(job["device"]), getattr(torch, job["dtype"])
    module, inputs = make(job)
    if not go():
        return
    for package in way.needs:
        importlib.import_module(package)  # some start CUDA, whose memory another's measurement would see
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
        small = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
        )
        attempt(way, small.eval().to(device, dtype), [torch.randn(2, 3, 8, 8).to(device, dtype)])
        del small
        tidy(device)
        tell({"ready": True})
        if go():
            measure(way, module, inputs, device, job["expected"], tell)


def measure(
    way: Way,
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    expected: str,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Build a way of a module that is still on the CPU and measure its variants; `expected` is a file of outputs."""
    before = used(device)
    inputs = [x.to(device) for x in inputs]
    module.to(device)
    wait(device)
    start = time.perf_counter()
    run = way.build(module, inputs)
    seconds = time.perf_counter() - start
    del module
    for name, variant in way.variants.items():
        try:
            start = time.perf_counter()
            with variant(run, inputs) as call:
                call()
                wait(device)
                seconds += time.perf_counter() - start
                tidy(device)
                for _ in range(3):
                    call()
                wait(device)
                numbers = {"build": seconds, "memory": (used(device) - before) / 2**20}
                numbers |= timings(call, device, inputs[0].shape[0] if inputs[0].dim() else 1)
                outputs = tensors(call())
            tell({"way": name, **numbers, **compare(outputs, torch.load(expected))})
        except Exception as error:
            traceback.print_exc()
            tell({"way": name, "failure": first_line(error)})


def attempt(way: Way, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Build and run a module in every variant, as far as that is possible; measuring will say what is not."""
    with contextlib.suppress(Exception):
        run = way.build(module, inputs)
        for variant in way.variants.values():
            with variant(run, inputs) as call:
                call()
        wait(inputs[0].device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def tell(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    torch.set_grad_enabled(False)
    try:
        work(job, lambda: sys.stdin.readline().strip() == "go", tell)
    except Exception as error:
        traceback.print_exc()
        tell({"failure": first_line(error)})


if __name__ == "__main__":
    main()
