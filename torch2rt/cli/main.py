"""The `torch2rt` command: convert a model, measure it, look into engines, list what can be converted, look at the
installation.

Exit codes: 0 done, 1 the model cannot be converted or does not compute what it should (`doctor`: something is missing;
`bench`: there is no GPU, or no way to run the model succeeds), 2 the command does not make sense, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from torch2rt import usage
from torch2rt.cli import options
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.interrupts import exit_at_once
from torch2rt.usage import Failure, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A command line that does not parse raises argparse's `SystemExit(2)`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except (UsageError, InputError) as error:
        return _fail(error, 2, arguments.traceback)
    except (Torch2RTError, Failure) as error:
        return _fail(error, 1, arguments.traceback)
    except KeyboardInterrupt:
        if argv is None:  # the process is this command's own
            exit_at_once(130)
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `torch2rt ops | head` has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for what Python flushes at its end)
        return 1


def _fail(error: Exception | str, code: int, with_traceback: bool = False) -> int:
    if with_traceback:
        traceback.print_exc()
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
        description="Convert a model, check it, and optionally save the engine. Its weights are random without "
        "--weights, except those of a MODEL of your own.",
        epilog="SHAPE is like 1x3x224x224, or 'scalar'. Example: torch2rt convert torchvision:resnet18 "
        "--input 1x3x224x224 --max 8x3x224x224 -o resnet18.engine",
    )
    options.add_model(convert)
    for which, text in (("min", "smallest"), ("opt", "most common"), ("max", "largest")):
        convert.add_argument(
            f"--{which}",
            action="append",
            type=usage.shape,
            metavar="SHAPE",
            help=f"the {text} shape to serve, once for each --input and in their order",
        )
    _add_ranges(convert)
    verify = convert.add_mutually_exclusive_group()
    verify.add_argument(
        "--verify",
        action="store_const",
        const="range",
        default=True,
        help="compare with eager PyTorch at min, max and some sizes between, too (default: with the inputs' shapes)",
    )
    verify.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with eager PyTorch")
    convert.add_argument("--weights", metavar="FILE", help="a state dict of torch.save, or a safetensors file")
    for which, text in (("input", "inputs"), ("output", "outputs")):
        convert.add_argument(f"--{which}-names", type=usage.several, metavar="A,B,...", help=f"names of the {text}")
    convert.add_argument("--nan", choices=("keep", "ignore"), default="keep", help="as for torch2rt.lower")
    convert.add_argument("--float64", choices=("float32", "refuse"), default="float32", help="as for torch2rt.torch2rt")
    options.add_fallback(convert)
    options.add_precision(convert)
    options.add_builder(convert)
    convert.add_argument(
        "-o", "--output", metavar="FILE", help="save the engine, for TRTModule.from_engine; segments for torch2rt.load"
    )
    convert.add_argument(
        "--plan",
        action="store_true",
        help="build nothing, and say which calls would be left to torch with fallback=True (-o writes that as a page), "
        "and with --precision what computes in which type",
    )
    convert.add_argument("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser(
        "inspect",
        help="say what an engine file holds",
        description="Say what a file of `torch2rt convert -o`, TRTModule.save_engine or torch2rt.save holds, without a "
        "GPU.",
    )
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--layers", action="store_true", help="list all layers of the network, and not their number")
    inspect.set_defaults(command=_inspect)

    triton = commands.add_parser(
        "export-triton",
        help="write a model repository for NVIDIA's Triton Inference Server",
        description="Write a model repository for NVIDIA's Triton Inference Server: the plan for its TensorRT backend, "
        "or, as that does not know TensorRT for RTX, a model for its Python backend.",
    )
    triton.add_argument("file", metavar="FILE", help="of torch2rt.save, TRTModule.save_engine or torch2rt convert -o")
    triton.add_argument("folder", metavar="DIR", help="the model repository, which may hold other models")
    triton.add_argument("--name", help="of the model (default: that of the file)")
    triton.add_argument("--instances", type=usage.number, default=1, metavar="N", help="on each GPU (default: 1)")
    triton.add_argument(
        "--delay",
        type=usage.number,
        default=2000,
        metavar="MICROSECONDS",
        help="of a request, to wait for others (default: 2000)",
    )
    triton.add_argument("--no-batching", dest="batching", action="store_false", help="run every request by itself")
    triton.add_argument("--backend", choices=("auto", "tensorrt", "python"), default="auto")
    triton.set_defaults(command=_export_triton)

    bench = commands.add_parser(
        "bench",
        help="measure the ways to run a model on this GPU",
        description="Build and run a model with random weights in every way there is here, each in a process of its "
        "own, and print how fast they are.",
        epilog="Example: torch2rt bench torchvision:resnet50 --input 16x3x224x224 --dtype float16 --picture bench.png",
    )
    options.add_model(bench)
    bench.add_argument(
        "--ways",
        type=usage.several,
        metavar="A,B,...",
        help="some of eager, torch.compile, torch2rt, onnx, torch-tensorrt (default: all that are installed); a way "
        "that can replay a CUDA graph is measured without and with one",
    )
    bench.add_argument("--json", metavar="FILE", help="write the numbers, the machine and the versions to a file")
    bench.add_argument("--picture", metavar="FILE", help="draw the latencies (.png, .svg; needs matplotlib)")
    bench.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up a way that takes longer to get ready, or to build and run (default: 300)",
    )
    bench.set_defaults(command=_bench)

    ops = commands.add_parser("ops", help="list the torch calls that have a converter")
    ops.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    ops.set_defaults(command=_ops)

    cache = commands.add_parser(
        "cache",
        help="list or clear what is kept between processes",
        description="List or clear engines and compiled kernels, which lie in the folder that the environment variable "
        "TORCH2RT_CACHE names.",
    )
    cache.add_argument("action", choices=("list", "clear", "info"), help="list: each file; info: how much there is")
    cache.set_defaults(command=_cache)

    doctor = commands.add_parser("doctor", help="check torch, TensorRT and GPU")
    doctor.set_defaults(command=_doctor)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="print the Python traceback of an error, too")
    return parser


def _add_ranges(parser: argparse.ArgumentParser) -> None:
    """What is said of sizes, apart from the ends of their ranges."""
    parser.add_argument("--max-batch-size", type=usage.number, metavar="N", help="serve batches of 1 to N")
    parser.add_argument(
        "--multiple-of",
        action="append",
        type=usage.shape,
        metavar="SHAPE",
        help="what the sizes of calls are multiples of, such as 1x1x32x32, once for each --input",
    )
    parser.add_argument(
        "--dynamic-shapes",
        action="extend",
        type=usage.dynamic_sizes,
        metavar="SIZES",
        help="sizes by names, such as x.0=b:1..8,x.2=32*h:1..16,mask.0=b: sizes of one name are equal at every call",
    )
    parser.add_argument(
        "--shapes",
        action="append",
        type=usage.choice_of_shapes,
        metavar="SHAPE,...",
        help="shapes to serve, one for each --input, and no others; may be given several times, and is tuned for the "
        "first",
    )
    parser.add_argument(
        "--max-variants",
        type=usage.number,
        metavar="N",
        help="the most engines that may serve the range together (default: 8)",
    )
    parser.add_argument(
        "--merge",
        choices=("values", "proof"),
        default="values",
        help="what shows that one engine serves two paths through the module, as for torch2rt.torch2rt",
    )


# Commands, each in a module of its own that imports torch ------------------------------------------------------------


def _cache(arguments: argparse.Namespace) -> int:
    from torch2rt.bench.models import Table
    from torch2rt.cli import cache

    {"list": cache.listed, "clear": cache.clear, "info": cache.info}[arguments.action](Table(quiet=False))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    for which in ("min", "opt", "max"):
        given = getattr(arguments, which)
        if given is not None and len(given) != len(arguments.inputs):
            raise UsageError(f"--{which} is given {len(given)} times for {len(arguments.inputs)} --input.")
    if arguments.weights and not Path(arguments.weights).is_file():
        raise UsageError(f"there is no file {arguments.weights}.")
    if not (arguments.fallback or arguments.plan):
        for name in ("torch_executed", "min_segment_calls", "max_sizes"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --fallback or --plan.")
    for name in ("measure_segments", "torch_segments"):
        if getattr(arguments, name) and not arguments.fallback:
            raise UsageError(f"--{name.replace('_', '-')} needs --fallback.")
    if arguments.plan and arguments.compare:
        raise UsageError("--plan builds nothing, so there is nothing for --compare.")
    for name in ("samples", "calibration"):
        path = getattr(arguments, name)
        if path and not Path(path).is_file():
            raise UsageError(f"--{name}: there is no file {path}.")
    if arguments.picture and not arguments.compare and not (arguments.plan and arguments.precision == "auto"):
        raise UsageError("--picture draws what --compare has found, or --precision auto with --plan.")
    for path in filter(None, (arguments.output, arguments.picture)):
        usage.require_writable(path)
    from torch2rt.cli.convert import convert

    convert(arguments)
    return 0


def _export_triton(arguments: argparse.Namespace) -> int:
    from torch2rt.cli.triton import export_triton

    names = ("name", "instances", "delay", "batching", "backend")
    try:
        export_triton(arguments.file, arguments.folder, **{name: getattr(arguments, name) for name in names})
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}.") from error
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if not Path(arguments.file).is_file():
        raise UsageError(f"there is no file {arguments.file}.")
    from torch2rt.cli.inspect import inspect

    inspect(arguments.file, arguments.layers)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    for path in filter(None, (arguments.json, arguments.picture)):
        usage.require_writable(path)
    import torch

    from torch2rt.bench import benchmark as bench
    from torch2rt.bench import report
    from torch2rt.bench.models import require_tensorrt

    if arguments.picture:
        report.require_matplotlib()
    require_tensorrt()
    inputs = [(shape, dtype or arguments.dtype) for shape, dtype in arguments.inputs]
    job = bench.Job(arguments.model, inputs, arguments.dtype)
    measurements = bench.benchmark(job, arguments.ways, timeout=arguments.timeout)
    print(report.table(measurements))
    if arguments.json:
        report.save(arguments.json, job, bench.facts(), measurements)
    if arguments.picture:
        report.picture(arguments.picture, f"{job.title()} on {torch.cuda.get_device_name()}", measurements)
    return 1 if all(m.failure for m in measurements) else 0


def _ops(arguments: argparse.Namespace) -> int:
    from torch2rt.bench.models import require_tensorrt

    require_tensorrt()
    from torch2rt.cli.ops import LEVELS, families, measured

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
    from torch2rt.cli.doctor import doctor

    return 0 if doctor() else 1


if __name__ == "__main__":
    sys.exit(main())
