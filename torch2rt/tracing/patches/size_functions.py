"""Functions of numbers that would ask a dynamic size which number it is: `max(n, 1)`, `math.log(n)`, `np.ceil(n / 2)`.

While a module's own code runs, they give another size in the place of an answer that is right for some sizes only.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.overrides import _get_current_function_mode_stack

from torch2rt.sizes import FLOAT_FUNCTIONS, expression, is_symbolic
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
                if not isinstance(values[0], (tuple, list, types.GeneratorType, map)):
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def _of_sizes(
    function: Callable[..., Any], takes: Callable[..., Any] = lambda *values: True
) -> Callable[[Any], Callable[..., Any]]:
    """What takes the place of a function of numbers where some are sizes, and `takes` says that it knows them."""

    def stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            if options or not any(map(is_symbolic, values)) or not is_module_code():
                return original(*values, **options)
            if not all(map(_is_number, values)):
                return original(*values)
            if not takes(*values):  # which makes the sizes a condition of the trace: the original raises its own error
                return original(*map(_plain, values))
            return function(*values)

        return call

    return stand_in


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, torch.SymInt) else float(value) if is_symbolic(value) else value


def _whole_root(size: Any) -> Any:
    return torch.sym_int(torch.sym_sqrt(size))  # exact, as sizes are far below 2 ** 52


def _of_float(name: str) -> Callable[[Any], Any]:
    """A function of `math` of a size or of a float of sizes."""

    original = getattr(math, name)

    def call(size: Any) -> Any:
        size = torch.sym_float(size)
        hint = float(original(size.node.hint)) if size.node.has_hint() else None
        return size.node.shape_env.create_symfloatnode(FLOAT_FUNCTIONS[name](expression(size)), hint=hint)

    return call


def _log(size: Any, base: Any = None) -> Any:
    log = _of_float("log")
    if base is None:
        return log(size)
    return (log(size) if is_symbolic(size) else math.log(size)) / (log(base) if is_symbolic(base) else math.log(base))


def _power(a: Any, b: Any) -> Any:
    return torch.sym_float(a) ** torch.sym_float(b)


def _hypot(*sizes: Any) -> Any:
    return torch.sym_sqrt(sum(size * size for size in sizes))


def _are_whole(*values: Any) -> bool:
    return all(isinstance(value, (int, torch.SymInt)) for value in values)


def _is_positive(*values: Any) -> bool:
    return all(bool(value > 0) for value in values)


def _is_within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda size: bool(size >= low) and bool(size <= high)


def _bit_length(original: Callable[[Any], int]) -> Callable[[Any], Any]:
    def bit_length(self: Any) -> Any:
        if not is_symbolic(self) or not is_module_code() or not _is_positive(self):
            return original(self)
        return torch.sym_int(torch._sym_log2(self)) + 1  # type: ignore[attr-defined]  # exact below 2 ** 47

    return bit_length


# Beyond these numbers Python raises errors.
_DOMAINS: dict[str, Callable[..., bool]] = {
    "sqrt": lambda size: bool(size >= 0),
    "isqrt": lambda size: bool(size >= 0),
    **dict.fromkeys(("log", "log2", "log10"), _is_positive),
    "pow": lambda base, exponent: bool(base > 0),
    "hypot": _are_whole,
    "log1p": lambda size: bool(size > -1),
    **dict.fromkeys(("exp", "expm1", "sinh", "cosh"), _is_within(-700, 700)),
    **dict.fromkeys(("acos", "asin"), _is_within(-1, 1)),
}
_MATH: dict[str, Callable[..., Any]] = {
    **{name: _of_float(name) for name in FLOAT_FUNCTIONS},
    "log": _log,
    "pow": _power,
    "sqrt": torch.sym_sqrt,
    "isqrt": _whole_root,
    "hypot": _hypot,
    "log2": torch._sym_log2,  # type: ignore[attr-defined]
}
_NUMPY: dict[str, Callable[..., Any]] = {  # whose results are floats
    **{name: _MATH[name] for name in ("sqrt", "exp", "log", "log2", "log10", "log1p", "expm1", "sin", "cos", "tanh")},
    "ceil": lambda size: torch.sym_float(math.ceil(size)),
    "floor": lambda size: torch.sym_float(math.floor(size)),
    "trunc": lambda size: torch.sym_float(math.trunc(size)),
    "rint": lambda size: torch.sym_float(round(size)),
}

SIZE_FUNCTIONS = (
    PerThread(builtins, "max", _extremum(torch.sym_max)),
    PerThread(builtins, "min", _extremum(torch.sym_min)),
    PerThread(builtins, "divmod", _divmod),
    PerThread(torch.SymInt, "bit_length", _bit_length),
    *(
        PerThread(module, name, _of_sizes(function, _DOMAINS.get(name, lambda *values: True)))
        for module, functions in ((math, _MATH), (numpy, _NUMPY))
        for name, function in functions.items()
    ),
)
