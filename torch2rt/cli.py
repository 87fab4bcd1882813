"""The `torch2rt` command: convert a model, measure it, list what can be converted, look at the installation.

Exit codes: 0 done, 1 the model cannot be converted or does not compute what it should (`doctor`: something is missing;
`bench`: there is no GPU, or no way to run the model succeeds), 2 the command does not make sense, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch2rt.commands import (
    DTYPES,
    Failure,
    Shape,
    Table,
    UsageError,
    by,
    check_inputs,
    example,
    load_model,
    require_tensorrt,
    timed,
)
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.interrupts import exit_at_once
from torch2rt.structure import bare_name


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
    except KeyboardInterrupt:
        if argv is None:  # the process is this command's own
            exit_at_once(130)
        return _fail("interrupted", 130)


def _fail(error: Exception | str, code: int) -> int:
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
        "--input 1x3x224x224 --max 8x3x224x224 -o resnet18.engine",
    )
    _add_model(convert)
    for which, text in (("min", "smallest"), ("opt", "most common"), ("max", "largest")):
        convert.add_argument(
            f"--{which}", action="append", type=_shape, metavar="SHAPE",
            help=f"the {text} shape to serve, once for each --input and in their order",
        )  # fmt: skip
    verify = convert.add_mutually_exclusive_group()
    verify.add_argument(
        "--verify", action="store_const", const="range", default=True,
        help="compare with eager PyTorch at min, max and some sizes between, too (default: with the inputs' shapes)",
    )  # fmt: skip
    verify.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with eager PyTorch")
    convert.add_argument("-o", "--output", metavar="FILE", help="save the engine, for TRTModule.from_engine")
    convert.add_argument("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(command=_convert)

    bench = commands.add_parser(
        "bench",
        help="measure the ways to run a model on this GPU",
        description="Build and run a model with random weights in every way there is here, each in a process of its "
        "own, and print how fast they are.",
        epilog="Example: torch2rt bench torchvision:resnet50 --input 16x3x224x224 --dtype float16 --picture bench.png",
    )
    _add_model(bench)
    bench.add_argument(
        "--ways", type=lambda text: text.split(","), metavar="A,B,...",
        help="some of eager, torch.compile, torch2rt, onnx, torch-tensorrt (default: all that are installed); a way "
        "that can replay a CUDA graph is measured without and with one",
    )  # fmt: skip
    bench.add_argument("--json", metavar="FILE", help="write the numbers, the machine and the versions to a file")
    bench.add_argument("--picture", metavar="FILE", help="draw the latencies (.png, .svg; needs matplotlib)")
    bench.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS",
        help="give up a way that takes longer to get ready, or to build and run (default: 300)",
    )  # fmt: skip
    bench.set_defaults(command=_bench)

    ops = commands.add_parser("ops", help="list the torch calls that have a converter")
    ops.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    ops.set_defaults(command=_ops)

    doctor = commands.add_parser("doctor", help="check torch, TensorRT and GPU")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """The arguments that say what to convert, and with which inputs."""
    command.add_argument(
        "model", metavar="MODEL",
        help="torchvision:NAME, timm:NAME, or package.module:NAME of an nn.Module, or of a callable that makes one",
    )  # fmt: skip
    command.add_argument(
        "--input", dest="inputs", action="append", required=True, type=_input, metavar="SHAPE[:DTYPE]",
        help=f"an input, once for each; DTYPE is one of {', '.join(DTYPES)}, by default the model's",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=DTYPES[:3], default="float32", help="the model's parameters (default: float32)"
    )


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
    if arguments.output:
        model_trt.save_engine(arguments.output)
        show.row("saved", arguments.output, f"{os.path.getsize(arguments.output) / 2**20:.1f} MiB")
    return 0


def _stages(module: torch.nn.Module, inputs: list[torch.Tensor], arguments: argparse.Namespace, show: Table) -> Any:
    from torch2rt import TRTModule, build, lower, trace
    from torch2rt.symbolic import is_symbolic
    from torch2rt.verification import Verifying

    shapes = {f"{which}_shapes": getattr(arguments, which) for which in ("min", "opt", "max")}
    progress = False if arguments.quiet else None
    try:
        graph, seconds = timed(lambda: trace(module, inputs, **shapes, progress=progress))
    except Torch2RTError:
        raise
    except Exception:
        check_inputs(module, inputs)
        raise
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not is_symbolic(n.meta["val"])]
    interface = graph.meta["interface"]
    for spec in interface.inputs:
        show.row(spec.name, spec.describe(), f"optimized for {by(spec.opt)}" if spec.dynamic else "")
    show.row("trace", f"{len(nodes)} calls", f"{seconds:.2f} s")
    network, seconds = timed(lambda: lower(graph))
    show.row("lower", f"{network.num_layers} layers", f"{seconds:.2f} s")
    again = functools.partial(build, progress=False)
    verifying = Verifying(module, graph, network, inputs, arguments.verify, build=again)
    engine, seconds = timed(lambda: build(network, progress=progress, meanwhile=verifying.while_building))
    show.row("build", f"{len(engine) / 2**20:.1f} MiB engine", f"{seconds:.2f} s")
    model_trt = TRTModule(engine, network.interface, network)
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


# bench ---------------------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    from torch2rt import bench, report

    for path in filter(None, (arguments.json, arguments.picture)):
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"there is no folder for {path}.")
    if arguments.picture:
        report.require_matplotlib()
    require_tensorrt()
    job = bench.Job(
        arguments.model,
        [(shape, bare_name(dtype or getattr(torch, arguments.dtype)))
         for shape, dtype in arguments.inputs],
        arguments.dtype,
    )  # fmt: skip
    measurements = bench.benchmark(job, arguments.ways, timeout=arguments.timeout)
    print(report.table(measurements))
    if arguments.json:
        report.save(arguments.json, job, bench.facts(), measurements)
    if arguments.picture:
        report.picture(arguments.picture, f"{job.title()} on {torch.cuda.get_device_name()}", measurements)
    return 1 if all(m.failure for m in measurements) else 0


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
