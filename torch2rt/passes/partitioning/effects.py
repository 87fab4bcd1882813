"""What calls do beside computing their results of their arguments: they may draw random numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

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
        if target.namespace not in KNOWN or torch.Tag.nondeterministic_seeded not in target.tags:
            return target.namespace not in KNOWN
        return not (_may_drop(target.__name__) and _drops_nothing(node, [target._schema]))
    name = getattr(target, "__name__", "")
    if not _is_torch(target):
        return True
    return not _drops_nothing(node, _schemas(name)) if _may_drop(name) else _is_random(name)


def _may_drop(name: str) -> bool:
    return any(part in name for part in WITH_TRAINING)


def _drops_nothing(node: Node, schemas: Iterable[Any]) -> bool:
    """Whether a call is told to drop no elements, as calls are in a module that does not train."""
    for schema in schemas:
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
def _schemas(name: str) -> list[Any]:
    """The schemas of torch's operator of a name, if there is one."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    return [getattr(packet, each)._schema for each in packet.overloads()]


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers, or is Python code that might."""
    return isinstance(node.target, PythonCall) or draws_numbers(node)


def draws_numbers(node: Node) -> bool:
    """Whether torch says of a call that it draws random numbers; its first argument may be the operator that does."""
    operators = [t for t in (node.target, *node.args[:1]) if isinstance(t, torch._ops.OpOverload)]
    return any(torch.Tag.nondeterministic_seeded in operator.tags for operator in operators)


@functools.cache
def _is_random(name: str) -> bool:
    """Whether torch's operator of a name draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):  # none of that name, or a method that all objects have
        return False
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, each).tags for each in packet.overloads())


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
