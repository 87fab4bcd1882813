"""What a command line says, read without torch, so that `--help` and mistakes are answered at once."""

from __future__ import annotations

import argparse
import os
import re
import traceback
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
SEVERITIES = ("internal_error", "error", "warning", "info", "verbose")
Shape = tuple[int, ...]


class UsageError(Exception):
    """A command that does not make sense."""


class Failure(Exception):
    """A command that makes sense and does not succeed."""


def shape(text: str) -> Shape:
    """Sizes, such as `1x3x224x224`."""
    if text in ("", "scalar"):
        return ()
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 1x3x224x224, nor 'scalar'")
    return tuple(map(int, text.split("x")))


def shape_and_dtype(text: str) -> tuple[Shape, str | None]:
    """Sizes and, after a colon, the name of a dtype."""
    sizes, _, dtype = text.partition(":")
    if dtype and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    return shape(sizes), dtype or None


def number(text: str) -> int | float:
    """A number such as `1073741824` or `1e9`."""
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def choice_of_shapes(text: str) -> list[Shape]:
    """Shapes with commas between them, one for each input, such as `1x3x224x224,1`."""
    return [shape(part) for part in text.split(",")]


def dynamic_sizes(text: str) -> list[tuple[str, int, int, str, int | None, int | None]]:
    """Sizes of inputs by names, such as `x.0=b:1..8,x.2=32*h:1..16`.

    Each is the input, the axis, the factor, the name of the size, and its smallest and largest value.
    """
    found: list[tuple[str, int, int, str, int | None, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)\.(\d+)=(?:(\d+)\*)?([A-Za-z_]\w*)(?::(\d+)\.\.(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not like x.0=b, x.0=b:1..8 or x.2=32*h:1..16")
        name, axis, factor, size, low, high = match.groups()
        ends = (None, None) if low is None else (int(low), int(high))
        found.append((name, int(axis), int(factor or 1), size, *ends))
    return found


def several(text: str) -> list[str]:
    """Words with commas between them."""
    return text.split(",")


def require_writable(path: str) -> None:
    """Raise `UsageError` before anything takes time, if a file cannot be written."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder for {path}.")
    trial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        if target.is_dir():
            raise UsageError(f"{path} is a folder.")
        if target.exists() and not target.is_file():  # a device or a pipe, which is written to as it is
            return
        with open(trial, "xb"):
            pass
        trial.unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def one_line(error: BaseException) -> str:
    """An error's kind, its first line, and where in the user's files it was raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        text, where = error.msg, f"{error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {text}"[:300] + (f" ({where})" if where else "")
