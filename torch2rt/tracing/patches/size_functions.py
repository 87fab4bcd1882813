"""Python's own functions of numbers, which would ask a dynamic size which number it is: `max(n, 1)`, `math.sqrt(n)`.

While a module's own code runs, they give another size in the place of an answer that is right for some sizes only.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from torch2rt.sizes import is_symbolic
from torch2rt.tracing.patches.process_switches import PerThread


def is_module_code() -> bool:
    """Whether the module's own code is running: in torch's and ours, the tracer steps aside."""
    return bool(_get_current_function_mode_stack())


def _is_meta_code() -> bool:
    """Whether the function that says which shapes a call of torch's gives has asked, as that of an SVD before 2.12."""
    return sys._getframe(3).f_globals.get("__name__") == "torch._meta_registrations"


def _extremum(of_sizes: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        def extremum(*values: Any, **options: Any) -> Any:
            if options or not values or not (is_module_code() or _is_meta_code()):
                return original(*values, **options)
            if len(values) == 1:
                if not isinstance(values[0], (tuple, list)):
                    return original(*values)
                values = tuple(values[0])
            if any(map(is_symbolic, values)) and any(_are(kinds, values) for kinds in _KINDS):
                return functools.reduce(of_sizes, values)
            return original(values)

        return extremum

    return stand_in


# A number of two kinds may be an int for some sizes and a float for others.
_KINDS = ((int, torch.SymInt), (float, torch.SymFloat))


def _are(kinds: tuple[type, ...], values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, kinds) and not isinstance(value, bool) for value in values)


def _divmod(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(a: Any, b: Any, /) -> Any:
        return (a // b, a % b) if is_symbolic(a) or is_symbolic(b) else original(a, b)

    return call


def _of_size(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            if len(values) == 1 and is_symbolic(values[0]) and is_module_code():
                return function(values[0])
            return original(*values)

        return call

    return stand_in


def _whole_root(size: Any) -> Any:
    return torch.sym_int(torch.sym_sqrt(size))  # exact, as sizes are far below 2 ** 52


SIZE_FUNCTIONS = (
    PerThread(builtins, "max", _extremum(torch.sym_max)),
    PerThread(builtins, "min", _extremum(torch.sym_min)),
    PerThread(builtins, "divmod", _divmod),
    PerThread(math, "sqrt", _of_size(torch.sym_sqrt)),
    PerThread(math, "isqrt", _of_size(_whole_root)),
    PerThread(math, "log2", _of_size(torch._sym_log2)),  # type: ignore[attr-defined]
)
