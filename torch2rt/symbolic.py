"""Arithmetic on dynamic sizes: one sympy expression, read as Python ints, as JSON, or as anything else with an algebra.

A symbol stands for one dynamic dimension of one input. `SymInt`s of a trace carry expressions over these symbols; what
walks them is torch's own `sympy_interp`, which calls a method of an *algebra* for every operation it meets.
"""
from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy


@dataclasses.dataclass(frozen=True)
class Dim:
    """A dynamic dimension: which input, which axis, and the range of sizes it is served for."""

    input: int
    name: str
    axis: int
    min: int
    max: int

    @property
    def sizes(self) -> range:
        """All sizes that it is served for."""
        return range(self.min, self.max + 1)

    def __str__(self) -> str:
        return f"{self.name}.shape[{self.axis}]"


Symbols = Mapping[sympy.Symbol, Dim]


def expression(size: Any) -> sympy.Basic:
    """The sympy expression of an int, `SymInt`, `SymFloat` or `SymBool`."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size.node.expr
    return sympy.sympify(size)


def is_symbolic(size: Any) -> bool:
    """Whether a value is a symbolic number of a trace."""
    return isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))


def describe(expr: sympy.Basic, symbols: Symbols) -> str:
    """An expression in the user's terms, such as `x.shape[0] + 1`."""
    names = {symbol: sympy.Symbol(str(dim), integer=True) for symbol, dim in symbols.items()}
    text = str(expr.xreplace(names))
    for relation, sign in (("Eq", "=="), ("Ne", "!=")):
        if text.startswith(relation + "(") and isinstance(expr, getattr(sympy, relation)):
            left, right = (str(arg.xreplace(names)) for arg in expr.args)
            return f"{left} {sign} {right}"
    return text


class PythonAlgebra(PythonReferenceAnalysis):  # type: ignore[misc]
    """torch's algebra of Python numbers, with what it leaves to sympy, which cannot take a `torch.fx.Proxy`."""

    int_truediv = staticmethod(operator.truediv)

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return torch.sym_int(x // 1)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return -torch.sym_int(-x // 1)

    @staticmethod
    def round_to_int(x: Any, dtype: torch.dtype) -> Any:
        return x.tracer.create_proxy("call_function", round, (x,), {}) if isinstance(x, torch.fx.Proxy) else round(x)

    @staticmethod
    def expr_cond_pair(value: Any, condition: Any) -> Any:
        return value, condition

    @staticmethod
    def piecewise(*pairs: Any) -> Any:  # torch 2.11 has neither
        *rest, (result, _) = pairs
        for value, condition in reversed(rest):
            result = torch.sym_ite(condition, value, result)
        return result


def evaluate(expr: sympy.Basic, values: Mapping[sympy.Symbol, int]) -> Any:
    """The value of an expression at given sizes."""
    return sympy_interp(PythonAlgebra, dict(values), expr)


class _Json:
    """An algebra whose values are nested JSON lists: `["floordiv", ["dim", 0, 2], 2]`."""

    def constant(self, value: Any, dtype: torch.dtype) -> Any:
        return bool(value) if dtype is torch.bool else int(value) if dtype is torch.int64 else float(value)

    def __getattr__(self, name: str) -> Any:
        if name == "sym_sum" or name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: [name, *(str(a) if isinstance(a, torch.dtype) else a for a in args)]


def to_json(expr: sympy.Basic, symbols: Symbols) -> Any:
    """An expression as JSON, for `evaluate_json`."""
    env = {symbol: ["dim", dim.input, dim.axis] for symbol, dim in symbols.items()}
    return sympy_interp(_Json(), env, expr)


_PYTHON: dict[str, Any] = {
    "add": operator.add, "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod,
    "python_mod": operator.mod, "pow_by_natural": operator.pow, "pow": operator.pow, "minimum": min, "maximum": max,
    "truediv": operator.truediv, "int_truediv": operator.truediv, "eq": operator.eq, "ne": operator.ne,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "not_": operator.not_,
    "and_": lambda a, b: a and b, "or_": lambda a, b: a or b, "sqrt": math.sqrt, "identity": lambda a: a,
    "to_dtype": lambda a, dtype: float(a) if "float" in dtype else int(a), "trunc": math.trunc,
    "trunc_to_int": lambda a, dtype: math.trunc(a), "floor_to_int": lambda a, dtype: math.floor(a),
    "ceil_to_int": lambda a, dtype: math.ceil(a), "round_to_int": lambda a, dtype: round(a), "abs": abs,
    "expr_cond_pair": lambda value, condition: (value, condition),
    "piecewise": lambda *pairs: next(value for value, condition in pairs if condition),
}  # fmt: skip


def evaluate_json(tree: Any, shapes: list[tuple[int, ...]]) -> Any:
    """The value of a stored expression for the shapes of the inputs of one call."""
    if not isinstance(tree, list):
        return tree
    if tree[0] == "dim":
        return shapes[tree[1]][tree[2]]
    args = [evaluate_json(arg, shapes) for arg in tree[1:]]
    return _PYTHON[tree[0]](*args)


ENUMERATE = 4096  # sizes tried one by one before a claim is sampled instead; about 0.1 s


def counterexample(claim: sympy.Basic, symbols: Symbols) -> dict[Dim, int] | bool | None:
    """Sizes inside the served ranges for which a claim is false.

    `None` when the claim is proven for every size; `True` when it is neither proven nor refuted.
    """
    if claim in (sympy.true, True):
        return None
    free = sorted(claim.free_symbols & set(symbols), key=str)
    if not free:
        return True
    bounds = {s: ValueRanges(symbols[s].min, symbols[s].max) for s in free}
    try:
        proven = bound_sympy(claim, bounds)
        if proven.is_singleton() and proven.lower in (sympy.true, True):
            return None
    except (NotImplementedError, AssertionError, TypeError):
        pass  # torch's range analysis does not know this operation: the sizes below decide
    ranges = [symbols[s].sizes for s in free]
    total = math.prod(map(len, ranges))
    candidates: Iterable[tuple[int, ...]]
    if total <= ENUMERATE:
        candidates = itertools.product(*ranges)
    else:
        candidates = itertools.product(*[samples(r, math.ceil(ENUMERATE ** (1 / len(free)))) for r in ranges])
    for sizes in itertools.islice(candidates, 2 * ENUMERATE):
        if not holds(claim, dict(zip(free, sizes, strict=True))):
            return {symbols[s]: size for s, size in zip(free, sizes, strict=True)}
    return None if total <= ENUMERATE else True


def holds(claim: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a claim is true of these sizes."""
    try:
        return bool(evaluate(claim, sizes))
    except ZeroDivisionError:  # nor can the module be called with them
        return False


def is_sampled(sizes: range, count: int = ENUMERATE) -> bool:
    """Whether `samples` are not all."""
    return len(sizes) > count


def samples(sizes: range, count: int = ENUMERATE) -> list[int]:
    """All, or about so many: both ends, their neighbours, and an even spread between."""
    if not is_sampled(sizes, count):
        return list(sizes)
    step = max(1, len(sizes) // max(1, count - 6))
    return sorted({*sizes[:3], *sizes[-3:], *sizes[::step]})
