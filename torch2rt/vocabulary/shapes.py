"""Sizes as TensorRT tensors: the arithmetic of a symbolic size as shape layers, each expression once per network."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import (
    BitwiseFn_bitwise_and,
    BitwiseFn_bitwise_or,
    BitwiseFn_bitwise_xor,
    CeilToInt,
    FloatPow,
    FloatTrueDiv,
    FloorToInt,
    IntTrueDiv,
    OpaqueUnaryFn_log2,
    OpaqueUnaryFn_sqrt,
    RoundDecimal,
    RoundToInt,
    ToFloat,
    TruncToInt,
)
from torch.utils._sympy.interp import sympy_interp

from torch2rt.backend.tensorrt import trt
from torch2rt.size_choices import extremes
from torch2rt.sizes import FLOAT_FUNCTIONS, evaluate, expression, is_symbolic
from torch2rt.vocabulary import layers
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import EW, constant
from torch2rt.vocabulary.plain import dims, dtype_of, refuse
from torch2rt.vocabulary.size_arithmetic import as_quotient, rounds_often, whole_arithmetic


def shape_tensor(ctx: Context, sizes: Sequence[Any]) -> Any:
    """Sizes as a 1-d int64 tensor (float32 for a symbolic float); each expression is computed once per network."""
    key = ("shape", tuple(map(expression, sizes)))
    if key in ctx.memo:
        return ctx.memo[key]
    if not any(map(is_symbolic, sizes)):
        result = constant(ctx, torch.tensor([int(s) for s in sizes], dtype=torch.int64))
    elif len(sizes) == 1 and (table := _table(ctx, expr := whole_arithmetic(expression(sizes[0])))) is not None:
        result = table
    elif len(sizes) == 1:
        expr, tables = _with_tables(ctx, expr)
        result = sympy_interp(_ShapeLayers(ctx), _SymbolLayers(ctx, tables), expr)  # type: ignore[arg-type]
    else:
        parts: list[Any] = []
        for size in sizes:
            if parts and not is_symbolic(size) and not is_symbolic(parts[-1][0]):
                parts[-1].append(size)
            else:
                parts.append([size])
        result = layers.concat(ctx, [shape_tensor(ctx, part) for part in parts], 0)
    ctx.memo[key] = result
    return result


# Tables of sizes -----------------------------------------------------------------------------------------------------


_OPAQUE = (OpaqueUnaryFn_sqrt, OpaqueUnaryFn_log2, FloatPow, RoundDecimal, *FLOAT_FUNCTIONS.values())
_BITS_OF = (BitwiseFn_bitwise_and, BitwiseFn_bitwise_or, BitwiseFn_bitwise_xor)
_ROUNDINGS = (TruncToInt, FloorToInt, CeilToInt, RoundToInt)
_FLOAT = (FloatTrueDiv, IntTrueDiv, ToFloat, sympy.Float)
_TABLE = 2**16  # sizes; TensorRT computes with the rest as it can
_FLOATS = 2**13
_PRODUCTS = 2**13  # choices of several numbers, which lie less near to a line


def _is_opaque(expr: sympy.Basic) -> bool:
    """Whether a number has a part that TensorRT computes otherwise than Python, or not at all."""
    return bool(expr.has(*_OPAQUE, *_BITS_OF))


def _table(ctx: Context, expr: sympy.Basic) -> Any:
    """A number of one size that Python computes otherwise than TensorRT, looked up for each size.

    A whole number that Python rounds a float to: `int(size / 6 * 6)` is the size, or in float32, as TensorRT computes,
    one less. A float that a function gives, which may be beyond float32 on the way: `exp(size) / exp(size - 1)`. A
    float that several operations give, which float32 rounds at each: `(size - 1) * (9 / size)`.
    """
    free = sorted(expr.free_symbols & set(ctx.symbols), key=str)
    if len(free) != 1 or not (_is_opaque(expr) or (expr.has(*_FLOAT) if expr.is_integer else rounds_often(expr))):
        return None
    sizes = ctx.symbols[free[0]].sizes
    if len(sizes) > (_TABLE if expr.is_integer else _FLOATS) or expr.free_symbols != {free[0]}:
        return None
    values = [_value(expr, {free[0]: size}) for size in sizes]
    place = _binary(ctx, EW.SUB, _SymbolLayers(ctx).get(free[0]), sizes[0])
    place = place if sizes.step == 1 else _binary(ctx, EW.FLOOR_DIV, place, sizes.step)
    if expr.is_integer or all(isinstance(value, int) for value in values):
        return _looked_up(ctx, list(map(int, values)), place)
    return layers.gather(ctx, constant(ctx, torch.tensor(values, dtype=torch.float32)), place, 0)


def _with_tables(ctx: Context, expr: sympy.Basic) -> tuple[sympy.Basic, dict[sympy.Symbol, Any]]:
    """An expression with symbols in the place of what TensorRT would round otherwise, and the numbers they stand for.

    `int((height * width) ** 0.5)` is looked up for each product. `(rows - 1) * (columns / rows)` is one quotient.
    """
    tables: dict[sympy.Symbol, Any] = {}

    def in_place_of(part: sympy.Basic, table: Any) -> sympy.Basic:
        symbol = sympy.Dummy(integer=part.is_integer, real=True)
        tables[symbol] = table
        return symbol

    def looked_up(rounded: sympy.Basic) -> sympy.Basic:
        if not rounded.free_symbols <= set(ctx.symbols) or (table := _table_of_several(ctx, rounded)) is None:
            return rounded
        return in_place_of(rounded, table)

    def of_one(part: sympy.Basic) -> sympy.Basic:
        """A number with symbols in the place of the largest parts of it that are functions of one size."""
        often = not part.is_integer and rounds_often(part)
        if not _is_opaque(part) and not often:
            return part
        if (table := _table(ctx, part)) is not None:
            return in_place_of(part, table)
        if often and (quotient := as_quotient(part, ctx.symbols)) is not None:
            return quotient
        return part.func(*map(of_one, part.args))

    if expr.has(*_ROUNDINGS):
        expr = expr.replace(lambda e: isinstance(e, _ROUNDINGS), looked_up)
    return of_one(expr), tables


def _table_of_several(ctx: Context, rounded: sympy.Basic) -> Any:
    """A whole number that Python rounds a float of several sizes to, looked up by the whole numbers that make it."""
    floats = (ToFloat, IntTrueDiv)
    whole = {arg for part in rounded.atoms(*floats) for arg in part.args if arg.is_integer and arg.free_symbols}
    numbers = {arg: sympy.Dummy(integer=True) for arg in sorted(whole, key=str)}
    inner = rounded.xreplace(numbers)
    ranges = [range(low, high + 1) for low, high in (extremes(number, ctx.symbols) for number in numbers)]
    if inner.free_symbols != set(numbers.values()) or math.prod(map(len, ranges)) > _PRODUCTS:
        if rounded.has(*_OPAQUE):
            refuse("TensorRT rounds a power or a logarithm of dynamic sizes otherwise than Python does")
        return None
    values = [int(_value(inner, dict(zip(numbers.values(), each)))) for each in itertools.product(*ranges)]
    place = constant(ctx, torch.tensor([0]))
    for number, sizes in zip(numbers, ranges, strict=True):
        digit = _binary(ctx, EW.SUB, sympy_interp(_ShapeLayers(ctx), _SymbolLayers(ctx), number), sizes[0])  # type: ignore[arg-type]
        place = _binary(ctx, EW.SUM, _binary(ctx, EW.PROD, place, len(sizes)), digit)
    return _looked_up(ctx, values, place)


def _value(expr: sympy.Basic, numbers: dict[sympy.Symbol, int]) -> Any:
    """An expression's value, and 0 where it has none: no call has such sizes."""
    try:
        value = evaluate(expr, numbers)
    except (ArithmeticError, ValueError):
        return 0
    return refuse("the power of a negative number is complex") if isinstance(value, complex) else value


_AT_ONCE = 64  # numbers in a tensor that TensorRT computes sizes with; of larger ones it knows nothing before a run
_BITS = 30  # of a number in such a table; TensorRT refuses to compute sizes with numbers above about 2 ** 53


def _looked_up(ctx: Context, values: Sequence[int], place: Any) -> Any:
    """The value at a place, which is a 1-element int64 tensor.

    Large tables are packed: what they differ by from a line takes few bits, so that many numbers fit into one.
    """
    if len(values) <= _AT_ONCE:
        return layers.gather(ctx, constant(ctx, torch.tensor(values)), place, 0)
    whole = functools.partial(_binary, ctx)
    rise, sign = abs(values[-1] - values[0]), 1 if values[-1] >= values[0] else -1
    rest = [value - sign * (rise * i // (len(values) - 1)) for i, value in enumerate(values)]
    common = math.gcd(rise, len(values) - 1)
    line = whole(EW.FLOOR_DIV, whole(EW.PROD, place, rise // common), (len(values) - 1) // common)
    line = whole(EW.SUM, whole(EW.PROD, line, sign), min(rest))
    rest = [value - min(rest) for value in rest]
    if not (bits := max(rest).bit_length()):
        return line
    each = _BITS // bits
    words = [
        sum(value << (bits * i) for i, value in enumerate(rest[first : first + each]))
        for first in range(0, len(rest), each)
    ]
    index = whole(EW.FLOOR_DIV, place, each)
    word: Any = None
    for first in range(0, len(words), _AT_ONCE):
        some = words[first : first + _AT_ONCE]
        within = whole(EW.MAX, whole(EW.MIN, whole(EW.SUB, index, first), len(some) - 1), 0)
        found = layers.gather(ctx, constant(ctx, torch.tensor(some)), within, 0)
        word = found if word is None else layers.select(ctx, whole(EW.LESS, index, first), word, found)
    shift = whole(EW.SUB, place, whole(EW.PROD, index, each))
    powers = constant(ctx, torch.tensor([1 << (bits * i) for i in range(each)]))
    above = whole(EW.FLOOR_DIV, word, layers.gather(ctx, powers, shift, 0))
    higher = whole(EW.PROD, whole(EW.FLOOR_DIV, above, 1 << bits), 1 << bits)
    return whole(EW.SUM, line, whole(EW.SUB, above, higher))


# Arithmetic on 1-element tensors -------------------------------------------------------------------------------------


def _binary(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    """One layer on two 1-element tensors, or on a tensor and a number, in the dtype that torch promotes them to.

    A size is never NaN, so a MAX or a MIN is that layer too.
    """
    kinds = [dtype_of(x) for x in (a, b) if isinstance(x, trt.ITensor)]
    dtype = torch.promote_types(kinds[0], kinds[-1])
    return layers.elementwise(ctx, op, *(_in_dtype(ctx, x, dtype) for x in (a, b)))


def _select(ctx: Context, condition: Any, a: Any, b: Any) -> Any:
    dtype = torch.promote_types(dtype_of(a), dtype_of(b))
    return layers.select(ctx, condition, *(layers.cast(ctx, x, dtype) for x in (a, b)))


def _element(ctx: Context, x: Any, index: int) -> Any:
    """One element of a 1-d tensor, as a 1-d tensor."""
    if dims(ctx, x) == (1,):
        return x
    return ctx.track(ctx.network.add_slice(x, [index], [1], [1]).get_output(0), (1,))


def _in_dtype(ctx: Context, x: Any, dtype: torch.dtype) -> Any:
    return layers.cast(ctx, x, dtype) if isinstance(x, trt.ITensor) else constant(ctx, x, dtype, 1)


class _SymbolLayers(dict):  # type: ignore[type-arg]
    """An environment for `sympy_interp` in which a symbol is the size it stands for, read off a network input."""

    def __init__(self, ctx: Context, tables: dict[sympy.Symbol, Any] | None = None) -> None:
        super().__init__(tables or {})
        self.ctx = ctx

    def get(self, symbol: sympy.Symbol, default: Any = None) -> Any:  # type: ignore[override]
        ctx = self.ctx
        if symbol not in ctx.symbols:
            return super().get(symbol, default)
        if ("size", symbol) not in ctx.memo:
            dim = ctx.symbols[symbol]
            if ("shape of", dim.input) not in ctx.memo:
                shape = ctx.network.add_shape(ctx.inputs[dim.input]).get_output(0)
                ctx.memo["shape of", dim.input] = ctx.track(layers.cast(ctx, shape, torch.int64), tuple(shape.shape))
            ctx.memo["size", symbol] = _element(ctx, ctx.memo["shape of", dim.input], dim.axis)
        return ctx.memo["size", symbol]


class _ShapeLayers:
    """The algebra of `sympy_interp` over 1-element TensorRT tensors: int64, float32 after a true division, bool."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def constant(self, value: Any, dtype: torch.dtype) -> Any:
        if dtype is torch.int64:
            return constant(self.ctx, torch.tensor([int(value)]))
        return constant(self.ctx, torch.tensor([bool(value) if dtype is torch.bool else float(value)]))

    def sym_sum(self, args: Sequence[Any]) -> Any:
        total = args[0]
        for arg in args[1:]:
            total = self.add(total, arg)
        return total

    def _layer(op: Any) -> Callable[..., Any]:  # type: ignore[misc]
        return lambda self, a, b: _binary(self.ctx, op, a, b)

    add, mul, floordiv = _layer(EW.SUM), _layer(EW.PROD), _layer(EW.FLOOR_DIV)
    minimum, maximum = _layer(EW.MIN), _layer(EW.MAX)
    eq, lt, gt = _layer(EW.EQUAL), _layer(EW.LESS), _layer(EW.GREATER)
    and_, or_, pow_by_natural = _layer(EW.AND), _layer(EW.OR), _layer(EW.POW)

    def mod(self, a: Any, b: Any) -> Any:
        return self.add(a, self.mul(self.mul(self.floordiv(a, b), b), self.constant(-1, torch.int64)))

    python_mod = mod

    def not_(self, a: Any) -> Any:
        return layers.unary(self.ctx, trt.UnaryOperation.NOT, a)

    def ne(self, a: Any, b: Any) -> Any:
        return self.not_(self.eq(a, b))

    def le(self, a: Any, b: Any) -> Any:
        return self.not_(self.gt(a, b))

    def ge(self, a: Any, b: Any) -> Any:
        return self.not_(self.lt(a, b))

    def identity(self, a: Any) -> Any:
        return a

    def to_dtype(self, a: Any, dtype: torch.dtype) -> Any:
        return layers.cast(self.ctx, a, torch.float32 if dtype.is_floating_point else torch.int64)

    def truediv(self, a: Any, b: Any) -> Any:
        a, b = (layers.cast(self.ctx, x, torch.float32) for x in (a, b))
        return _binary(self.ctx, EW.DIV, a, b)

    int_truediv = truediv

    def pow(self, a: Any, b: Any) -> Any:
        a, b = (layers.cast(self.ctx, x, torch.float32) for x in (a, b))
        return _binary(self.ctx, EW.POW, a, b)

    def sqrt(self, a: Any) -> Any:
        return layers.unary(self.ctx, trt.UnaryOperation.SQRT, layers.cast(self.ctx, a, torch.float32))

    def log2(self, a: Any) -> Any:
        log = layers.unary(self.ctx, trt.UnaryOperation.LOG, layers.cast(self.ctx, a, torch.float32))
        return _binary(self.ctx, EW.PROD, log, 1 / math.log(2))

    def abs(self, a: Any) -> Any:
        return self.maximum(a, self.mul(a, self.constant(-1, torch.int64)))

    def _function(op: Any) -> Callable[..., Any]:  # type: ignore[misc]
        return lambda self, a: layers.unary(self.ctx, op, layers.cast(self.ctx, a, torch.float32))

    exp, log = _function(trt.UnaryOperation.EXP), _function(trt.UnaryOperation.LOG)
    sin, cos = _function(trt.UnaryOperation.SIN), _function(trt.UnaryOperation.COS)

    def trunc_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return layers.cast(self.ctx, a, torch.int64)

    def floor_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return layers.cast(self.ctx, layers.unary(self.ctx, trt.UnaryOperation.FLOOR, a), torch.int64)

    def ceil_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return layers.cast(self.ctx, layers.unary(self.ctx, trt.UnaryOperation.CEIL, a), torch.int64)

    def round_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return layers.cast(self.ctx, layers.unary(self.ctx, trt.UnaryOperation.ROUND, a), torch.int64)

    def expr_cond_pair(self, value: Any, condition: Any) -> Any:
        return value, condition

    def piecewise(self, *pairs: Any) -> Any:
        result = pairs[-1][0]
        for value, condition in reversed(pairs[:-1]):
            result = _select(self.ctx, condition, value, result)
        return result

    def __getattr__(self, name: str) -> Any:
        refuse(f"the arithmetic '{name}' on a dynamic size has no TensorRT shape layers")
