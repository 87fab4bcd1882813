"""The `torch2rt` command: convert a model, list what can be converted, look at the installation.

Exit codes: 0 done, 1 the model cannot be converted or does not compute what it should (`doctor`: something is missing),
2 the command does not make sense.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from torch2rt.errors import InputError, Torch2RTError

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 1e-2
Shape = tuple[int, ...]


class UsageError(Exception):
    """A command that does not make sense."""


class Failure(Exception):
    """A command that makes sense and does not succeed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A command line that does not parse raises argparse's `SystemExit(2)`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except (UsageError, InputError) as error:
        return _fail(error, 2)
    except (Torch2RTError, Failure) as error:
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    print(f"torch2rt: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from torch2rt import __version__

    parser = argparse.ArgumentParser(prog="torch2rt", description="PyTorch modules as TensorRT engines.")
    parser.add_argument("--version", action="version", version=f"torch2rt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert",
        help="convert a model",
        description="Convert a model with random weights, and optionally check and save the engine.",
        epilog="SHAPE is like 1x3x224x224, or 'scalar'. Example: torch2rt convert torchvision:resnet18 "
        "--input 1x3x224x224 --max 8x3x224x224 --verify -o resnet18.engine",
    )
    convert.add_argument(
        "model", metavar="MODEL",
        help="torchvision:NAME, timm:NAME, or package.module:NAME of an nn.Module, or of a callable that makes one",
    )  # fmt: skip
    convert.add_argument(
        "--input", dest="inputs", action="append", required=True, type=_input, metavar="SHAPE[:DTYPE]",
        help=f"an input, once for each; DTYPE is one of {', '.join(DTYPES)}, by default the model's",
    )  # fmt: skip
    for which, text in (("min", "smallest"), ("opt", "most common"), ("max", "largest")):
        convert.add_argument(
            f"--{which}", action="append", type=_shape, metavar="SHAPE",
            help=f"the {text} shape to serve, once for each --input and in their order",
        )  # fmt: skip
    convert.add_argument(
        "--dtype", choices=DTYPES[:3], default="float32", help="the model's parameters (default: float32)"
    )
    convert.add_argument(
        "--verify", action="store_true", help="compare with eager PyTorch, at every one of min, opt and max"
    )
    convert.add_argument(
        "--tolerance", type=float, metavar="X",
        help="the largest difference that --verify allows, relative to the largest value of an output "
        "(default: 0.001 for float32, 0.01 where TF32 is used, 0.02 for float16, 0.1 for bfloat16, 0 for integers)",
    )  # fmt: skip
    convert.add_argument("-o", "--output", metavar="FILE", help="save the engine, for TRTModule.from_engine")
    convert.add_argument("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(command=_convert)

    ops = commands.add_parser("ops", help="list the torch calls that have a converter")
    ops.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    ops.set_defaults(command=_ops)

    doctor = commands.add_parser("doctor", help="check torch, TensorRT and GPU")
    doctor.set_defaults(command=_doctor)
    return parser


# Arguments -----------------------------------------------------------------------------------------------------------


def _shape(text: str) -> Shape:
    if text in ("", "scalar"):
        return ()
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 1x3x224x224, nor 'scalar'")
    return tuple(map(int, text.split("x")))


def _input(text: str) -> tuple[Shape, torch.dtype | None]:
    shape, _, dtype = text.partition(":")
    if dtype and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    return _shape(shape), getattr(torch, dtype) if dtype else None


def load_model(spec: str) -> torch.nn.Module:
    """The module that a MODEL argument names, with random weights."""
    source, _, name = spec.partition(":")
    if not source or not name:
        raise UsageError(f"MODEL {spec!r} is none of torchvision:NAME, timm:NAME and package.module:NAME.")
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not (source + ".").startswith(f"{error.name}."):
            raise
        raise UsageError(f"MODEL {spec!r}: there is no module {error.name!r} here.") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise UsageError(f"MODEL {spec!r}: {source} has no {name!r}.")
        value = getattr(value, part)
    if not isinstance(value, torch.nn.Module):
        if not callable(value):
            raise UsageError(f"MODEL {spec!r} is a {type(value).__name__}, neither an nn.Module nor callable.")
        value = value()
    if not isinstance(value, torch.nn.Module):
        raise UsageError(f"MODEL {spec!r} returns a {type(value).__name__}, not an nn.Module.")
    return value


def _torchvision(name: str) -> torch.nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}.{_similar(name, models.list_models())}")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    return models.get_model(name, weights=None, **{k: None for k in ("weights_backbone",) if k in takes})


def _timm(name: str) -> torch.nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("timm is not installed: pip install timm") from error
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}.{_similar(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _similar(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def example(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values to try a model with; integers are 0 or 1, which every embedding has."""
    if dtype.is_floating_point:
        return torch.randn(shape).to(device, dtype)
    return torch.randint(0, 2, shape).to(device, dtype)


# convert -------------------------------------------------------------------------------------------------------------


def _convert(arguments: argparse.Namespace) -> int:
    for which in ("min", "opt", "max"):
        given = getattr(arguments, which)
        if given is not None and len(given) != len(arguments.inputs):
            raise UsageError(f"--{which} is given {len(given)} times for {len(arguments.inputs)} --input.")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise UsageError(f"there is no folder for {arguments.output}.")
    require_tensorrt()
    show = Table(quiet=arguments.quiet)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    module = load_model(arguments.model).eval().to(device)
    module = module if dtype is torch.float32 else module.to(dtype)
    dtypes = [own or dtype for _, own in arguments.inputs]
    inputs = [example(shape, own, device) for (shape, _), own in zip(arguments.inputs, dtypes, strict=True)]
    show.row(
        "model",
        arguments.model,
        f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters, {arguments.dtype}",
    )

    model_trt = _stages(module, inputs, arguments, show)
    if arguments.verify:
        verify(module, model_trt, device, arguments.tolerance, show)
    if arguments.output:
        model_trt.save_engine(arguments.output)
        show.row("saved", arguments.output, f"{os.path.getsize(arguments.output) / 2**20:.1f} MiB")
    return 0


def require_tensorrt() -> None:
    """Say what is missing before anything takes time."""
    try:
        importlib.import_module("torch2rt.backend")
    except ImportError as error:
        raise Failure(str(error)) from error


def _stages(module: torch.nn.Module, inputs: list[torch.Tensor], arguments: argparse.Namespace, show: Table) -> Any:
    from torch2rt import TRTModule, build, lower, trace
    from torch2rt.symbolic import is_symbolic

    shapes = {f"{which}_shapes": getattr(arguments, which) for which in ("min", "opt", "max")}
    try:
        graph, seconds = timed(lambda: trace(module, inputs, **shapes))
    except Torch2RTError:
        raise
    except Exception:
        _check_inputs(module, inputs)
        raise
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not is_symbolic(n.meta["val"])]
    interface = graph.meta["interface"]
    for spec in interface.inputs:
        show.row(spec.name, spec.describe(), f"optimized for {by(spec.opt)}" if spec.dynamic else "")
    show.row("trace", f"{len(nodes)} calls", f"{seconds:.2f} s")
    network, seconds = timed(lambda: lower(graph))
    show.row("lower", f"{network.num_layers} layers", f"{seconds:.2f} s")
    engine, seconds = timed(lambda: build(network, progress=False if arguments.quiet else None))
    show.row("build", f"{len(engine) / 2**20:.1f} MiB engine", f"{seconds:.2f} s")
    return TRTModule(engine, network.interface, network)


def _check_inputs(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Tell inputs that the model does not take from a failure of the conversion."""
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        given = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {by(x.shape)}" for x in inputs)
        raise UsageError(f"the model itself fails on {given}: {type(error).__name__}: {error}") from error


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and how long it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def by(shape: Sequence[int]) -> str:
    """A shape as the command line takes it."""
    return "x".join(map(str, shape)) or "scalar"


class Table:
    """Rows of three columns, printed as they come."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def row(self, *columns: str) -> None:
        if not self.quiet:
            first, *rest = columns
            print(f"{first:<10} {'  '.join(f'{c:<24}' for c in rest)}".rstrip(), flush=True)


# Verification --------------------------------------------------------------------------------------------------------


def verify(module: torch.nn.Module, model_trt: Any, device: torch.device, tolerance: float | None, show: Table) -> None:
    """Hold a converted model against its module at each of min, opt and max; raises `Failure`."""
    on_gpu = device.type == "cuda"
    run = model_trt if on_gpu else model_trt.reference()
    specs = model_trt.interface.inputs
    show.row(
        "verify",
        f"on {torch.cuda.get_device_name(device)}" if on_gpu else "by evaluating the network with torch, without a GPU",
    )
    failures = []
    dynamic = any(spec.dynamic for spec in specs)
    for which in ("min", "opt", "max") if dynamic else ("opt",):
        shapes = [getattr(spec, which) for spec in specs]
        inputs = [example(shape, spec.dtype, device) for shape, spec in zip(shapes, specs, strict=True)]
        with torch.no_grad():
            expected = module(*[x.clone() for x in inputs])
            actual = run(*inputs)
        where = f"at {which} {', '.join(map(by, shapes))}" if dynamic else f"at {', '.join(map(by, shapes))}"
        show.row("", where, *(_latency(module, model_trt, inputs) if on_gpu else ()))
        for name, difference in compare(model_trt.interface, actual, expected):
            allowed = tolerance if tolerance is not None else _allowed(difference.dtype, on_gpu and model_trt.network)
            show.row(
                f"  {name}", f"absolute error {difference.absolute:.1e}", f"relative error {difference.relative:.1e}"
            )
            if not difference.relative <= allowed:
                failures.append(f"{name} {where}: relative error {difference.relative:.1e}, allowed {allowed:.1e}")
    if failures:
        raise Failure("the converted model does not compute what the module does:\n  " + "\n  ".join(failures))


def _allowed(dtype: torch.dtype, network: Any) -> float:
    """The relative error to allow; `network` is the one that runs on a GPU, if one does."""
    from torch2rt.building import uses_tf32

    tf32 = network and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32 or uses_tf32(network))
    return TF32_TOLERANCE if tf32 and dtype is torch.float32 else TOLERANCES.get(dtype, 0.0)


class Difference:
    """The largest difference between two tensors, alone and relative to the largest expected value."""

    def __init__(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        self.dtype = expected.dtype
        a, b = (t.detach().double().flatten() for t in (actual, expected))
        same = (a == b) | (a.isnan() & b.isnan())
        errors = torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)
        scale = torch.where(b.isfinite(), b.abs(), 0.0)
        self.absolute = errors.max().item() if errors.numel() else 0.0
        largest = scale.max().item() if scale.numel() else 0.0
        self.relative = self.absolute / largest if largest else self.absolute


def compare(interface: Any, actual: Any, expected: Any) -> list[tuple[str, Difference]]:
    """The difference of each output; raises `Failure` for values that are not built alike."""
    from torch2rt.structure import flatten

    (ours, our_spec), (theirs, their_spec) = (flatten(value, torch.is_tensor, "result") for value in (actual, expected))
    if our_spec != their_spec:
        raise Failure(f"the converted model returns {our_spec}, the module {their_spec}.")
    names = [interface.outputs[leaf["output"]] for leaf in interface.leaves if "output" in leaf]
    differences = {}
    for name, a, b in zip(names, ours, theirs, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Failure(f"{name} is {a.dtype} {tuple(a.shape)}, the module gives {b.dtype} {tuple(b.shape)}.")
        differences[name] = Difference(a, b)
    return list(differences.items())


def _latency(module: torch.nn.Module, model_trt: Any, inputs: list[torch.Tensor], repeats: int = 50) -> tuple[str, str]:
    """Median milliseconds on the GPU of the engine and of the module."""
    medians = []
    for function in (model_trt, module):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        with torch.no_grad():
            for _ in range(10):
                function(*inputs)
            for start, end in events:
                start.record()
                function(*inputs)
                end.record()
        torch.cuda.synchronize()
        medians.append(statistics.median(start.elapsed_time(end) for start, end in events))
    return f"engine {medians[0]:.3f} ms", f"eager {medians[1]:.3f} ms"


# ops and doctor ------------------------------------------------------------------------------------------------------


def _ops(arguments: argparse.Namespace) -> int:
    require_tensorrt()
    from torch2rt.operators import LEVELS, families, measured

    listed, rest = families(arguments.pattern), measured(arguments.pattern)
    if not listed and not any(rest.values()):
        raise Failure(
            f"no converter has {arguments.pattern!r} in its name. A call without one is converted as the calls that it "
            "makes, so it may be supported all the same."
        )
    for family, entries in listed.items():
        print(family)
        for names, limits in entries:
            print(f"    {', '.join(names)}" + (f"\n        limits: {limits}" if limits else ""))
    total = sum(len(names) for entries in listed.values() for names, _ in entries)
    print(f"\n{total} callables, and their in-place and out= spellings. Without a converter of their own are:")
    for level, what in LEVELS.items():
        print(f"{what} ({len(rest[level])})" + "".join(f"\n    {name}" for name in rest[level]))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from torch2rt.doctor import doctor

    return 0 if doctor() else 1


if __name__ == "__main__":
    sys.exit(main())
