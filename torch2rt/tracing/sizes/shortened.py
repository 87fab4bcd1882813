"""Sizes in as few terms as possible.

A network that pads to a multiple and crops, layer after layer, makes sizes of sizes: rounded, cropped, halved, rounded
again. Written out, the size of the last layer has thousands of terms, and torch needs minutes to reason about them. But
a dynamic dimension has only so many sizes, so that it can be seen what an expression of it comes to: the size that was
padded and cropped is the size itself, and `7 * ceil(h / 7) % 7` is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import sympy
from torch.utils._sympy.functions import FloorDiv

from torch2rt.size_choices import is_sampled
from torch2rt.sizes import Dim, to_json, truths, values_at

_PLAIN = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Symbol, sympy.Integer)


class ShortSizes:
    """Rewrites expressions of dynamic sizes.

    `symbols` are the dimensions, of which every size is looked at; what depends on several dimensions at once is only
    rewritten in its parts that depend on one.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, Dim]) -> None:
        self.symbols = symbols
        self._short: dict[sympy.Basic, sympy.Basic] = {}
        self._by_values: dict[tuple[sympy.Symbol, bytes], sympy.Basic] = {}
        self._sizes: dict[sympy.Symbol, np.ndarray] = {}  # where not all of a dimension

    def know(self, claim: sympy.Basic) -> bool:
        """Look only at sizes for which an equality is true, as the trace is for no others; whether it leaves some out.

        A module that has found a size to be even divides it by its half, say, to get 2.
        """
        if len(claim.free_symbols) != 1 or not claim.free_symbols <= self.symbols.keys():
            return False
        (symbol,) = claim.free_symbols
        if is_sampled(self.symbols[symbol].sizes):
            return False
        sizes = self._sizes_of(symbol)
        true = truths(claim, {symbol: sizes})
        if true.all() or not true.any():
            return False
        self._sizes[symbol] = sizes[true]
        self._short = {expr: short for expr, short in self._short.items() if symbol not in expr.free_symbols}
        self._by_values = {key: short for key, short in self._by_values.items() if key[0] != symbol}
        return True

    def _sizes_of(self, symbol: sympy.Symbol) -> np.ndarray:
        return self._sizes[symbol] if symbol in self._sizes else np.array(self.symbols[symbol].sizes)

    def shortened(self, expr: sympy.Basic) -> sympy.Basic:
        """An expression with the same values for all sizes that are served, in fewer terms where there is one."""
        if expr.is_Atom:
            return expr
        found = self._short.get(expr)
        if found is None:
            found = self._short[expr] = self._shortened(expr)
        return found

    def _shortened(self, expr: sympy.Basic) -> sympy.Basic:
        if _is_plain(expr) or not expr.free_symbols:
            return expr
        if len(symbols := expr.free_symbols) == 1:
            (symbol,) = symbols
            return self._of_one(expr, symbol) if symbol in self.symbols and expr.is_integer else expr
        if isinstance(expr, (sympy.Add, sympy.Mul)):  # what depends on the same dimension is looked at together
            groups: dict[frozenset[sympy.Symbol], list[sympy.Basic]] = {}
            for arg in expr.args:
                groups.setdefault(frozenset(arg.free_symbols), []).append(arg)
            parts = [
                self.shortened(expr.func(*args)) if len(groups) > 1 else expr.func(*map(self.shortened, args))
                for args in groups.values()
            ]
            return expr if parts == list(expr.args) else sympy.expand(expr.func(*parts))
        args = [self.shortened(arg) for arg in expr.args]
        return expr if args == list(expr.args) else expr.func(*args)

    def _of_one(self, expr: sympy.Basic, symbol: sympy.Symbol) -> sympy.Basic:
        """An expression of one dimension."""
        dim = self.symbols[symbol]
        if is_sampled(dim.sizes):
            return expr
        sizes = self._sizes_of(symbol)
        values = values_at(to_json(expr, {symbol: Dim(0, "", 0, 0, 0)}), [[sizes]], len(sizes))
        if values is None:
            return expr
        values = values.astype(np.int64)
        key = symbol, values.tobytes()
        known = self._by_values.get(key)
        if known is None:
            if symbol in self._sizes:
                known = _linear(values, symbol, sizes)
            else:
                known = _rounded_once(values, symbol, dim)
        if known is None or _terms(known) > _terms(expr):
            known = expr
        return self._by_values.setdefault(key, known)


def _is_plain(expr: sympy.Basic) -> bool:
    """Whether an expression is a polynomial."""
    return isinstance(expr, _PLAIN) and all(map(_is_plain, expr.args))


def _terms(expr: sympy.Basic) -> int:
    return sum(1 for _ in itertools.islice(sympy.preorder_traversal(expr), 1000))


def _linear(values: np.ndarray, symbol: sympy.Symbol, sizes: np.ndarray) -> sympy.Basic | None:
    """`slope * size + offset` with these values at some sizes of a dimension."""
    first, size = int(values[0]), int(sizes[0])
    if (values == first).all():
        return sympy.Integer(first)
    slope = sympy.Rational(int(values[-1]) - first, int(sizes[-1]) - size)
    if (slope.q * (values - first) != slope.p * (sizes - size)).any():
        return None
    return FloorDiv(slope.p * symbol + slope.q * first - slope.p * size, sympy.Integer(slope.q))


def _rounded_once(values: np.ndarray, symbol: sympy.Symbol, dim: Dim) -> sympy.Basic | None:
    """`factor * ((size + shift) // step) + offset` with these values at all sizes of a dimension, or a simpler form."""
    first, steps = int(values[0]), np.diff(values)
    if not steps.any():
        return sympy.Integer(first)
    if (steps == steps[0]).all():
        slope = sympy.Rational(int(steps[0]), dim.step)
        offset = first - slope * dim.min
        if slope.q == 1:
            return slope * symbol + offset
        return FloorDiv(slope.p * symbol + offset * slope.q, sympy.Integer(slope.q))
    jumps = np.flatnonzero(steps)
    rises = steps[jumps]
    if dim.step > 1 or (rises != rises[0]).any():
        return None
    before, after = int(jumps[0]) + 1, len(values) - 1 - int(jumps[-1])
    step = int(jumps[1] - jumps[0]) if len(jumps) > 1 else max(before, after)
    factor = int(rises[0])
    shift = -(dim.min + int(jumps[0]) + 1) % step
    sizes = np.array(dim.sizes)
    rounded = factor * ((sizes + shift) // step)
    offset = first - int(rounded[0])
    if not (rounded + offset == values).all():
        return None
    return factor * FloorDiv(symbol + shift, sympy.Integer(step)) + offset
