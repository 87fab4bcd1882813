"""Which sizes of dynamic dimensions to look at, to say of a claim or an expression what is true of all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import sympy
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torch2rt.sizes import Dim, Symbols, Vectors, evaluate_json, free_symbols, to_json, truths


def extremes(expr: sympy.Basic, symbols: Symbols) -> tuple[int, int]:
    """The smallest and the largest value of a size; bounds of them where there are too many choices to look at all."""
    choices = choices_of(symbols, expr)
    if choices.are_all and len(choices.sizes) > 0:
        order = list(choices.sizes)
        tree = to_json(expr, {symbol: Dim(0, "", axis, 0, 0) for axis, symbol in enumerate(order)})
        try:
            values = np.asarray(evaluate_json(tree, [[choices.sizes[s] for s in order]], Vectors()))
        except (OverflowError, ValueError, TypeError):
            pass
        else:
            return int(values.min()), int(values.max())
    bounds = bound_sympy(expr, {s: ValueRanges(symbols[s].min, symbols[s].max) for s in free_symbols(expr, symbols)})
    return int(bounds.lower), int(bounds.upper)


ENUMERATE = 1 << 16  # choices of sizes that are all looked at; of more, so many


DRAWN = 1 << 12  # choices that are drawn where the combinations of a few sizes of each dimension are too many


class Choices:
    """All choices of sizes for some dimensions, or an even spread of them, with both ends and their neighbours."""

    def __init__(self, dims: Sequence[tuple[sympy.Symbol, Dim]]) -> None:
        ranges = [dim.sizes for _, dim in dims]
        self.are_all = math.prod(map(len, ranges)) <= ENUMERATE
        count = ENUMERATE if self.are_all else math.floor(ENUMERATE ** (1 / len(ranges)))
        points = combined([np.array(samples(sizes, count)) for sizes in ranges])
        self.sizes = {symbol: sizes for (symbol, _), sizes in zip(dims, points, strict=True)}

    def at(self, index: int) -> dict[sympy.Symbol, int]:
        """One of them."""
        return {symbol: int(sizes[index]) for symbol, sizes in self.sizes.items()}


_choices = functools.lru_cache(maxsize=8)(Choices)


def choices_of(symbols: Symbols, *claims: sympy.Basic) -> Choices:
    """The choices of sizes for the dimensions that some claims are about."""
    free = dict.fromkeys(symbol for claim in claims for symbol in free_symbols(claim, symbols))
    return _choices(tuple((symbol, symbols[symbol]) for symbol in free))


def counterexample(claim: sympy.Basic, symbols: Symbols) -> dict[Dim, int] | bool | None:
    """Sizes inside the served ranges for which a claim is false.

    `None` when the claim is proven for every size; `True` when it is neither proven nor refuted.
    """
    if claim in (sympy.true, True):
        return None
    free = free_symbols(claim, symbols)
    if not free:
        return True
    choices = choices_of(symbols, claim)
    false = np.flatnonzero(~truths(claim, choices.sizes))
    if len(false):
        return {symbols[s]: size for s, size in choices.at(false[0]).items()}
    if choices.are_all:
        return None
    try:
        proven = bound_sympy(claim, {s: ValueRanges(symbols[s].min, symbols[s].max) for s in free})
    except (NotImplementedError, AssertionError, TypeError, AttributeError):
        return True  # torch's range analysis does not know this operation
    return None if proven.is_singleton() and proven.lower in (sympy.true, True) else True


def is_sampled(sizes: range, count: int = ENUMERATE) -> bool:
    """Whether `samples` are not all."""
    return len(sizes) > count


def samples(sizes: range, count: int = ENUMERATE) -> list[int]:
    """All, or about so many: both ends, their neighbours, and an even spread between."""
    if not is_sampled(sizes, count):
        return list(sizes)
    step = max(1, len(sizes) // max(1, count - 6))
    return sorted({*sizes[:3], *sizes[-3:], *sizes[::step]})


def combined(axes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """All combinations of some sizes of each dimension; where they are too many, both ends and drawn ones."""
    if math.prod(map(len, axes)) <= 16 * ENUMERATE:
        return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
    generator = np.random.default_rng(0)
    return [np.concatenate([axis[[0, -1]], generator.choice(axis, DRAWN)]) for axis in axes]
