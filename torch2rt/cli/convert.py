"""`torch2rt convert`: trace, lower, build and verify a model, with a row of a table for each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from torch2rt.bench.models import Failure, Table, by, check_inputs, example, load_model, require_tensorrt
from torch2rt.cli.samples import load_samples
from torch2rt.cli.weights import load_weights
from torch2rt.errors import Torch2RTError
from torch2rt.usage import UsageError

OPTIONS = """
    max_batch_size input_names output_names nan float64 verify max_workspace_size compute_capabilities
    optimization_level tf32 log_level multiple_of shapes merge
""".split()
ABOUT_TYPES = """
    precision io_precision keep_fp32 force_low calibration_method calibration_cache keep_float smooth_quant
    bias_correction quantize_attention quantize_all tolerance
""".split()
ABOUT_FALLBACK = "torch_executed min_segment_calls max_sizes".split()


def convert(arguments: argparse.Namespace) -> None:
    """Run the command; raises `UsageError`, `Failure` or one of `torch2rt.errors`."""
    require_tensorrt()
    show = Table(quiet=arguments.quiet)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    module = load_model(arguments.model).eval()
    if arguments.weights:
        load_weights(module, arguments.weights)
    module.to(device)
    module = module if dtype is torch.float32 else module.to(dtype)
    dtypes = [getattr(torch, own) if own else dtype for _, own in arguments.inputs]
    inputs = [example(shape, own, device) for (shape, _), own in zip(arguments.inputs, dtypes, strict=True)]
    show.row(
        "model",
        arguments.model,
        f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters, {arguments.dtype}",
    )

    if arguments.plan:
        _show_plan(module, inputs, arguments, show)
        return
    model_trt = _converted(module, inputs, arguments, show)
    if model_trt is None:
        return
    if arguments.compare:
        from torch2rt.debug import compare

        beside = compare(model_trt, inputs)
        print(beside)
        if arguments.picture:
            beside.picture(arguments.picture)
            show.row("saved", arguments.picture)
    if arguments.output:
        try:
            _save(model_trt, arguments.output)
        except OSError as error:
            raise Failure(f"{arguments.output} cannot be written: {error.strerror}.") from error
        show.row("saved", arguments.output, f"{os.path.getsize(arguments.output) / 2**20:.1f} MiB")


def _show_plan(module: torch.nn.Module, inputs: list[torch.Tensor], arguments: argparse.Namespace, show: Table) -> None:
    """The rows of a plan, and its page if one is asked for."""
    from torch2rt import plan

    options = {f"{which}_shapes": getattr(arguments, which) for which in ("min", "opt", "max")}
    options |= {name: getattr(arguments, name) for name in ("max_batch_size", "multiple_of", "nan", "float64")}
    options["dynamic_shapes"] = _promised(arguments)
    for name in ("shapes", "max_variants"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--plan is of one graph for the whole range: leave out --{name.replace('_', '-')}.")
    options |= _about_fallback(arguments) | _about_types(module, arguments)
    result = plan(module, inputs, **options, progress=False if arguments.quiet else None)
    for line in str(result).splitlines():
        show.row("plan", line.rstrip())
    searches = result.precision.searches if result.precision is not None else []
    for found in searches:
        for line in found.table().splitlines():
            show.row("auto", line)
        if arguments.picture:
            path = Path(arguments.picture)  # of several, the last by the name that is asked for
            path = path if found is searches[-1] else path.with_stem(f"{path.stem}-{found.wide}")
            found.picture(path)
            show.row("saved", str(path))
    if arguments.output:
        try:
            Path(arguments.output).write_text(result.html(), encoding="utf-8")
        except OSError as error:
            raise Failure(f"{arguments.output} cannot be written: {error.strerror}.") from error
        show.row("saved", arguments.output)


def _save(model_trt: Any, path: str) -> None:
    """Write an engine with its calling convention, or segments as `torch2rt.save` does."""
    from torch2rt import TRTModule, save

    if isinstance(model_trt, TRTModule):
        model_trt.save_engine(path)
    else:
        save(model_trt, path)


def _about_fallback(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments about what is left to torch that are given."""
    return {name: value for name in ABOUT_FALLBACK if (value := getattr(arguments, name)) is not None}


def _promised(arguments: argparse.Namespace) -> dict[str, dict[int, Any]] | None:
    """What `--dynamic-shapes` says, as `torch.export.export` takes it."""
    if arguments.dynamic_shapes is None:
        return None
    ends: dict[str, tuple[int | None, int | None]] = {}
    for name, axis, _, size, low, high in arguments.dynamic_shapes:
        if low is not None and ends.setdefault(size, (low, high)) != (low, high):
            raise UsageError(f"--dynamic-shapes {name}.{axis} gives '{size}' another range than before.")
    try:
        names = dict.fromkeys(size for _, _, _, size, _, _ in arguments.dynamic_shapes)
        dims = {name: torch.export.Dim(name, **dict(zip(("min", "max"), ends.get(name, ())))) for name in names}
    except Exception as error:  # torch's own, of several kinds
        raise UsageError(f"--dynamic-shapes: {error}") from error
    promised: dict[str, dict[int, Any]] = {name: {} for name, *_ in arguments.dynamic_shapes}
    for name, axis, factor, size, _, _ in arguments.dynamic_shapes:
        promised[name][axis] = dims[size] if factor == 1 else factor * dims[size]
    return promised


def _about_types(module: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments about precision that are given, with the data of their files."""
    given = {name: value for name in ABOUT_TYPES if (value := getattr(arguments, name)) not in (None, False)}
    files = {name: path for name in ("samples", "calibration") if (path := getattr(arguments, name))}
    return given | {name: load_samples(path, module) for name, path in files.items()}


def _converted(module: torch.nn.Module, inputs: list[torch.Tensor], arguments: argparse.Namespace, show: Table) -> Any:
    """The `TRTModule`, with a row for each stage of the conversion."""
    from torch2rt import torch2rt

    options = {f"{which}_shapes": getattr(arguments, which) for which in ("min", "opt", "max")}
    options |= {name: getattr(arguments, name) for name in OPTIONS}
    options |= _about_fallback(arguments) | _about_types(module, arguments)
    if arguments.fallback:
        options["fallback"] = "measure" if arguments.measure_segments else True
        options["torch_segments"] = arguments.torch_segments
    options["dynamic_shapes"] = _promised(arguments)
    if arguments.max_variants is not None:
        options["max_variants"] = arguments.max_variants
    done: list[str] = []

    def on_stage(name: str, result: Any, seconds: float) -> None:
        _show_stage(name, result, seconds, show, is_again=name in done)
        done.append(name)

    try:
        model_trt = torch2rt(module, inputs, **options, progress=False if arguments.quiet else None, on_stage=on_stage)
    except Torch2RTError:
        raise
    except Exception:
        if not done:
            check_inputs(module, inputs)
        raise
    for line in model_trt.report.segments:
        show.row("segment", line.removeprefix("segment "))
    if arguments.verify:
        _show_report(model_trt.report, show)
    return model_trt


def _show_stage(name: str, result: Any, seconds: float, show: Table, is_again: bool) -> None:
    """The row of a stage of the conversion, after the rows of the inputs when these are known.

    `is_again`: the module is traced a second time, as segments.
    """
    from torch2rt.graph import graph_meta
    from torch2rt.passes.partitioning.split import Program
    from torch2rt.sizes import is_symbolic

    if name == "trace":
        for spec in () if is_again else graph_meta(result).interface.inputs:
            show.row(
                spec.name, spec.describe(), f"optimized for {' and '.join(map(by, spec.opts))}" if spec.dynamic else ""
            )
        calls = [n for n in result.graph.nodes if n.op == "call_function" and not is_symbolic(n.meta["val"])]
        made = f"{len(calls)} calls"
    elif isinstance(result, Program):
        ours = sum(not piece.segment.is_torch for piece in result.pieces)
        made = f"{ours} TensorRT and {len(result.pieces) - ours} torch segments"
    elif name == "lower":
        made = f"{result.num_layers} layers"
    else:
        made = f"{len(result.data) / 2**20:.1f} MiB engine"
    show.row(name, made, f"{seconds:.2f} s")


def _show_report(report: Any, show: Table) -> None:
    """The rows of a verification."""
    if report.verified is None:
        show.row("verify", report.assumptions[-1])
        return
    show.row("verify", report.verified.by, f"{report.verified.seconds:.2f} s")
    shapes = None
    for difference in report.verified.differences:
        if difference.shapes != shapes:
            shapes = difference.shapes
            show.row("", f"for {', '.join(map(by, shapes))}")
        show.row(f"  {difference.output}", f"error {difference.error:.1e}", f"allowed {difference.allowed:.1e}")
    for note in report.verified.notes:
        show.row("", note)
