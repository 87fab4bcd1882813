"""How long a conversion takes and how much memory it needs, beside the route over ONNX.

    python benchmarks/conversion.py [MODEL ...] [--dynamic] [--json FILE]

Each model and each route runs in a process of its own: first a small module, so that imports and TensorRT's start are
not counted, then the model. Memory is the peak of the process above what it had before the model was converted, up to
the build and with it; TensorRT's builder alone holds some three times the weights, the engine included. The ONNX route
is `torch.onnx.export`, TensorRT's parser and its builder; it needs `pip install 'torch2rt[onnx]'`. Both build with
TensorRT's defaults, and no GPU is needed with TensorRT for RTX.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from meter import Meter, in_a_process, verdict
from torchvision import models

MODELS = ("resnet50", "vit_b_16", "swin_t", "convnext_tiny")
STAGES = {"torch2rt": ("trace", "lower", "build"), "onnx": ("export", "parse", "build")}
MAX_BATCH = 8
TIME_AIM = 3.0  # export and parse take at least this many times as long as trace and lower
MEMORY_AIM = 2.0  # times the size of the weights


def torch2rt_route(model: torch.nn.Module, x: torch.Tensor, dynamic: bool, meter: Meter) -> int:
    """trace, lower, build; returns the engine's size."""
    from torch2rt import build, lower, trace

    graph = meter.stage("trace", lambda: trace(model, [x], max_batch_size=MAX_BATCH if dynamic else None))
    network = meter.stage("lower", lambda: lower(graph))
    return len(meter.stage("build", lambda: build(network, progress=False)))


def onnx_route(model: torch.nn.Module, x: torch.Tensor, dynamic: bool, meter: Meter) -> int:
    """torch.onnx.export, TensorRT's parser, build; returns the engine's size."""
    from torch2rt.backend import create_builder, create_network, trt

    builder = create_builder()
    network = create_network(builder)
    config = builder.create_builder_config()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},) if dynamic else None

        def export() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes)

        def parse() -> Any:
            parser = trt.OnnxParser(network, builder.logger)
            if not parser.parse_from_file(path):
                raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
            return parser  # the network refers to its weights

        def compile() -> Any:
            if dynamic:
                profile = builder.create_optimization_profile()
                profile.set_shape(
                    network.get_input(0).name, (1, *x.shape[1:]), tuple(x.shape), (MAX_BATCH, *x.shape[1:])
                )
                config.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeError("TensorRT could not build the network")
            return bytes(plan)

        meter.stage("export", export)
        parser = meter.stage("parse", parse)
        size = len(meter.stage("build", compile))
        del parser
        return size


ROUTES = {"torch2rt": torch2rt_route, "onnx": onnx_route}


def measure(name: str, route: str, dynamic: bool) -> dict[str, Any]:
    """One conversion in this process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    model = models.get_model(name, weights=None).eval()
    x = torch.randn(2 if dynamic else 1, 3, 224, 224)
    ROUTES[route](small, torch.randn(1, 3, 8, 8), False, Meter())
    meter = Meter()
    result: dict[str, Any] = {"weights": sum(t.numel() * t.element_size() for t in model.state_dict().values())}
    try:
        result["engine"] = ROUTES[route](model, x, dynamic, meter)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return {**result, "seconds": meter.seconds, "peak": meter.peak}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [
        f"{'':<25}{'trace':>9}{'lower':>9}{'':>9}{'memory above the model, MB':>34}",
        f"{'model':<15}{'route':<10}{'export':>9}{'parse':>9}{'build':>9}"
        f"{'before build':>16}{'whole':>9}{'x weights':>11}",
    ]
    for name, routes in results.items():
        for route, result in routes.items():
            cells = "".join(
                f"{result['seconds'][s]:>7.2f} s" if s in result["seconds"] else f"{'-':>9}" for s in STAGES[route]
            )
            if "error" in result:
                lines.append(f"{name:<15}{route:<10}{cells}   failed: {result['error'][:200]}")
                continue
            before, whole = result["peak"][STAGES[route][1]], max(result["peak"].values())
            memory = f"{before / 1e6:>16.0f}{whole / 1e6:>9.0f}{whole / result['weights']:>10.1f}x"
            lines.append(f"{name:<15}{route:<10}{cells}{memory}")
    return "\n".join(lines)


def aims(results: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[bool, str]]:
    """What torch2rt means to keep, and whether it did."""
    checks = []
    for name, routes in results.items():
        ours = routes["torch2rt"]
        if "error" in ours:
            checks.append((False, f"{name}: converts"))
            continue
        mine = ours["seconds"]["trace"] + ours["seconds"]["lower"]
        if "parse" in (theirs := routes["onnx"]["seconds"]):
            factor = (theirs["export"] + theirs["parse"]) / mine
            text = f"{name}: export and parse take {factor:.1f} times as long as trace and lower"
            checks.append((factor >= TIME_AIM, f"{text} (aim: {TIME_AIM:g})"))
        memory = ours["peak"]["lower"] / ours["weights"]
        text = f"{name}: trace and lower take {memory:.2f} times the weights in memory"
        checks.append((memory <= MEMORY_AIM, f"{text} (aim: {MEMORY_AIM:g})"))
        if "error" not in routes["onnx"]:
            whole, other = max(ours["peak"].values()), max(routes["onnx"]["peak"].values())
            text = f"{name}: the whole conversion takes {whole / other:.2f} times the memory of the ONNX route"
            checks.append((whole <= other, f"{text} (aim: 1)"))
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help="torchvision classifiers")
    parser.add_argument("--dynamic", action="store_true", help=f"with a batch of 1 to {MAX_BATCH}")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "ROUTE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.dynamic)))
        return 0
    dynamic = ["--dynamic"] if arguments.dynamic else []
    results = {
        name: {route: in_a_process(__file__, "--measure", name, route, *dynamic) for route in ROUTES}
        for name in arguments.models
    }
    print(table(results))
    checks = aims(results)
    status = verdict(checks, arguments.check)
    if arguments.json:
        facts = {"torch": torch.__version__, "dynamic": arguments.dynamic, "cpus": os.cpu_count(), "results": results}
        Path(arguments.json).write_text(json.dumps(facts, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
