"""How long a conversion takes and how much memory it needs, beside the route over ONNX.

    python benchmarks/conversion.py [MODEL ...] [--dynamic] [--batch N] [--half] [--device cuda] [--json FILE]

Each model and each route runs in a process of its own: first a small module, so that imports and TensorRT's start are
not counted, then the model. Memory is the peak of the process above what it had before the model was converted, up to
the build and with it; TensorRT's builder alone holds some three times the weights, the engine included. The ONNX route
is `torch.onnx.export`, TensorRT's parser and its builder; it needs `pip install 'torch2rt[onnx]'`. Both build with
TensorRT's defaults, and no GPU is needed with TensorRT for RTX. With `--device cuda` the model is on the GPU, and the
engine is loaded there (deserialized, and its first execution context made) and called once. Nothing is taken from
earlier runs unless `TORCH2RT_CACHE` names a folder.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from meter import Meter, in_a_process, verdict
from torchvision import models

MODELS = ("resnet50", "vit_b_16", "swin_t", "convnext_tiny")
STAGES = {"torch2rt": ("trace", "lower", "build"), "onnx": ("export", "parse", "build")}
ON_GPU = ("load", "call")
MAX_BATCH = 8
WORDS = 128  # in BERT's sentences
TIME_AIM = 3.0  # export and parse take at least this many times as long as trace and lower
MEMORY_AIM = 2.0  # times the size of the weights
FIRST_AIM = 0.5  # of the ONNX route's seconds until the first result

Inputs = Mapping[str, torch.Tensor]  # by the names of the model's parameters


def example(name: str, batch: int, half: bool, device: str) -> tuple[torch.nn.Module, Inputs]:
    """A model without weights of note, and inputs for it: a torchvision classifier, or `bert`."""
    if name == "bert":
        from transformers import BertConfig, BertModel

        model, inputs = BertModel(BertConfig()), {"input_ids": torch.randint(0, 30000, (batch, WORDS))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        model, inputs = models.get_model(name, weights=None), {"x": torch.randn(batch, 3, 224, 224)}
        inputs = {"x": inputs["x"].half()} if half else inputs
    model = model.eval().to(device)
    return model.half() if half else model, {name: x.to(device) for name, x in inputs.items()}


def run(load: Any, inputs: Inputs, meter: Meter) -> None:
    """Load an engine, which `load` wraps in a `TRTModule`, and call it once, where the inputs are on a GPU."""
    tensors = list(inputs.values())
    if not tensors[0].is_cuda:
        return

    def call() -> None:
        model_trt(*tensors)
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    model_trt = meter.stage("load", lambda: _loaded(load()))
    meter.stage("call", call)


def _loaded(model_trt: Any) -> Any:
    assert model_trt.engine is not None  # made when it is asked for
    return model_trt


def torch2rt_route(model: torch.nn.Module, inputs: Inputs, dynamic: bool, meter: Meter) -> int:
    """trace, lower, build, and load and call on a GPU; returns the engine's size."""
    from torch2rt import TRTModule, build, lower, trace

    largest, tensors = MAX_BATCH if dynamic else None, list(inputs.values())
    graph = meter.stage("trace", lambda: trace(model, tensors, max_batch_size=largest))
    network = meter.stage("lower", lambda: lower(graph))
    engine = meter.stage("build", lambda: build(network, progress=False))
    run(lambda: TRTModule(engine, network), inputs, meter)
    return len(engine.data)


def onnx_route(model: torch.nn.Module, inputs: Inputs, dynamic: bool, meter: Meter) -> int:
    """torch.onnx.export, TensorRT's parser, build, and load and call on a GPU; returns the engine's size."""
    from torch2rt import TRTModule
    from torch2rt.backend.tensorrt import create_builder, create_network, trt

    builder = create_builder()
    network = create_network(builder)
    config = builder.create_builder_config()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
        shapes = tuple(batch for _ in inputs) if dynamic else None

        def export() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                torch.onnx.export(model, tuple(inputs.values()), path, dynamo=True, dynamic_shapes=shapes)

        def parse() -> Any:
            parser = trt.OnnxParser(network, builder.logger)
            if not parser.parse_from_file(path):
                raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
            return parser  # the network refers to its weights

        def compile() -> Any:
            if dynamic:
                profile = builder.create_optimization_profile()
                for index, x in enumerate(inputs.values()):
                    sizes = tuple(x.shape[1:])
                    profile.set_shape(network.get_input(index).name, (1, *sizes), tuple(x.shape), (MAX_BATCH, *sizes))
                config.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise RuntimeError("TensorRT could not build the network")
            return bytes(plan)

        meter.stage("export", export)
        parser = meter.stage("parse", parse)
        plan = meter.stage("build", compile)
        del parser
        run(lambda: TRTModule.from_engine(plan), inputs, meter)
        return len(plan)


ROUTES = {"torch2rt": torch2rt_route, "onnx": onnx_route}


def measure(
    name: str, route: str, dynamic: bool, batch: int | None = None, half: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """One conversion in this process."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH2RT_CACHE", "")
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval().to(device)
    model, inputs = example(name, batch or (2 if dynamic else 1), half, device)
    ROUTES[route](small, {"x": torch.randn(1, 3, 8, 8, device=device)}, False, Meter())
    meter = Meter()
    result: dict[str, Any] = {"weights": sum(t.numel() * t.element_size() for t in model.state_dict().values())}
    try:
        result["engine"] = ROUTES[route](model, inputs, dynamic, meter)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return {**result, "seconds": meter.seconds, "peak": meter.peak}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    on_gpu = ON_GPU if any("call" in r["seconds"] for routes in results.values() for r in routes.values()) else ()
    more = "".join(f"{stage:>9}" for stage in on_gpu)
    lines = [
        f"{'':<34}{'trace':>9}{'lower':>9}{'':>9}{'':>{len(more) + 9}}{'memory above the model, MB':>34}",
        f"{'model':<24}{'route':<10}{'export':>9}{'parse':>9}{'build':>9}{more}{'all':>9}"
        f"{'before build':>16}{'whole':>9}{'x weights':>11}",
    ]
    for name, routes in results.items():
        for route, result in routes.items():
            stages = (*STAGES[route], *on_gpu)
            cells = "".join(
                f"{result['seconds'][s]:>7.2f} s" if s in result["seconds"] else f"{'-':>9}" for s in stages
            )
            if "error" in result:
                lines.append(f"{name:<24}{route:<10}{cells}   failed: {result['error'][:200]}")
                continue
            cells += f"{sum(result['seconds'].values()):>7.2f} s"
            before, whole = result["peak"][STAGES[route][1]], max(result["peak"].values())
            memory = f"{before / 1e6:>16.0f}{whole / 1e6:>9.0f}{whole / result['weights']:>10.1f}x"
            lines.append(f"{name:<24}{route:<10}{cells}{memory}")
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
            if "call" in ours["seconds"]:
                first, other = (sum(routes[route]["seconds"].values()) for route in ("torch2rt", "onnx"))
                text = f"{name}: the first result takes {first / other:.2f} times as long as with the ONNX route"
                checks.append((first <= FIRST_AIM * other, f"{text} (aim: {FIRST_AIM:g})"))
            whole, other = max(ours["peak"].values()), max(routes["onnx"]["peak"].values())
            text = f"{name}: the whole conversion takes {whole / other:.2f} times the memory of the ONNX route"
            checks.append((whole <= other, f"{text} (aim: 1)"))
    return checks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help="torchvision names, bert")
    parser.add_argument("--dynamic", action="store_true", help=f"with a batch of 1 to {MAX_BATCH}")
    parser.add_argument("--batch", type=int, metavar="N", help="batch of the example: 1, or 2 with --dynamic")
    parser.add_argument("--half", action="store_true", help="in float16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda also runs the engine")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "ROUTE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        options = (arguments.dynamic, arguments.batch, arguments.half, arguments.device)
        print(json.dumps(measure(*arguments.measure, *options)))
        return 0
    given = [f"--{name}" for name in ("dynamic", "half") if getattr(arguments, name)]
    given += ["--batch", str(arguments.batch)] if arguments.batch else []
    given += ["--device", arguments.device]
    results = {
        name: {route: in_a_process(__file__, "--measure", name, route, *given) for route in ROUTES}
        for name in arguments.models
    }
    print(table(results))
    checks = aims(results)
    status = verdict(checks, arguments.check)
    if arguments.json:
        facts = {"torch": torch.__version__, "arguments": given, "cpus": os.cpu_count(), "results": results}
        Path(arguments.json).write_text(json.dumps(facts, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
