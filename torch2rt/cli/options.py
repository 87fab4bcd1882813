"""Arguments of the `torch2rt` command that belong together, read without torch."""

from __future__ import annotations

import argparse

from torch2rt import usage
from torch2rt.usage import DTYPES


def add_model(command: argparse.ArgumentParser) -> None:
    """The arguments that say what to convert, and with which inputs."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, or package.module:NAME of an nn.Module, or of a callable that makes one",
    )
    command.add_argument(
        "--input",
        dest="inputs",
        action="append",
        required=True,
        type=usage.shape_and_dtype,
        metavar="SHAPE[:DTYPE]",
        help=f"an input, once for each; DTYPE is one of {', '.join(DTYPES)}, by default the model's",
    )
    command.add_argument(
        "--dtype", choices=DTYPES[:3], default="float32", help="the model's parameters (default: float32)"
    )


def add_fallback(command: argparse.ArgumentParser) -> None:
    """The arguments about calls that stay torch calls."""
    fallback = command.add_argument_group("calls that TensorRT cannot take")
    fallback.add_argument("--fallback", action="store_true", help="leave them to torch, and make engines of the others")
    fallback.add_argument(
        "--measure-segments", action="store_true", help="leave to torch what it runs faster on this GPU, too"
    )
    fallback.add_argument(
        "--torch-executed", type=usage.several, metavar="A,B,...", help="paths of modules that are left to torch"
    )
    fallback.add_argument(
        "--min-segment-calls", type=usage.number, metavar="N", help="leave smaller segments to torch (default: 3)"
    )
    fallback.add_argument(
        "--max-sizes", type=usage.number, metavar="N", help="the largest size that calls have where values decide it"
    )
    fallback.add_argument("--torch-segments", choices=("eager", "compile"), help="compile: through torch.compile")


def add_precision(command: argparse.ArgumentParser) -> None:
    """The arguments about precision of `torch2rt.torch2rt`, and what shows them."""
    precision = command.add_argument_group("precision")
    precision.add_argument(
        "--precision",
        metavar="TYPE",
        help="compute float32 in fp16 or bf16; products in int8 or fp8, or with int8_weights or int4_weights, and the "
        "rest in fp16, or as int8+bf16 and int8+fp32 say; auto: see torch2rt.torch2rt (default: as the model does)",
    )
    precision.add_argument("--io-precision", choices=("fp32", "fp16", "bf16"), help="the type of inputs and outputs")
    for name, text in (("keep-fp32", "stay in float32"), ("force-low", "do not")):
        help = f"modules and patterns, such as encoder.*.mlp, that {text}"
        precision.add_argument(f"--{name}", type=usage.several, metavar="A,B,...", help=help)
    for name, text in (
        ("samples", "further inputs, to find what overflows, and for --precision auto"),
        ("calibration", "inputs such as the engine will be given, for int8 and fp8"),
    ):
        help = f"{text}: .npy, .npz, .safetensors, or torch.save's of a tensor, or of a list of batches"
        precision.add_argument(f"--{name}", metavar="FILE", help=help)
    precision.add_argument("--calibration-method", choices=("entropy", "minmax", "percentile", "mse"))
    precision.add_argument("--calibration-cache", metavar="FILE", help="keep the calibration here, and read it again")
    precision.add_argument("--keep-float", type=usage.several, metavar="A,B,...", help="what is not quantised")
    precision.add_argument("--smooth-quant", type=float, metavar="STRENGTH", help="0.5: SmoothQuant, for transformers")
    precision.add_argument("--quantize-attention", action="store_true", help="quantise the products of attentions, too")
    precision.add_argument("--quantize-all", action="store_true", help="quantise also what is no faster then")
    precision.add_argument("--bias-correction", action="store_true", help="correct biases for rounded weights")
    precision.add_argument("--tolerance", type=float, metavar="X", help="what --precision auto keeps to (0.001)")
    precision.add_argument("--picture", metavar="FILE", help="draw what --compare or --precision auto --plan has found")
    precision.add_argument(
        "--compare", action="store_true", help="print how far off each module is, and where it begins"
    )


def add_builder(command: argparse.ArgumentParser) -> None:
    """The arguments of `torch2rt.build`."""
    builder = command.add_argument_group("TensorRT's builder")
    builder.add_argument("--max-workspace-size", type=usage.number, metavar="BYTES", help="scratch memory of a layer")
    builder.add_argument(
        "--compute-capabilities",
        type=usage.several,
        metavar="A,B,...",
        help="for TensorRT for RTX: the GPUs to build for, such as 8.6,8.9 or current",
    )
    builder.add_argument(
        "--optimization-level", type=usage.number, metavar="N", help="0 (quick to build) to 5 (thorough)"
    )
    builder.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="whether float32 products may round to TF32 (default: as torch is set)",
    )
    builder.add_argument(
        "--log-level", choices=usage.SEVERITIES, default=None, help="print TensorRT's messages from here on"
    )
