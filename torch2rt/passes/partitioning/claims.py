"""What must be true of sizes that depend on values: without what always is, and in the shortest words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import sympy
from torch.utils._sympy.functions import Min
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torch2rt.size_choices import choices_of
from torch2rt.sizes import Dim, truths

TRIED = 4096  # as large as a size may be that has no bound
Ranges = Mapping[sympy.Symbol, tuple[int, int | None]]


def shortened(claims: Iterable[sympy.Basic], ranges: Ranges) -> list[sympy.Basic]:
    """The claims that some sizes in these ranges make false, each once; the largest size may be `None`, for any.

    >>> rows = sympy.Symbol("rows", integer=True)
    >>> claims = [rows >= 0, Min(rows, 150) <= rows, sympy.Ne(Min(rows, 150), 0), Min(rows, 150) > 0]
    >>> shortened(claims, {rows: (0, None)})
    [rows >= 1]
    """
    known = {s: ValueRanges(low, int_oo if high is None else max(low, high)) for s, (low, high) in ranges.items()}
    return list(dict.fromkeys(part for claim in claims for part in _parts(claim, known)))


def in_short(claim: sympy.Basic, ranges: Ranges) -> sympy.Basic | None:
    """A claim for people to read: `None` if no size that is tried makes it false, `rows >= 1` if only 0 does.

    >>> rows = sympy.Symbol("rows", integer=True)
    >>> in_short(3 * Min(rows, 4) >= Min(rows, 4) + 1, {rows: (0, None)})
    rows >= 1
    """
    dims = {s: Dim(0, str(s), 0, low, TRIED if high is None else max(low, high)) for s, (low, high) in ranges.items()}
    choices = choices_of(dims, claim)
    true = truths(claim, choices.sizes)
    if true.all():
        return None
    for symbol, sizes in choices.sizes.items():
        if ((sizes >= 1) == true).all():
            return sympy.Ge(symbol, 1, evaluate=False)
    return claim


def _parts(claim: sympy.Basic, known: Mapping[sympy.Symbol, ValueRanges]) -> Iterator[sympy.Basic]:
    """A claim as those that it consists of."""
    if _always(claim, known):
        return
    if isinstance(claim, sympy.And):
        for part in claim.args:
            yield from _parts(part, known)
    elif (counted := _positive(claim, known)) is None:
        yield claim
    elif isinstance(counted, Min):
        for part in counted.args:
            yield from _parts(sympy.Ge(part, 1, evaluate=False), known)
    else:
        yield sympy.Ge(counted, 1, evaluate=False)


def _positive(claim: sympy.Basic, known: Mapping[sympy.Symbol, ValueRanges]) -> sympy.Basic | None:
    """The size of which a claim says no more than that it is not 0."""
    if not isinstance(claim, (sympy.Ne, sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)):
        return None
    large, small, is_strict = claim.lhs, claim.rhs, isinstance(claim, (sympy.Gt, sympy.Lt))
    if isinstance(claim, (sympy.Lt, sympy.Le)) or isinstance(claim, sympy.Ne) and large == 0:
        large, small = small, large
    least = 0 if is_strict or isinstance(claim, sympy.Ne) else 1
    is_about_zero = small == least and large.is_integer and _always(sympy.Ge(large, 0, evaluate=False), known)
    return large if is_about_zero else None


def _always(claim: sympy.Basic, known: Mapping[sympy.Symbol, ValueRanges]) -> bool:
    """Whether a claim is known to be true of all sizes."""
    if claim in (sympy.true, True) or not claim.free_symbols <= known.keys():
        return claim in (sympy.true, True)
    if isinstance(claim, (sympy.Gt, sympy.Ge)):
        return _always(claim.reversed, known)
    if isinstance(claim, (sympy.Lt, sympy.Le)):
        parts = [claim.func(part, claim.rhs) for part in claim.lhs.args if isinstance(claim.lhs, Min)]
        if any(_always(part, known) for part in parts):
            return True
    try:
        proven = bound_sympy(claim, known)
    except (NotImplementedError, AssertionError, TypeError):
        return False  # torch's range analysis does not know this operation
    return bool(proven.is_singleton() and proven.lower in (sympy.true, True))
