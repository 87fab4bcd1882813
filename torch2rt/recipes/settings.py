"""What a module's Python depends on beside tensors: the plain attributes of its modules."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OWN = frozenset(vars(torch.nn.Module())) - {"_modules"}


def settings(module: torch.nn.Module) -> dict[str, str]:
    """The plain attributes of a module and its submodules, their hooks and classes, as text by name.

    `training` is not among them: an engine stays in the mode that its module was converted in.

    >>> settings(torch.nn.LeakyReLU(0.2))["negative_slope"]
    '0.2'
    """
    found: dict[str, str] = {}
    for path, owner in getattr(module, "_orig_mod", module).named_modules(remove_duplicate=False):
        found[path] = f"{type(owner).__module__}.{type(owner).__qualname__}"
        for key in _HOOKS:
            if hooks := list(vars(owner)[key].values()):  # their keys are others in each module
                found[f"{path}.{key}".lstrip(".")] = str(_text(hooks))
        for key, value in vars(owner).items():
            if key not in _OWN and (text := _text(value)) is not None:
                found[f"{path}.{key}".lstrip(".")] = text
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _text(value: Any) -> str | None:
    """A plain value as text; `None` for others. Of a container, what is plain in it."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (types.FunctionType, types.MethodType)):  # such as a hook, or another `forward`
        line = getattr(getattr(value, "__code__", None), "co_firstlineno", None)
        return f"{value.__module__}.{value.__qualname__}, line {line}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(_text(item) or '?' for item in value)})"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(_text(item) or '?' for item in value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_text(k)}: {_text(v)}' for k, v in value.items())})"
    return None
