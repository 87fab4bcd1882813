"""What calls do beside computing their results of their arguments: they may draw random numbers."""

from __future__ import annotations

import functools

import torch
from torch.fx.node import Node

from torch2rt.callables import qualified_name
from torch2rt.python_calls import PythonCall

KNOWN = ("aten", "prims", "torchvision", "quantized_decomposed")  # namespaces whose tags say what operators draw
WITH_TRAINING = ("dropout", "rrelu", "lstm", "gru", "rnn", "attention")  # parts of names


def draws(node: Node) -> bool:
    """Whether a call may draw random numbers, or do something else that nobody knows, as a custom operator may."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in KNOWN or torch.Tag.nondeterministic_seeded in target.tags
    name = getattr(target, "__name__", "")
    return any(part in name for part in WITH_TRAINING) or not _is_torch(target) or _is_random(name)


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
