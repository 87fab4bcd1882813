"""Run: modules that keep tensors between calls, such as caches, running statistics and recurrent states."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch2rt.errors import InputError, TraceError
from torch2rt.interface import Interface
from torch2rt.objects import Path, has_changed, kept_tensors, overwrite, parts
from torch2rt.runtime.converted import Converted
from torch2rt.structure import flatten, objects_in, unflatten
from torch2rt.tracing.calls.randomness import same_states

_OWN = frozenset(torch.nn.Module().__dict__)  # attributes that every module has
DEPTH = 6  # of objects in a module's attributes, in which tensors are looked for


@dataclass(frozen=True)
class Place:
    """Where a tensor is kept: a dict or list, or an object's attributes, and the key there."""

    name: str
    owner: Any
    key: Any

    def get(self) -> Any:
        return self.owner[self.key]

    def set(self, value: Any) -> None:
        self.owner[self.key] = value


def places(module: torch.nn.Module) -> Iterator[Place]:
    """Where a module keeps tensors that are no parameters: buffers, and tensors in its attributes, each once."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for key in owner._buffers:
            yield from _within(f"{prefix}{key}", owner._buffers, key, seen, DEPTH)
        for key in [k for k in owner.__dict__ if k not in _OWN]:
            yield from _within(f"{prefix}{key}", owner.__dict__, key, seen, DEPTH)


def _within(name: str, owner: Any, key: Any, seen: set[int], depth: int) -> Iterator[Place]:
    value = owner[key]
    if isinstance(value, torch.nn.Parameter) or id(value) in seen or depth == 0:
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        yield Place(name, owner, key)
        return
    if isinstance(value, (torch.nn.Module, type)) or callable(value):
        return
    inner: Any
    items: list[tuple[Any, str]]
    if isinstance(value, dict):
        inner, items = value, [(k, f"{name}.{k}") for k in value]
    elif isinstance(value, list):
        inner, items = value, [(i, f"{name}.{i}") for i in range(len(value))]
    elif hasattr(value, "__dict__") and not isinstance(value, type(torch)):
        inner, items = value.__dict__, [(k, f"{name}.{k}") for k in value.__dict__]
    else:
        return
    seen.add(id(value))
    for k, path in items:
        yield from _within(path, inner, k, seen, depth - 1)


class Explicit(torch.nn.Module):
    """A module whose state is an argument and a result: `explicit(*args, state={...}, **kwargs)`.

    - `state`: where the tensors of the state are kept, by name.
    - `written`: the indices of the input tensors that the module writes to; what it leaves there is a result, too.
    - `objects`: the indices of the objects among the inputs that it changes, such as caches: results, too.

    It returns the module's result, a dict of the state's new tensors, and a list of what it has made of its inputs, the
    tensors before the objects. Nothing that it is given is written to.
    """

    is_around_module = True  # whose paths, in reports and in patterns, are those within the module

    def __init__(
        self, module: torch.nn.Module, state: Mapping[str, Place], written: Sequence[int], objects: Iterable[int] = ()
    ) -> None:
        super().__init__()
        self.module, self.called_as = module, module.forward
        self._places, self._written, self._objects = dict(state), list(written), list(objects)

    def forward(self, *args: Any, state: Mapping[str, torch.Tensor], **kwargs: Any) -> Any:
        before = {name: place.get() for name, place in self._places.items()}
        leaves, spec = flatten((args, kwargs), torch.is_tensor, "inputs")
        for index in range(len(leaves)) if self._objects else self._written:
            leaves[index] = leaves[index].clone()
        args, kwargs = unflatten(spec, leaves)
        try:
            for name, place in self._places.items():
                place.set(state[name].clone())
            result = self.module(*args, **kwargs)
            new = {name: place.get() for name, place in self._places.items()}
        finally:
            for name, place in self._places.items():
                place.set(before[name])
        for name, value in new.items():
            if not isinstance(value, torch.Tensor) or value.shape != state[name].shape:
                raise TraceError(f"The module's state '{name}' does not keep its shape, {tuple(state[name].shape)}.")
            if value.dtype != state[name].dtype:
                raise TraceError(f"The module's state '{name}' does not keep its dtype, {state[name].dtype}.")
        objects = list(objects_in((args, kwargs)))
        return result, new, [leaves[index] for index in self._written] + [objects[index] for index in self._objects]


@dataclass(frozen=True)
class Found:
    """The state of a module: the tensors that it keeps from call to call, and the inputs that it writes to.

    `objects`: those among the inputs that it changes, each with the places of tensors that stay, and are written to.
    """

    module: Explicit
    values: dict[str, torch.Tensor]
    objects: dict[int, set[Path]]


def find_state(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Found | None:
    """What a module writes to in a run with these arguments; the module and the arguments stay as they are."""
    kept = {place.name: place for place in places(module)}
    before = {name: place.get() for name, place in kept.items()}
    saved = {name: value.detach().clone() for name, value in before.items()}
    versions = {name: _version(value) for name, value in before.items()}
    leaves, spec = flatten((args, dict(kwargs)), torch.is_tensor, "inputs")
    given = [leaf.detach().clone() for leaf in leaves]
    counts = [_version(leaf) for leaf in given]
    run_args, run_kwargs = unflatten(spec, given)
    objects = list(objects_in((run_args, run_kwargs)))
    found = [dict(parts(one)) for one in objects]
    try:
        with torch.no_grad(), same_states():
            module(*run_args, **run_kwargs)
        now = {name: place.get() for name, place in kept.items()}
        changed = [n for n in kept if now[n] is not before[n] or not _is_same(before[n], saved[n], versions[n])]
    finally:
        for name, place in kept.items():
            if place.get() is not before[name]:
                place.set(before[name])
            if not _is_same(before[name], saved[name], versions[name]):
                with torch.no_grad():
                    before[name].copy_(saved[name])
    written = [i for i, (leaf, count) in enumerate(zip(given, counts, strict=True)) if _version(leaf) != count]
    rewritten: dict[int, set[Path]] = {}
    for index, (one, old) in enumerate(zip(objects, found, strict=True)):
        own = [i for i, leaf in enumerate(given) if any(leaf is value for value in old.values())]
        if has_changed(old, new := dict(parts(one))) or not set(written).isdisjoint(own):
            rewritten[index] = kept_tensors(old, new)
            written = [i for i in written if i not in own]
    if not changed and not written and not rewritten:
        return None
    explicit = Explicit(module, {name: kept[name] for name in changed}, written, rewritten)
    return Found(explicit.train(module.training), {name: saved[name] for name in changed}, rewritten)


def _is_same(tensor: torch.Tensor, saved: torch.Tensor, version: int) -> bool:
    """Whether a tensor was not written to; batch norm counts no writes of its running statistics."""
    same = torch.equal(tensor, saved) or bool(((tensor == saved) | (tensor != tensor) & (saved != saved)).all())
    return same and _version(tensor) == version


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class StatefulModule(Converted):
    """A converted module that keeps tensors between calls, as the module does that it was made from.

    The state is the converted module's own: it begins as a copy of the module's, and each call replaces it, in the
    order of the caller's stream. Calls from several threads at once would mix their states, as with the module. An
    input that the module writes to is written to.

    Attributes: `converted` (of `state="explicit"`, which takes and returns the state) and `state`, its tensors by name.

    >>> model_trt = torch2rt(model, [x], state="write")     # doctest: +SKIP
    >>> model_trt.state["cache"].zero_()                    # doctest: +SKIP
    """

    def __init__(
        self,
        converted: Any,
        state: Mapping[str, torch.Tensor],
        written: Sequence[int],
        objects: Mapping[int, set[Path]] | None = None,
    ) -> None:
        super().__init__()
        self.converted, self.objects = converted, dict(objects or {})
        self.names = {name: f"state_{index}" for index, name in enumerate(state)}
        for name, value in state.items():
            self.register_buffer(self.names[name], value)
        self.written = list(written)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that the next call begins with, by the names of the module's own."""
        return {name: getattr(self, attribute) for name, attribute in self.names.items()}

    def share_state(self, other: StatefulModule) -> None:
        """Use the state of another module from now on, such as a decoding engine that of the engine for the prompt.

        Raises `InputError` where the names, dtypes or shapes of the two differ.
        """
        ours, theirs = ({n: (x.dtype, tuple(x.shape)) for n, x in m.state.items()} for m in (self, other))
        if ours != theirs:
            raise InputError(f"The states differ: {ours} and {theirs}.")
        for name, value in other.state.items():
            setattr(self, self.names[name], value)

    def _interface(self) -> Interface:
        return self.converted._interface()

    @property
    def report(self) -> Any:
        """What was verified, what was assumed, and what calls need."""
        return self.converted.report

    def warm_up(self, shapes: Any = None, *, contexts: int = 1) -> None:
        """Do before traffic comes what first calls do, as `TRTModule.warm_up` does. The state stays as it is.

        Shapes are given as dicts by input name, or with those of the state last.
        """
        self.converted.warm_up(shapes, contexts=contexts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the converted module and write the new state; raises `InputError` for tensors that do not fit."""
        if "state" in kwargs:
            raise InputError("The state is the module's own. Set model_trt.state[name].copy_(value).")
        leaves = flatten((args, kwargs), torch.is_tensor, "inputs")[0] if self.written else []
        state = self.state
        result, new, inputs = self.converted(*args, state=state, **kwargs)
        with torch.no_grad():
            for name, value in new.items():
                state[name].copy_(value)
            for index, value in zip(self.written, inputs, strict=False):
                leaves[index].copy_(value)
            given = list(objects_in((args, kwargs))) if self.objects else []
            for (index, kept), value in zip(self.objects.items(), inputs[len(self.written) :], strict=True):
                overwrite(given[index], value, kept)
        return result

    def reference(self) -> StatefulModule:
        """The kept network, evaluated with torch, with a copy of the state."""
        state = {name: value.clone() for name, value in self.state.items()}
        return StatefulModule(self.converted.reference(), state, self.written, self.objects)

    def __deepcopy__(self, memo: dict[int, Any]) -> StatefulModule:
        state = {name: value.clone() for name, value in self.state.items()}
        converted = copy.deepcopy(self.converted, memo)
        memo[id(self)] = copied = StatefulModule(converted, state, self.written, self.objects)
        return copied
