"""The ways in which torch says that a call writes to a tensor: `out=`, `inplace=True`, and names such as `add_`."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch

from torch2rt.callables import Target, functional
from torch2rt.registry import Call


def out_of_place(
    func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | tuple[torch.Tensor, ...] | None, Call]:
    """What a call writes to, if anything, and the same call without the write."""
    if isinstance(func, torch._ops.OpOverload) and (names := [a.name for a in func._schema.arguments if a.is_out]):
        outs = tuple(kwargs[name] for name in names)
        if (same := _without_out(func)) is None:
            return None, (func, args, kwargs)
        return outs if len(outs) > 1 else outs[0], (same, args, {k: v for k, v in kwargs.items() if k not in names})
    out = kwargs.get("out")
    if isinstance(out, (tuple, list)) and out and all(isinstance(one, torch.Tensor) for one in out):
        return tuple(out), (func, args, {k: v for k, v in kwargs.items() if k != "out"})
    if isinstance(out, torch.Tensor):
        return out, (func, args, {k: v for k, v in kwargs.items() if k != "out"})
    if (target := functional(func)) is not None and args and isinstance(args[0], torch.Tensor):
        return args[0], (target, args, kwargs)
    if isinstance(func, types.FunctionType) and (position := _position_of_inplace(func)) is not None:
        by_position = len(args) > position
        if kwargs.get("inplace") or by_position and args[position]:
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
            return args[0], (func, (*args[:position], *[False] * by_position, *args[position + 1 :]), kwargs)
    return None, (func, args, kwargs)


def written_arguments(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to, as its schema says."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.is_write and (index < len(args) or argument.name in kwargs):
            found.append(args[index] if index < len(args) else kwargs[argument.name])
    return [value for value in found if value is not None]


def written_copies(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """What an operator that writes to its arguments would have written there, and what it returns beside that.

    The arguments keep their values. A traced graph has it in the place of an operator that has no other form.
    """
    written = written_arguments(func, args, kwargs)
    copies = {id(tensor): tensor.clone() for tensor in written}
    args = tuple(copies.get(id(value), value) for value in args)
    kwargs = {name: copies.get(id(value), value) for name, value in kwargs.items()}
    out = func(*args, **kwargs)
    returned = out if isinstance(out, (tuple, list)) else (out,)
    returns = zip(func._schema.returns, returned)
    return (*(copies[id(t)] for t in written), *(value for r, value in returns if r.alias_info is None))


@functools.cache
def _position_of_inplace(func: Target) -> int | None:
    """Where a Python function takes `inplace`, if it does."""
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


@functools.cache
def _without_out(func: torch._ops.OpOverload) -> Target | None:
    """The overload of an operator that returns what this one writes to its `out` arguments."""
    signature = lambda schema: [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]  # noqa: E731
    overloads = (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads())
    return next(
        (o for o in overloads if not o._schema.is_mutable and signature(o._schema) == signature(func._schema)), None
    )
