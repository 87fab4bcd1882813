"""The ways to run a module on a GPU.

A `Way` has a function that turns a module into something callable, and variants: context managers that give a call
without arguments. `WAYS` is the table of them; another way is another row. `measuring.py` is the process in which one
of them is built and measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Variant = Callable[[Any, Sequence[torch.Tensor]], contextlib.AbstractContextManager[Call]]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a module is built, how the result is called, and which packages that needs beside torch and torch2rt.

    `build(module, inputs)` gets a module and its inputs on the GPU. A variant gets what it returns, and the inputs.
    """

    build: Callable[[torch.nn.Module, Sequence[torch.Tensor]], Any]
    variants: Mapping[str, Variant]
    needs: tuple[str, ...] = ()


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

    return torch2rt(module, list(inputs), keep_network=False, verify=False, progress=False)


@contextlib.contextmanager
def cuda_graph(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """torch2rt's own CUDA graphs; each output is a fresh tensor."""
    run.cuda_graph = True
    try:
        run(*inputs)
        if run.cuda_graph_refused:
            raise RuntimeError(run.cuda_graph_refused)
        yield lambda: run(*inputs)
    finally:
        run.cuda_graph = False


@contextlib.contextmanager
def borrowed(run: Any, inputs: Sequence[torch.Tensor]) -> Iterator[Call]:
    """The same with outputs that the next replay overwrites, as those of the other ways' graphs are."""
    run.borrow_outputs = True
    try:
        with cuda_graph(run, inputs) as call:
            yield call
    finally:
        run.borrow_outputs = False


class OnnxEngine:
    """torch.onnx.export, TensorRT's parser and builder, and an engine on outputs allocated once."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        from torch2rt.backend.tensorrt import LOG, TORCH_DTYPES, trt

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
        from torch2rt.backend.tensorrt import (
            builds_without_gpu,
            create_builder,
            create_network,
            set_compute_capabilities,
            trt,
        )

        builder = create_builder()
        network = create_network(builder)
        config = builder.create_builder_config()
        if builds_without_gpu() and torch.cuda.is_available():
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
    "torch2rt": Way(
        converted, {"torch2rt": plain, "torch2rt + graph": cuda_graph, "torch2rt + graph, borrowed": borrowed}
    ),
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
