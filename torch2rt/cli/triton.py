"""`torch2rt export-triton`: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from torch2rt.arguments import whole_number
from torch2rt.bench.models import Table
from torch2rt.engine import artifact
from torch2rt.engine.container import is_container, read
from torch2rt.engine.engine import Engine
from torch2rt.engine.manifest import engine_of, readable
from torch2rt.errors import EngineError, InputError
from torch2rt.interface import Interface
from torch2rt.runtime.module import TRTModule
from torch2rt.saving import save

BACKENDS = ("auto", "tensorrt", "python")
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
SEGMENTS = "segments"  # in the place of TensorRT's flavour, for a module of several engines and torch calls
SERVED = Path(__file__).with_name("triton_model.py")


def export_triton(
    path: str, folder: str, *, name: str | None, instances: int, delay: int, batching: bool, backend: str
) -> None:
    """Write the repository of one model; raises `EngineError` or `InputError` for what Triton cannot serve."""
    whole_number("--instances", instances, 1)
    whole_number("--delay", delay, 0)
    engine = read_engine(path)
    name = name or Path(path).stem
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise InputError(f"{name!r} is no name for a model in Triton: give one with --name.")
    reason = why_not_tensorrt(engine)
    if backend == "tensorrt" and reason:
        raise EngineError(f"Triton's TensorRT backend cannot serve this engine: {reason}. Use --backend python.")
    is_plan = backend == "tensorrt" or (backend == "auto" and not reason)
    text = configuration(engine, name, is_plan=is_plan, instances=instances, delay=delay, batching=batching)
    check(text)
    where = Path(folder) / name
    (where / "1").mkdir(parents=True, exist_ok=True)
    (where / "config.pbtxt").write_text(text, encoding="utf-8")
    for old in ("model.plan", "model.py", "model.t2rt"):
        (where / "1" / old).unlink(missing_ok=True)
    if is_plan:
        (where / "1" / "model.plan").write_bytes(engine.data)
    else:
        shutil.copyfile(SERVED, where / "1" / "model.py")
        if is_container(path):
            shutil.copyfile(path, where / "1" / "model.t2rt")
        else:
            save(TRTModule(engine), where / "1" / "model.t2rt")
    show = Table(quiet=False)
    show.row("model", name, str(where))
    show.row("backend", "tensorrt" if is_plan else "python", "" if is_plan or not reason else reason)
    show.row("batches", f"up to {batch_size(engine)}" if batching and batch_size(engine) else "none")


def read_engine(path: str) -> Engine:
    """The engine in a file, whichever TensorRT it is of; raises `EngineError` for a file without, or with others."""
    if not is_container(path):
        data, header = artifact.load(path)
        if header is None:
            raise EngineError(f"{path} has no calling convention: Triton itself serves plain engines.")
        return artifact.parse(data, header)
    file = read(path)
    with readable(file):
        module = file.manifest["module"]
        if module["kind"] == "partitioned":
            return _in_segments(path, module["header"], file.manifest["example"])
        if module["kind"] != "engine":
            raise EngineError(
                f"{path} holds a {module['kind']} module, whose state Triton would not keep for each of its clients. "
                'Convert with state="explicit".'
            )
        return engine_of(file, module)


def _in_segments(path: str, header: Any, example: Any) -> Engine:
    """What is to be known of a module in segments, in the place of an engine; its outputs are those of the example."""
    if example is None:
        raise EngineError(
            f"{path} does not say of what types the outputs are: torch2rt.save(..., inputs=[x]) keeps it."
        )
    interface = Interface.from_json(header["interface"])
    places = [leaf["output"] for leaf in interface.leaves if "output" in leaf]
    outputs = {
        interface.outputs[place]: f"{dtype}[{', '.join('?' * len(shape))}]"
        for place, (dtype, shape, _) in zip(places, example["outputs"], strict=True)
    }
    return Engine(b"", interface, {"flavour": SEGMENTS}, facts={"outputs": outputs})


def why_not_tensorrt(engine: Engine) -> str:
    """Why Triton's TensorRT backend cannot serve an engine; empty if it can."""
    if engine.made_by.get("flavour") == SEGMENTS:
        return "torch makes some of the module's calls"
    if engine.made_by.get("flavour") != "tensorrt":
        return "it links TensorRT, which reads no plans of TensorRT for RTX"
    if engine.variants:
        return "there are several engines, each for some of the sizes"
    if engine.interface.constraints:
        return f"nobody would check that calls have {engine.interface.constraints[0][1]}"
    if any(spec.memory_format is not torch.contiguous_format for spec in engine.interface.inputs):
        return "it reads inputs in channels_last, which Triton's clients do not send"
    return ""


def batch_size(engine: Engine) -> int:
    """The largest batch of requests; 0 where dimension 0 is not a batch of 1 to that in all inputs and outputs.

    It is 0 for a module in segments, too, as sizes of its outputs may depend on values.
    """
    if engine.made_by.get("flavour") == SEGMENTS:
        return 0
    interface = engine.interface
    ranges = {(spec.min[0], spec.max[0]) if spec.min else (0, 0) for spec in interface.inputs}
    rows = [dims[:1] == [-1] for _, dims in outputs_of(engine).values()]
    if len(ranges) != 1 or not all(rows) or not all(0 in spec.dynamic for spec in interface.inputs):
        return 0
    ((low, high),) = ranges
    return high if low == 1 else 0


def outputs_of(engine: Engine) -> dict[str, tuple[str, list[int]]]:
    """Dtype and sizes of each output, -1 where they vary; raises `EngineError` where the file does not say."""
    found = {}
    for name in engine.interface.outputs:
        described = re.fullmatch(r"(\w+)\[(.*)\]", engine.facts.get("outputs", {}).get(name, ""))
        if described is None or described[1] not in TYPES:
            raise EngineError(f"The file does not say of what type and rank the output '{name}' is: convert it again.")
        dims = [-1 if dim.strip() == "?" else int(dim) for dim in described[2].split(",") if dim.strip()]
        found[name] = described[1], [dims[0], *[-1] * len(dims[1:])] if engine.variants and dims else dims
    return found


def configuration(engine: Engine, name: str, *, is_plan: bool, instances: int, delay: int, batching: bool) -> str:
    """The text of `config.pbtxt`."""
    most = batch_size(engine) if batching else 0
    lines = [f'name: "{name}"', 'platform: "tensorrt_plan"' if is_plan else 'backend: "python"']
    lines.append(f"max_batch_size: {most}")
    for spec in engine.interface.inputs:
        dims = [-1 if axis in spec.dynamic else size for axis, size in enumerate(spec.opt)]
        lines.append(_tensor("input", spec.name, str(spec.dtype).removeprefix("torch."), dims, most))
    for output, (dtype, dims) in outputs_of(engine).items():
        lines.append(_tensor("output", output, dtype, dims, most))
    if most:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}")
    profiles = ""
    if is_plan and _is_dynamic(engine.interface):
        names = ", ".join(f'"{index}"' for index in range(len(engine.interface.profiles)))
        profiles = f" profile: [{names}]"
    lines.append(f"instance_group [{{ kind: KIND_GPU count: {instances}{profiles} }}]")
    if is_plan:
        lines.append('default_model_filename: "model.plan"')
    return "\n".join(lines) + "\n"


def _is_dynamic(interface: Interface) -> bool:
    return any(spec.dynamic for spec in interface.inputs)


def _tensor(kind: str, name: str, dtype: str, dims: list[int], most: int) -> str:
    dims = dims[1:] if most else dims
    if not dims:  # Triton knows no tensors without dimensions
        return f'{kind} [{{ name: "{name}" data_type: {TYPES[dtype]} dims: [1] reshape: {{ shape: [] }} }}]'
    return f'{kind} [{{ name: "{name}" data_type: {TYPES[dtype]} dims: {dims} }}]'


def check(text: str) -> Any:
    """Hold a configuration against Triton's own definition, where `tritonclient` is installed, which has it."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError):  # tritonclient without the `grpc` that it is installed with on request
        return None
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise EngineError(f"Triton would not read this configuration: {error}\n{text}") from error
