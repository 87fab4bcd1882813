"""Some modules accept only some sizes of a range, such as the multiples of 32.

No range can say so. The sizes of each call are checked instead, as the module itself checks them. A claim that holds at
both ends of the range may only be of this kind if the module raises an error for sizes where the claim is false. Else
the module does something else for those sizes, and one engine cannot do both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import sympy

from torch2rt.interface import Input, Interface, with_size
from torch2rt.size_choices import choices_of, is_sampled, samples
from torch2rt.sizes import Dim, Symbols, free_symbols, truths

Sizes = Mapping[sympy.Symbol, int]
IsRefused = Callable[[Sizes], bool]


class AcceptedSizes:
    """The sizes of each range that the module accepts, by the claims added so far.

    `is_refused` says whether the module raises an error for a size. `sizes` are those of each range, or samples of a
    long range, for which all claims hold.
    """

    def __init__(self, ranges: Symbols, interface: Interface, is_refused: IsRefused) -> None:
        self.ranges, self.interface, self.is_refused = ranges, interface, is_refused
        self.sizes = {symbol: samples(dim.sizes) for symbol, dim in ranges.items()}
        self.claims: dict[sympy.Symbol, list[sympy.Basic]] = {}

    def try_add(self, claim: sympy.Basic) -> bool:
        """Add a claim if the module raises an error for the sizes where it is false; returns whether it was added."""
        free = free_symbols(claim, self.ranges)
        if len(free) != 1 or not self.interface.holds_at_opt(claim, self.ranges):
            return False
        symbol, dim = free[0], self.ranges[free[0]]
        sizes = np.array(self.sizes[symbol])
        are_true = truths(claim, {symbol: sizes})
        true, false = ([int(size) for size in sizes[which]] for which in (are_true, ~are_true))
        if dim.min in false or dim.max in false:
            return False
        some = {false[0], false[(len(false) - 1) // 2], false[-1]} if false else set()
        if not all(self.is_refused({symbol: size}) for size in sorted(some)):
            return False
        if false or is_sampled(dim.sizes):  # else the claims before this one say it already
            self.claims.setdefault(symbol, []).append(claim)
        self.sizes[symbol] = true
        return True

    def constrained(self) -> Interface:
        """The interface that checks every call for the claims that were taken."""
        interface = self.interface
        for symbol, claims in self.claims.items():
            dim, sizes = self.ranges[symbol], self.sizes[symbol]
            step = math.gcd(*sizes)
            exact = not is_sampled(dim.sizes) and sizes == list(range(sizes[0], sizes[-1] + 1, step))
            text = f"{dim} to be a multiple of {step}" if exact else None
            interface = interface.constrained(sympy.And(*claims), self.ranges, text)
        return interface


def impossible_end(claim: sympy.Basic, ranges: Symbols) -> dict[Dim, int]:
    """An end of a range for which a relation is false whatever the other sizes are: the range promises too much."""
    choices = choices_of(ranges, claim)
    true = truths(claim, choices.sizes)
    for symbol, sizes in choices.sizes.items():
        for end in (ranges[symbol].min, ranges[symbol].max):
            if not np.any(true & (sizes == end)):
                return {ranges[symbol]: end}
    return {}


def narrowed(spec: Input, dim: Dim) -> Input:
    """An input whose dimension has the range that the dimensions it is tied to leave of its own."""

    axis = dim.axis
    opt, *others = (with_size(shape, axis, min(max(shape[axis], dim.min), dim.max)) for shape in spec.opts)
    low, high = with_size(spec.min, axis, dim.min), with_size(spec.max, axis, dim.max)
    return dataclasses.replace(spec, min=low, opt=opt, max=high, others=tuple(others))
