"""What a module keeps between calls: put back after a trace, and refused where the next call would depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from torch2rt.errors import TraceError
from torch2rt.passes.value_numbers import value_sources
from torch2rt.tracing.values import Values

_TABLES = ("_parameters", "_buffers", "_modules")


class ModuleState:
    """The attributes of a module and its submodules as they are now, and what is in their lists, dicts and sets."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._before = [
            (name, m, dict(m.__dict__), [(v, v.copy()) for v in m.__dict__.values() if type(v) in (list, dict, set)])
            for name, m in module.named_modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ]

    def kept_tensors(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """The attributes and items that hold traced tensors: name, the dict or list they are in, key there, value."""
        for name, module, _, _ in self._before:
            prefix = f"{name}." if name else ""
            for key, value in [*module.__dict__.items(), *module._buffers.items()]:
                if key not in _TABLES:
                    owner = module.__dict__ if key in module.__dict__ else module._buffers
                    yield from _traced_items(f"{prefix}{key}", owner, key, value)

    def has_changed(self) -> bool:
        """Whether an attribute of a module is another object than it was, or a container holds others."""
        return any(
            len(module.__dict__) != len(before)
            or any(before.get(key, self) is not value for key, value in module.__dict__.items())
            or any(not _holds_same(value, content) for value, content in containers)
            for _, module, before, containers in self._before
        )

    def restore(self) -> None:
        """Put back what has changed, and touch nothing else: other threads may be using the module."""
        for _, module, attributes, containers in self._before:
            now = module.__dict__
            for key in [key for key in now if key not in attributes]:
                del now[key]
            now.update((key, value) for key, value in attributes.items() if now.get(key, self) is not value)
            for value, content in containers:
                if not _holds_same(value, content):
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)


def _holds_same(value: Any, content: Any) -> bool:
    """Whether a container still holds the same objects."""
    sides = [list(side.items() if isinstance(side, dict) else side) for side in (value, content)]
    flat = [[x for item in side for x in (item if isinstance(value, dict) else (item,))] for side in sides]
    return len(flat[0]) == len(flat[1]) and all(a is b for a, b in zip(*flat, strict=True))


def _traced_items(name: str, owner: Any, key: Any, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    if isinstance(value, FakeTensor):
        yield name, owner, key, value
    elif type(value) in (list, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for inner, item in list(items):
            yield from _traced_items(f"{name}[{inner!r}]", value, inner, item)
    elif type(value) is tuple and any(isinstance(item, FakeTensor) for item in value):
        yield name, owner, key, value


def depends_on_values(values: Values, value: Any) -> bool:
    """Whether tensors were computed from the inputs' values, and not from their sizes and dtypes alone."""
    todo = [node for t in tree_leaves(value) if isinstance(t, FakeTensor) and (node := values.node(t))]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        todo += (new := [n for n in value_sources(node, values.recorder.registry) if n not in seen])
        seen.update(new)
    return False


class EarlierValue:
    """Takes the place of a tensor that a module has kept from an earlier call; any use of it is an error."""

    def __init__(self, name: str, place: Callable[[], str]) -> None:
        object.__setattr__(self, "_refuse", (name, place))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next(_refusal(a) for a in [*args, *(kwargs or {}).values()] if isinstance(a, cls))


def _refusal(value: EarlierValue) -> TraceError:
    name, place = object.__getattribute__(value, "_refuse")
    return TraceError(
        f"{place()}: the module uses '{name}', which it has computed from the inputs of an earlier call. An engine "
        'has no state: pass it as an input and return the new value, or convert with state="write".'
    )


def _refuse(self: EarlierValue, *args: Any, **kwargs: Any) -> Any:
    raise _refusal(self)


for _name in """
    getattribute getitem setitem len iter contains bool call eq ne lt le gt ge add radd sub rsub mul rmul truediv
    rtruediv matmul rmatmul pow neg invert
""".split():
    setattr(EarlierValue, f"__{_name}__", _refuse)
