"""The tensors that a module holds: parameters, buffers, and those among its modules' attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_OWN = frozenset(vars(torch.nn.Module()))
DEPTH = 4  # of lists in lists


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers, and the tensors among its modules' attributes, by name.

    >>> list(named_tensors(torch.nn.Linear(3, 5)))
    ['weight', 'bias']
    """
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= module.named_buffers(remove_duplicate=False)
    for attribute in attributes(module):
        if isinstance(attribute.value, torch.Tensor):
            named.setdefault(attribute.name, attribute.value)
    return named


class Attribute(NamedTuple):
    """A tensor among the attributes of modules, or in a list, tuple or dict there, or such a container."""

    name: str
    holder: Any
    key: Any
    value: Any


def attributes(module: torch.nn.Module) -> list[Attribute]:
    """The tensors among the attributes of a module's modules, beside parameters and buffers, and what holds them.

    >>> relu = torch.nn.ReLU()
    >>> relu.tables = [torch.ones(2)]
    >>> [attribute.name for attribute in attributes(relu)]
    ['tables', 'tables.0']
    """
    found: list[Attribute] = []
    for path, owner in module.named_modules(remove_duplicate=False):
        for key, value in vars(owner).items():
            if key not in _OWN:
                found += _held(f"{path}.{key}".lstrip("."), vars(owner), key, value, DEPTH)
    return found


def _held(name: str, holder: Any, key: Any, value: Any, depth: int) -> list[Attribute]:
    if isinstance(value, torch.Tensor):
        return [] if isinstance(value, FakeTensor) else [Attribute(name, holder, key, value)]
    if depth == 0 or not isinstance(value, (list, tuple, dict)):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [inner for k, v in items for inner in _held(f"{name}.{k}", value, k, v, depth - 1)]
    return [Attribute(name, holder, key, value), *found] if found else []


def inner_of(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor with its name, or the plain ones that a tensor subclass is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from inner_of(f"{name}.{attribute}", getattr(tensor, attribute))
    else:
        yield name, tensor


def inner_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name, with those that a tensor subclass is made of in its place."""
    return {path: inner for name, tensor in tensors.items() for path, inner in inner_of(name, tensor)}
