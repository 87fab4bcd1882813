"""Errors that the module itself, or torch, raises for inputs that the engine would serve, put into words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from torch2rt.errors import TraceError
from torch2rt.interface import Interface, Shape
from torch2rt.sizes import in_words
from torch2rt.structure import bare_name
from torch2rt.tracing.calls.eager import RecordedCall, Sizes
from torch2rt.tracing.recorder import Recorder

CASTS = {torch.float16: "half()", torch.float32: "float()", torch.bfloat16: "bfloat16()", torch.float64: "double()"}


class RefusedError(TraceError):
    """The module itself, or torch, raises an error for inputs that the engine would serve.

    `of_types` says that it does so for inputs of these types, whatever their sizes; `of_traced` that it is for the
    sizes that a trace was made with.
    """

    def __init__(self, message: str, of_types: bool = False, of_traced: bool = False) -> None:
        super().__init__(message)
        self.of_types, self.of_traced = of_types, of_traced


def describe_error(
    error: Exception, call: RecordedCall | None, shapes: Sequence[Shape], interface: Interface, recorder: Recorder
) -> RefusedError:
    """The error to raise for one that the module has raised for inputs of these shapes, in `call` if that is known."""
    symbols = recorder.symbols
    inputs = {spec.name: spec.dtype for spec in interface.inputs}
    if call is not None and call.mixes_types:
        sizes = {symbol: shapes[dim.input][dim.axis] for symbol, dim in symbols.items()}
        return RefusedError(describe_refusal(call, error, sizes, inputs), of_types=True)
    given = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(inputs, shapes, strict=True))
    text = f"{recorder.location.of(error)}: the module raises {type(error).__name__} ({first_line(error)}) for {given}."
    weights = {w.dtype for w in recorder.constants.owned.values() if w.dtype.is_floating_point}
    if "type" in str(error) and not weights & set(inputs.values()) and (advice := other_types(inputs, weights)):
        return RefusedError(in_words(text, symbols) + advice, of_types=True)
    if symbols:
        text += " The engine would serve such sizes. Narrow the range, or compute with x.shape, not with numbers."
    return RefusedError(in_words(text, symbols), of_traced=True)


def describe_refusal(call: RecordedCall, error: Exception, sizes: Sizes, inputs: Mapping[str, torch.dtype]) -> str:
    """What torch refuses, and what to do about it; `inputs` are the types of the module's inputs by name."""
    shown = ", ".join(operand.show(sizes) for operand in call.operands)
    of = f" of {shown}" if shown else ""
    text = f"{call.place}: torch refuses {call.name}{of} ({first_line(error)})."
    if not call.mixes_types:
        return text
    weights, types = {x.dtype for x in call.operands if x.node is None}, {x.dtype for x in call.operands}
    return text + other_types({name: inputs[name] for name in _sources(call)}, weights, types)


def other_types(
    inputs: Mapping[str, torch.dtype], weights: Collection[torch.dtype], others: Collection[torch.dtype] = ()
) -> str:
    """Which floating-point inputs to give in the type of the weights, or of each other."""
    text = ""
    for name, dtype in inputs.items():
        for other in sorted((CASTS.keys() & (weights or others)) - {dtype}, key=str)[: dtype in CASTS]:
            text += f" Input '{name}' is {bare_name(dtype)}: pass {name}.{CASTS[other]}"
            text += f", or convert the module after module.{CASTS[dtype]}." if weights else "."
    return text


def first_line(error: Exception) -> str:
    """The first line of an error's message, for the end of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _sources(call: RecordedCall) -> list[str]:
    """The names of the inputs that a call depends on."""
    todo = [x.node for x in call.operands if x.node is not None]
    seen = dict.fromkeys(todo)
    for node in todo:
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(dict.fromkeys(new))
        todo += new
    return [str(node.target) for node in seen if node.op == "placeholder"]
