"""What an error of lowering says: which calls cannot be converted, where they are, and why."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from torch2rt.backend.tensorrt import trt
from torch2rt.callables import qualified_name
from torch2rt.graph import place_of
from torch2rt.network import describe
from torch2rt.registry import Registry
from torch2rt.sizes import Symbols, in_words
from torch2rt.structure import bare_name
from torch2rt.vocabulary.context import Complex

NO_CONVERTER = "there is no converter for it"


def list_of(failures: Sequence[str]) -> str:
    """The message about all calls that cannot be converted."""
    count = f"{len(failures)} calls" if len(failures) > 1 else "one call"
    return f"torch2rt cannot convert {count} of this model:\n" + "\n".join(failures)


def describe_call(
    registry: Registry, symbols: Symbols, node: torch.fx.Node, args: Any, kwargs: Any, reason: str
) -> str:
    """One entry of the list of calls that cannot be converted: the line, the call with its types, and the reason."""
    shown = [_show(a) for a in args] + [f"{k}={_show(v)}" for k, v in kwargs.items()]
    call = f"{qualified_name(node.target)}({', '.join(shown)})"  # type: ignore[arg-type]
    targets = [node.meta.get("function", node.target), node.target]
    if targets[0] is not node.target:
        call = f"{qualified_name(targets[0])}, as {call}"
    if advice := registry.advice(*targets):
        reason = f"{reason.rstrip('.')}. {advice.rstrip('.')}"
    return in_words(f"{place_of(node)}\n    {call}: {reason}.", symbols)


def kind_of(value: Any) -> str:
    """What a converter has returned, in the words of an error."""
    return "None" if value is None else f"a {type(value).__name__}"


def line_below(error: BaseException) -> str | None:
    """The last line of Python that an error came through, if that is not where it was caught."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else None


def recorded_of(argument: Any) -> Any:
    """What is recorded of an argument, as far as an error shows it."""
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument


def _show(value: Any) -> str:
    if isinstance(value, Complex):
        return _show(value.real).replace("float32", "complex64")
    if isinstance(value, trt.ITensor):
        return describe(value)
    if isinstance(value, torch.Tensor):
        return f"{bare_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, torch.fx.GraphModule):
        return "<function>"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_show(v) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)


def quote(reason: str, log: list[str]) -> str:
    """A reason with TensorRT's own words, less the lines a machine without a GPU adds to them."""
    said = [line for line in log if "CUDA driver version is insufficient" not in line]
    return reason.rstrip(".") + (f"; TensorRT said: {os.linesep.join(said)}" if said else "")
