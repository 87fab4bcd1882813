"""The ATen view operators that a call made, and the operators that write a view's new content back to its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch2rt.registry import Call
from torch2rt.tracing.memory.tensors import memory_of, tensors_in
from torch2rt.tracing.recorder import Recorder


@dataclasses.dataclass
class View:
    """One ATen view operator: its other arguments, what it looked at, and which of its results it is."""

    func: Any
    args: tuple[Any, ...]
    base: torch.Tensor
    index: int | None
    parts: Sequence[torch.Tensor] = ()


class _ViewRecorder(TorchDispatchMode):
    """Writes down the view operators that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, View]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func not in INVERSES:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor):
            parts = out if isinstance(out, (tuple, list)) else None
            rest = _positional(func, args, kwargs or {})[1:]
            for index, tensor in enumerate([out] if parts is None else parts):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor is not args[0]
                    and memory_of(tensor) == memory_of(args[0])
                ):
                    view = View(func, rest, args[0], None if parts is None else index, parts or ())
                    self.made[id(tensor)] = (tensor, view)
        return out


def _positional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A call's arguments, all by position."""
    rest = func._schema.arguments[len(args) :]
    while rest and not any(a.name in kwargs for a in rest[-1:]):
        rest = rest[:-1]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in rest))


def views_of(call: Call, path: tuple[int, ...], recorder: Recorder) -> list[View]:
    """The ATen view operators that lead from one of a call's arguments to its result; none if they are not known.

    `path` is where the result is, if the call returns several.
    """
    func, args, kwargs = call
    views_made = _ViewRecorder()
    with recorder.fake_tensors(), views_made:
        out = func(*args, **kwargs)
        for index in path:
            out = out[index]
    views: list[View] = []
    current = out
    bound = {id(t) for t in tensors_in((args, kwargs))}
    while id(current) not in bound:
        if id(current) not in views_made.made:
            return []
        view = views_made.made[id(current)][1]
        views.insert(0, view)
        current = view.base
    return views


def _shape(tensor: torch.Tensor) -> list[Any]:
    return list(tensor.shape)


def _permute_back(view: View) -> tuple[Any, tuple[Any, ...]]:
    dims = [d % len(view.args[0]) for d in view.args[0]]
    return torch.ops.aten.permute.default, ([dims.index(i) for i in range(len(dims))],)


def _split_back(view: View) -> tuple[Any, tuple[Any, ...]]:
    dim = view.args[1] if len(view.args) > 1 else 0
    assert view.index is not None
    lengths = [part.shape[dim] for part in view.parts]
    start = sum(lengths[: view.index])
    return torch.ops.aten.slice_scatter.default, (dim, start, start + lengths[view.index], 1)


def _reshape_back(view: View) -> tuple[Any, tuple[Any, ...]]:
    return torch.ops.aten.reshape.default, (_shape(view.base),)


_ATEN = torch.ops.aten
# Operators that take the base as well as the new content of the view.
SCATTERS = {_ATEN.select_scatter.default, _ATEN.slice_scatter.default, _ATEN.diagonal_scatter.default}
# The operator that gives the base its new content, and its arguments after the tensors.
INVERSES: dict[Any, Callable[[View], tuple[Any, tuple[Any, ...]]]] = {
    _ATEN.select.int: lambda v: (_ATEN.select_scatter.default, v.args),
    _ATEN.slice.Tensor: lambda v: (_ATEN.slice_scatter.default, v.args),
    _ATEN.diagonal.default: lambda v: (_ATEN.diagonal_scatter.default, v.args),
    _ATEN.unbind.int: lambda v: (_ATEN.select_scatter.default, (v.args[0] if v.args else 0, v.index)),
    _ATEN.split.Tensor: _split_back,
    _ATEN.split_with_sizes.default: _split_back,
    _ATEN.transpose.int: lambda v: (_ATEN.transpose.int, v.args),
    _ATEN.t.default: lambda v: (_ATEN.t.default, ()),
    _ATEN.permute.default: _permute_back,
    _ATEN.view_as_real.default: lambda v: (_ATEN.view_as_complex.default, ()),
    _ATEN.view_as_complex.default: lambda v: (_ATEN.view_as_real.default, ()),
    _ATEN._conj.default: lambda v: (_ATEN._conj.default, ()),
    _ATEN._neg_view.default: lambda v: (_ATEN._neg_view.default, ()),
    **dict.fromkeys(
        [
            _ATEN.view.default,
            _ATEN._unsafe_view.default,
            _ATEN.reshape.default,
            _ATEN._reshape_alias.default,
            _ATEN.unsqueeze.default,
            _ATEN.squeeze.default,
            _ATEN.squeeze.dim,
            _ATEN.squeeze.dims,
            _ATEN.alias.default,
            _ATEN.detach.default,
        ],
        _reshape_back,
    ),
}
