"""Arithmetic on dynamic sizes: one sympy expression, read as Python ints, as JSON, or as anything else with an algebra.

A symbol stands for one dynamic dimension of one input. `SymInt`s of a trace carry expressions over these symbols; what
walks them is torch's own `sympy_interp`, which calls a method of an *algebra* for every operation it meets.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy.functions import make_opaque_unary_fn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


@dataclasses.dataclass(frozen=True)
class Dim:
    """A dynamic dimension: which input, which axis, and the sizes it is served for, from `min` to `max` by `step`."""

    input: int
    name: str
    axis: int
    min: int
    max: int
    step: int = 1

    @property
    def sizes(self) -> range:
        """All sizes that it is served for."""
        return range(self.min, self.max + 1, self.step)

    def between(self, low: int, high: int) -> Dim:
        """The dimension with those of its sizes that lie within another range."""
        first = self.min - (self.min - max(low, self.min)) // self.step * self.step
        last = self.min + (min(high, self.max) - self.min) // self.step * self.step
        return dataclasses.replace(self, min=first, max=last)

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
    """An expression in the user's terms and in Python's syntax, such as `x.shape[0] // 2 + 1`."""
    names = {symbol: sympy.Symbol(str(dim), integer=True) for symbol, dim in symbols.items()}
    return _Python().doprint(expr.xreplace(names))


class _Python(StrPrinter):  # type: ignore[misc]
    """sympy's printer, which knows neither torch's functions nor Python's operators."""

    printmethod = "_"  # not the methods by which torch's functions print themselves

    def _infix(operator: str, precedence: str) -> Any:  # type: ignore[misc]
        level = PRECEDENCE[precedence]
        return lambda self, expr: operator.join(self.parenthesize(arg, level, strict=True) for arg in expr.args)

    def _call(name: str) -> Any:  # type: ignore[misc]
        return lambda self, expr: f"{name}({', '.join(map(self._print, expr.args))})"

    _print_FloorDiv = _print_CleanDiv = _infix(" // ", "Atom")
    _print_IntTrueDiv = _print_FloatTrueDiv = _infix(" / ", "Atom")
    _print_Mod = _print_PythonMod = _infix(" % ", "Atom")
    _print_Equality, _print_Unequality = _infix(" == ", "Relational"), _infix(" != ", "Relational")
    _print_And, _print_Or = _infix(" and ", "And"), _infix(" or ", "Or")
    _print_Max, _print_Min = _call("max"), _call("min")
    _print_TruncToInt, _print_RoundToInt = _call("int"), _call("round")
    _print_FloorToInt, _print_CeilToInt = _call("floor"), _call("ceil")

    def _print_Function(self, expr: sympy.Basic) -> str:
        name = getattr(expr, "_torch_handler_name", None)
        return f"{name}({', '.join(map(self._print, expr.args))})" if name else super()._print_Function(expr)

    def _print_ToFloat(self, expr: sympy.Basic) -> str:
        return self._print(expr.args[0])

    def _print_Float(self, expr: sympy.Float) -> str:
        return f"{float(expr):.6g}"


def in_words(text: str, symbols: Symbols) -> str:
    """A text of torch's with the names of dimensions in the place of symbols such as `s63`."""
    names = {str(symbol): str(dim) for symbol, dim in symbols.items()}
    return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), text)


# Functions of Python's `math` that torch has no symbolic numbers of: no rule rewrites them, as `log2` in torch.
FLOAT_FUNCTIONS: dict[str, Any] = {
    name: make_opaque_unary_fn(name)
    for name in "acos asin asinh atan cos cosh exp expm1 log log10 log1p sin sinh tan tanh".split()
}


def has_float_functions(expr: sympy.Basic) -> bool:
    """Whether torch's analysis of ranges may not know what is in an expression."""
    return expr.has(*FLOAT_FUNCTIONS.values())


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
    def sqrt(x: Any) -> Any:
        return torch.sym_sqrt(x)

    @staticmethod
    def log2(x: Any) -> Any:
        return torch._sym_log2(x)  # type: ignore[attr-defined]

    @staticmethod
    def expr_cond_pair(value: Any, condition: Any) -> Any:
        return value, condition

    @staticmethod
    def piecewise(*pairs: Any) -> Any:  # torch 2.11 has neither
        *rest, (result, _) = pairs
        for value, condition in reversed(rest):
            result = torch.sym_ite(condition, value, result)
        return result


def _of_number(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numbers that a `torch.fx.Proxy` records a call of."""

    def call(*values: Any) -> Any:
        proxy = next((value for value in values if isinstance(value, torch.fx.Proxy)), None)
        return function(*values) if proxy is None else proxy.tracer.create_proxy("call_function", function, values, {})

    return call


for _name in FLOAT_FUNCTIONS:
    setattr(PythonAlgebra, _name, staticmethod(_of_number(getattr(math, _name))))
PythonAlgebra.round_decimal = staticmethod(_of_number(round))
_BITWISE = {"bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor}
for _name, _function in _BITWISE.items():
    setattr(PythonAlgebra, _name, staticmethod(_function))


def answer(claim: Any) -> bool | None:
    """The truth of a claim about sizes of a trace for all that are served; `None` if it differs, or cannot be told.

    What the module itself has asked before is known: the trace is only right for sizes with the same answer.
    """
    if not is_symbolic(claim):
        return bool(claim)
    found = claim.node.shape_env.known(claim.node.expr)
    return None if found is None else bool(found)


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
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "python_mod": operator.mod,
    "pow_by_natural": operator.pow,
    "pow": operator.pow,
    "minimum": min,
    "maximum": max,
    "truediv": operator.truediv,
    "int_truediv": operator.truediv,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "not_": operator.not_,
    "and_": lambda a, b: a and b,
    "or_": lambda a, b: a or b,
    "sqrt": math.sqrt,
    "log2": math.log2,
    "identity": lambda a: a,
    "to_dtype": lambda a, dtype: float(a) if "float" in dtype else int(a),
    "trunc": math.trunc,
    "trunc_to_int": lambda a, dtype: math.trunc(a),
    "floor_to_int": lambda a, dtype: math.floor(a),
    "ceil_to_int": lambda a, dtype: math.ceil(a),
    "round_to_int": lambda a, dtype: round(a),
    "round_decimal": round,
    "abs": abs,
    **_BITWISE,
    **{name: getattr(math, name) for name in FLOAT_FUNCTIONS},
    "expr_cond_pair": lambda value, condition: (value, condition),
    "piecewise": lambda *pairs: next(value for value, condition in pairs if condition),
}


def evaluate_json(tree: Any, shapes: Sequence[Any], operations: Mapping[str, Any] = _PYTHON) -> Any:
    """The value of a stored expression for the shapes of the inputs of one call."""
    if not isinstance(tree, list):
        return tree
    if tree[0] == "dim":
        return shapes[tree[1]][tree[2]]
    args = [evaluate_json(arg, shapes, operations) for arg in tree[1:]]
    return operations[tree[0]](*args)


def is_met(relation: Any, shapes: Sequence[Any]) -> bool:
    """Whether a stored claim is true of some shapes; it is false where it divides by 0, which no module can do."""
    try:
        return bool(evaluate_json(relation, shapes))
    except (ArithmeticError, ValueError):
        return False


def _vectorized(function: Callable[[float], float]) -> Any:
    return np.vectorize(function, otypes=[np.float64])  # numpy's own differs from Python's in the last digit


class Vectors(dict):  # type: ignore[type-arg]
    """Operations on numpy vectors, one element for each choice of sizes; `undefined` are those that divide by 0."""

    def __init__(self) -> None:
        super().__init__(
            _PYTHON,
            add=np.add,
            mul=self.product,
            floordiv=self.quotient(np.floor_divide),
            mod=self.quotient(np.mod),
            python_mod=self.quotient(np.mod),
            truediv=self.quotient(np.true_divide),
            minimum=np.minimum,
            int_truediv=self.quotient(np.true_divide),
            pow_by_natural=self.power,
            pow=self.power,
            maximum=np.maximum,
            and_=np.logical_and,
            or_=np.logical_or,
            not_=np.logical_not,
            sqrt=np.sqrt,
            round_decimal=np.vectorize(round, otypes=[np.float64]),
            **{name: _vectorized(getattr(math, name)) for name in ("log2", *FLOAT_FUNCTIONS)},
            trunc=np.trunc,
            to_dtype=lambda a, dtype: np.asarray(a).astype(np.float64 if "float" in dtype else np.int64),
            trunc_to_int=lambda a, dtype: np.trunc(a).astype(np.int64),
            floor_to_int=lambda a, dtype: np.floor(a).astype(np.int64),
            ceil_to_int=lambda a, dtype: np.ceil(a).astype(np.int64),
            round_to_int=lambda a, dtype: np.rint(a).astype(np.int64),
            piecewise=self.choice,
        )
        self.undefined: Any = False

    def product(self, a: Any, b: Any) -> Any:
        if np.max(np.abs(np.multiply(a, b, dtype=np.float64)), initial=0) >= 2**62:
            raise OverflowError
        return np.multiply(a, b)

    def power(self, a: Any, b: Any) -> Any:
        if np.max(np.abs(np.power(a, b, dtype=np.float64)), initial=0) >= 2**62:
            raise OverflowError
        return np.power(a, b)

    def quotient(self, divide: Any) -> Any:
        def checked(a: Any, b: Any) -> Any:
            self.undefined = self.undefined | np.equal(b, 0)
            return divide(a, np.where(np.equal(b, 0), 1, b))

        return checked

    @staticmethod
    def choice(*pairs: Any) -> Any:
        *rest, (result, _) = pairs
        for value, condition in reversed(rest):
            result = np.where(condition, value, result)
        return result


def truths(claim: sympy.Basic, sizes: Mapping[sympy.Symbol, np.ndarray]) -> np.ndarray:
    """Where a claim is true, of vectors of sizes; it is false where it divides by 0, which no module can do."""
    order = list(sizes)
    count = len(sizes[order[0]])
    operations = Vectors()
    try:
        tree = to_json(claim, {symbol: Dim(0, "", axis, 0, 0) for axis, symbol in enumerate(order)})
        true = evaluate_json(tree, [[sizes[symbol] for symbol in order]], operations)
        return np.broadcast_to(np.asarray(true, bool) & ~np.asarray(operations.undefined), (count,))
    except (OverflowError, ValueError, TypeError):  # numbers that only Python's own can be
        values = [list(map(int, sizes[symbol])) for symbol in order]
        return np.array([holds(claim, dict(zip(order, each))) for each in zip(*values)], bool)


def values_at(tree: Any, shapes: Sequence[Sequence[Any]], count: int) -> np.ndarray | None:
    """A stored expression's values for shapes whose sizes are vectors of `count`; `None` where some are no integers."""
    operations = Vectors()
    try:
        found = np.broadcast_to(np.asarray(evaluate_json(tree, shapes, operations)), (count,))
    except (OverflowError, ValueError, TypeError):
        return None
    return found if found.dtype.kind == "i" and not np.any(operations.undefined) else None


def free_symbols(claim: sympy.Basic, symbols: Symbols) -> list[sympy.Symbol]:
    """The dynamic dimensions that a claim is about."""
    return sorted(claim.free_symbols & set(symbols), key=str)


def holds(claim: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a claim is true of these sizes."""
    try:
        return bool(evaluate(claim, sizes))
    except (ArithmeticError, ValueError):  # nor can the module be called with them
        return False
