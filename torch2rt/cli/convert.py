"""`torch2rt convert`: trace, lower, build and verify a model, with a row of a table for each."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

import torch

from torch2rt.bench.models import Failure, Table, by, check_inputs, example, load_model, require_tensorrt, timed
from torch2rt.cli.weights import load_weights
from torch2rt.errors import Torch2RTError

FLAGS = ("max_workspace_size", "compute_capabilities", "optimization_level", "tf32", "log_level")


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

    model_trt = _stages(module, inputs, arguments, show)
    if arguments.output:
        try:
            model_trt.save_engine(arguments.output)
        except OSError as error:
            raise Failure(f"{arguments.output} cannot be written: {error.strerror}.") from error
        show.row("saved", arguments.output, f"{os.path.getsize(arguments.output) / 2**20:.1f} MiB")


def _stages(module: torch.nn.Module, inputs: list[torch.Tensor], arguments: argparse.Namespace, show: Table) -> Any:
    from torch2rt import TRTModule, build, lower, trace
    from torch2rt.backend.tensorrt import FLAVOUR, VERSION
    from torch2rt.debug.verify import Verifying
    from torch2rt.engine.build import target
    from torch2rt.sizes import is_symbolic

    given = {f"{which}_shapes": getattr(arguments, which) for which in ("min", "opt", "max")}
    given |= {name: getattr(arguments, name) for name in ("max_batch_size", "input_names", "output_names")}
    flags = {name: getattr(arguments, name) for name in FLAGS}
    progress = False if arguments.quiet else None
    try:
        graph, seconds = timed(lambda: trace(module, inputs, **given, progress=progress))
    except Torch2RTError:
        raise
    except Exception:
        check_inputs(module, inputs)
        raise
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not is_symbolic(n.meta["val"])]
    interface = graph.meta["torch2rt"].interface
    for spec in interface.inputs:
        show.row(spec.name, spec.describe(), f"optimized for {by(spec.opt)}" if spec.dynamic else "")
    show.row("trace", f"{len(nodes)} calls", f"{seconds:.2f} s")
    network, seconds = timed(lambda: lower(graph, nan=arguments.nan, float64=arguments.float64))
    show.row("lower", f"{network.num_layers} layers", f"{seconds:.2f} s")
    again = functools.partial(build, **flags, progress=False)
    verifying = Verifying(module, graph, network, inputs, arguments.verify, tf32=arguments.tf32, build=again)
    engine, seconds = timed(lambda: build(network, **flags, progress=progress, meanwhile=verifying.while_building))
    show.row("build", f"{len(engine) / 2**20:.1f} MiB engine", f"{seconds:.2f} s")
    made_by = {"flavour": FLAVOUR, "version": VERSION, "target": target(arguments.compute_capabilities)}
    model_trt = TRTModule(engine, network.interface, network, made_by)
    verifying.finish(model_trt)
    if arguments.verify:
        _show(model_trt.report, show)
    return model_trt


def _show(report: Any, show: Table) -> None:
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
