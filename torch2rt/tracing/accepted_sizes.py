"""Sizes between others that a module refuses, such as all but the multiples of 32.

No range can say them, so calls are checked for them, as the module itself does. A claim that holds at both ends of the
range may only be of this kind if the module raises an error for sizes where it is false: else it does something else
there, and one engine cannot do both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import sympy

from torch2rt.interface import Interface
from torch2rt.sizes import Symbols, free_symbols, is_sampled, samples, truths

Sizes = Mapping[sympy.Symbol, int]
IsRefused = Callable[[Sizes], bool]


class Steps:
    """What is claimed of single sizes and ends in an error of the module where it is false.

    `is_refused` says whether the module raises one with a size. `left` are the sizes of each range, or samples of a
    long one, for which the claims taken so far hold.
    """

    def __init__(self, ranges: Symbols, interface: Interface, is_refused: IsRefused) -> None:
        self.ranges, self.interface, self.is_refused = ranges, interface, is_refused
        self.left = {symbol: samples(dim.sizes) for symbol, dim in ranges.items()}
        self.claims: dict[sympy.Symbol, list[sympy.Basic]] = {}

    def take(self, claim: sympy.Basic) -> bool:
        """Take a claim, if it is of this kind; whether it is."""
        free = free_symbols(claim, self.ranges)
        if len(free) != 1 or not self.interface.holds_at_opt(claim, self.ranges):
            return False
        symbol, dim = free[0], self.ranges[free[0]]
        are_true = truths(claim, {symbol: np.array(self.left[symbol])})
        true, false = ([int(size) for size in np.array(self.left[symbol])[which]] for which in (are_true, ~are_true))
        if dim.min in false or dim.max in false:
            return False
        some = {false[0], false[(len(false) - 1) // 2], false[-1]} if false else set()
        if not all(self.is_refused({symbol: size}) for size in sorted(some)):
            return False
        if false or is_sampled(dim.sizes):  # else those before say it already
            self.claims.setdefault(symbol, []).append(claim)
        self.left[symbol] = true
        return True

    def constrained(self) -> Interface:
        """The interface that checks every call for the claims that were taken."""
        interface = self.interface
        for symbol, claims in self.claims.items():
            dim, left = self.ranges[symbol], self.left[symbol]
            step = math.gcd(*left)
            exact = not is_sampled(dim.sizes) and left == list(range(left[0], left[-1] + 1, step))
            text = f"{dim} to be a multiple of {step}" if exact else None
            interface = interface.constrained(sympy.And(*claims), self.ranges, text)
        return interface
