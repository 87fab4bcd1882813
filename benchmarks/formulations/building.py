"""Engines of a pattern's formulations, built in a process of its own for each pattern and batch size."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from parts import Pattern
from torch import nn

from torch2rt import Engine, build, lower, trace
from torch2rt.backend.tensorrt import LOG, create_builder, create_network, trt
from torch2rt.lowering import Network
from torch2rt.runtime.loaded_engine import LoadedEngine
from torch2rt.runtime.pool import ContextPool


def by_onnx(module: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> Network:
    """The network that TensorRT's own parser makes of torch's export."""
    path = folder / "model.onnx"
    names = [f"input_{i}" for i in range(len(inputs))]
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(module, inputs, str(path), dynamo=True, external_data=False, input_names=names, verbose=False)
    interface = trace(module, inputs).meta["torch2rt"].interface
    builder = create_builder()
    network = Network(create_network(builder), builder, interface)
    parser = trt.OnnxParser(network.definition, LOG)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    for i in range(network.definition.num_outputs):
        network.definition.get_output(i).name = interface.outputs[i]
    network.parser = parser  # type: ignore[attr-defined]  # the weights are its own
    return network


def kernels_of(network: Network) -> tuple[Engine, list[str]]:
    """An engine, and its kernels as the builder lists them."""

    def detailed(config):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = build(network, configure=detailed, log_level=trt.ILogger.Severity.VERBOSE, progress=False)
    text = said.getvalue()
    text = text[text.find("[TensorRT] Layers:") :].split("Bindings:")[0]
    found = re.findall(r"^Name: (.*?), LayerType: (\w+)", text, re.M)
    return engine, [f"{kind} {name}" for name, kind in found if kind not in ("signal", "wait")]


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for x in (result.values() if hasattr(result, "values") else result) if isinstance(x, torch.Tensor)]


def work(pattern: Pattern, batch: int, folder: Path, onnx: bool, build_only: bool) -> None:
    """Build all formulations, each into a file of its own, beside one for the inputs and what float32 makes of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    modules = {name: module.eval() for name, module in pattern.formulations().items()}
    first = next(iter(modules.values()))
    makers = [(name, module, False) for name, module in modules.items()] + [("ONNX parser", first, True)] * onnx
    inputs = tuple(x.half() if x.is_floating_point() else x for x in pattern.inputs(batch))
    with torch.no_grad():
        wide = copy.deepcopy(first).half().float()
        reference = tensors(wide(*(x.float() if x.is_floating_point() else x for x in inputs)))
    names = [name for name, _, _ in makers]
    torch.save({"inputs": inputs, "reference": reference, "names": names}, folder / "case.pt")
    for index, (name, module, parsed) in enumerate(makers):
        record: dict[str, Any] = {"formulation": name}
        try:
            start = time.perf_counter()
            half = copy.deepcopy(module).half()
            network = by_onnx(half, inputs, folder) if parsed else lower(trace(half, inputs))
            record["layers"] = network.num_layers
            engine, record["kernels"] = kernels_of(network)
            record["plan"] = engine.data
            record["build"] = time.perf_counter() - start
            if not build_only:  # its kernels, into the cache that the measuring process reads
                start = time.perf_counter()
                ContextPool(LoadedEngine(engine)).close()
                record["compile"] = time.perf_counter() - start
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).strip()}"[:400]
        torch.save(record, folder / f"{index}.partial")
        os.replace(folder / f"{index}.partial", folder / f"{index}.pt")


def start(name: str, batch: int, arguments: argparse.Namespace, folder: Path) -> Path:
    """Run a worker, once more if it ends with nothing done; returns its folder."""
    place = folder / f"{re.sub('[^a-z0-9]+', '-', name)}-{batch}"
    place.mkdir()
    script = str(Path(__file__).parent)
    command = [sys.executable, script, "--worker", name, "--batch", str(batch), "--folder", str(place)]
    command += ["--onnx"] * arguments.onnx + ["--build-only"] * arguments.build_only
    for _ in range(2):
        with open(place / "log", "w") as log:
            try:
                done = subprocess.run(command, check=False, stdout=log, stderr=log, timeout=arguments.patience)
                why = f"ended with {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"was stopped after {arguments.patience:.0f} s"
        if not why or (place / "0.pt").exists():
            break
    if why:
        print(f"{name}, batch {batch}: the worker {why}", flush=True)
    return place
