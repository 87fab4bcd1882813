"""Numbers of sizes, rewritten so that TensorRT computes what Python does.

Python computes floats of sizes in float64, and torch rounds them to float32 when they meet a tensor. TensorRT has no
float64: whatever takes several operations would be rounded at each. `4 * (5 / 3)` rounds to another float32, and where
a tensor is made of such numbers to index with, to another place.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import sympy
from torch.utils._sympy.functions import (
    CeilToInt,
    FloatTrueDiv,
    FloorDiv,
    FloorToInt,
    IntTrueDiv,
    Max,
    Min,
    Mod,
    PythonMod,
    ToFloat,
)

from torch2rt.size_choices import extremes
from torch2rt.sizes import Symbols

_EXACT = 2**24  # whole numbers up to here are float32 numbers
_DIVISIONS = (FloatTrueDiv, IntTrueDiv)


def whole_arithmetic(expr: sympy.Basic) -> sympy.Basic:
    """A size with as little as possible that TensorRT cannot bound: it refuses to resize to what it takes for negative.

    `x + -x % 32` becomes `-32 * (-x // 32)`. A quotient that Python rounds is the same in whole numbers below 2 ** 53.
    """
    expr = expr.replace(lambda e: isinstance(e, (Mod, PythonMod)), lambda e: e.args[0] - e.args[1] * FloorDiv(*e.args))
    expr = expr.replace(functools.partial(_rounds_quotient, FloorToInt), lambda e: FloorDiv(*e.args[0].args))
    return expr.replace(functools.partial(_rounds_quotient, CeilToInt), lambda e: _up(*e.args[0].args))


def _up(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    return -FloorDiv(-a, b)


def _rounds_quotient(kind: type[sympy.Function], expr: sympy.Basic) -> bool:
    return isinstance(expr, kind) and isinstance(expr.args[0], IntTrueDiv)


def rounds_often(expr: sympy.Basic) -> bool:
    """Whether float32 rounds a float more than once on the way to it.

    >>> size = sympy.Symbol("size", integer=True, positive=True)
    >>> rounds_often(IntTrueDiv(size, 3)), rounds_often(IntTrueDiv(size, 3) * ToFloat(size))
    (False, True)
    """
    if _is_exact(expr):
        return False
    if isinstance(expr, (Max, Min)):
        return any(map(rounds_often, expr.args))
    return not (len(expr.args) <= 2 and all(map(_is_exact, expr.args)))


def _is_exact(expr: sympy.Basic) -> bool:
    """Whether a number is a float32 number, if it is not large."""
    if isinstance(expr, sympy.Float):
        return float(np.float32(float(expr))) == float(expr)
    if isinstance(expr, (Max, Min)):
        return all(map(_is_exact, expr.args))
    return bool(expr.is_integer) or isinstance(expr, ToFloat)


class _Quotient(NamedTuple):
    """A number as two whole ones, of which the second is positive."""

    over: sympy.Basic
    under: sympy.Basic


def as_quotient(expr: sympy.Basic, symbols: Symbols) -> sympy.Basic | None:
    """A float as a quotient of two whole numbers, which is rounded once; `None` where they do not fit into float32.

    >>> from torch2rt.sizes import Dim
    >>> rows, columns = sympy.symbols("rows columns", integer=True, positive=True)
    >>> ranges = {rows: Dim(0, "x", 0, 1, 9), columns: Dim(0, "x", 1, 1, 9)}
    >>> as_quotient(IntTrueDiv(columns, rows) * ToFloat(rows + 1), ranges)
    IntTrueDiv(columns*(rows + 1), rows)
    """
    if (found := _quotient(expr)) is None:
        return None
    if found.under.is_positive is False or extremes(found.under, symbols)[0] < 1:
        return None
    if any(max(map(abs, extremes(part, symbols))) > _EXACT for part in found):
        return None
    return IntTrueDiv(*found)


def _quotient(expr: sympy.Basic) -> _Quotient | None:
    if isinstance(expr, sympy.Float):
        over, under = float(expr).as_integer_ratio() if math.isfinite(float(expr)) else (0, 0)
        return _Quotient(sympy.Integer(over), sympy.Integer(under)) if 0 < under <= _EXACT else None
    if expr.is_integer:
        return _Quotient(expr, sympy.Integer(1))
    if isinstance(expr, ToFloat):
        return _quotient(expr.args[0])
    if not isinstance(expr, (sympy.Add, sympy.Mul, Max, Min, *_DIVISIONS)):
        return None
    parts = [_quotient(arg) for arg in expr.args]
    found = parts[0]
    for part in parts[1:]:
        if found is None or part is None:
            return None
        found = _combined(type(expr), found, part)
    return found


def _combined(kind: type[sympy.Basic], a: _Quotient, b: _Quotient) -> _Quotient | None:
    if issubclass(kind, _DIVISIONS):
        return _Quotient(a.over * b.under, a.under * b.over)
    if issubclass(kind, sympy.Mul):
        return _Quotient(a.over * b.over, a.under * b.under)
    left, right = (a.over, b.over) if a.under == b.under else (a.over * b.under, b.over * a.under)
    under = a.under if a.under == b.under else a.under * b.under
    made = left + right if issubclass(kind, sympy.Add) else kind(left, right)
    return _Quotient(made, under)
