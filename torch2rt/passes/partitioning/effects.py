"""What calls do beside computing their results of their arguments: they may draw random numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch.fx.node import Node

from torch2rt.callables import qualified_name
from torch2rt.python_calls import PythonCall

KNOWN = ("aten", "prims", "torchvision", "quantized_decomposed")  # namespaces whose tags say what operators draw
WITH_TRAINING = ("dropout", "rrelu", "lstm", "gru", "rnn", "attention")  # parts of names of what may drop elements


def draws(node: Node) -> bool:
    """Whether a call may draw random numbers, or do something else that nobody knows, as a custom operator may."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in KNOWN:
            return True
        if not _is_seeded(target):
            return False
        operators = [target]
    elif _is_torch(target):
        operators = _overloads(getattr(target, "__name__", ""))
    else:
        return True
    if any(part in getattr(target, "__name__", "") for part in WITH_TRAINING):
        return not _drops_nothing(node, operators)
    return any(map(_is_seeded, operators))


def _is_seeded(operator: torch._ops.OpOverload) -> bool:
    """Whether torch says of an operator that it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def _drops_nothing(node: Node, operators: Iterable[torch._ops.OpOverload]) -> bool:
    """Whether a call is told to drop no elements, as calls are in a module that does not train."""
    for schema in (operator._schema for operator in operators):
        expected = [isinstance(argument.type, torch.ListType) for argument in schema.arguments]
        lists = [isinstance(value, (list, tuple)) for value in node.args]
        if lists != expected[: len(lists)]:
            continue
        given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given |= dict(zip([argument.name for argument in schema.arguments], node.args)) | node.kwargs
        if given.get("training", given.get("train")) is False:
            return True
        probability = given.get("dropout_p", given.get("dropout", given.get("p")))
        # native_dropout draws numbers also to drop none
        return isinstance(probability, (int, float)) and probability == 0 and "native" not in schema.name
    return False


@functools.cache
def _overloads(name: str) -> list[torch._ops.OpOverload]:
    """Torch's operators of a name, if there are any: it may be that of a method that all objects have."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [getattr(packet, each) for each in packet.overloads()]


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers, or is Python code that might."""
    return isinstance(node.target, PythonCall) or draws_numbers(node)


def draws_numbers(node: Node) -> bool:
    """Whether torch says of a call that it draws random numbers; its first argument may be the operator that does."""
    operators = [t for t in (node.target, *node.args[:1]) if isinstance(t, torch._ops.OpOverload)]
    return any(map(_is_seeded, operators))


def writes_unseen(node: Node) -> bool:
    """Whether a call writes to its arguments though its schema does not say so, as batch norm in training mode does."""
    place = {"batch_norm": 3, "instance_norm": 3, "native_batch_norm": 3, "cudnn_batch_norm": 3, "miopen_batch_norm": 3}
    index = place.get(getattr(node.target, "__name__", "").split(".")[0])
    if index is None or len(node.args) <= index + 2:
        return False
    return bool(node.args[index + 2]) and node.args[index] is not None


def _is_torch(target: object) -> bool:
    name = qualified_name(target)  # type: ignore[arg-type]
    return name.startswith(("torch.", "_operator", "operator", "builtins", "math"))
