"""Sizes between others that a module refuses, such as all but the multiples of 32.

No range can say them, so calls are checked for them, as the module itself does. A claim that holds at both ends of the
range may only be of this kind if the module raises an error for sizes where it is false: else it does something else
there, and one engine cannot do both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy

from torch2rt.interface import Interface
from torch2rt.symbolic import ENUMERATE, Symbols, holds, samples

IsRefused = Callable[[sympy.Symbol, int], bool]
Claims = dict[sympy.Symbol, list[sympy.Basic]]


class Steps:
    """What is claimed of single sizes and ends in an error of the module where it is false.

    `is_refused` says whether the module raises one with a size; `claims` are known to be of this kind.
    """

    def __init__(
        self, ranges: Symbols, interface: Interface, is_refused: IsRefused, claims: Claims | None = None
    ) -> None:  # fmt: skip
        self.ranges, self.interface, self.is_refused = ranges, interface, is_refused
        self.claims: Claims = claims or {}

    def take(self, claim: sympy.Basic) -> bool:
        """Take a claim, if it is of this kind; whether it is."""
        free = list(claim.free_symbols & set(self.ranges))
        if len(free) != 1 or not self.interface.holds_at_opt(claim, self.ranges):
            return False
        symbol, dim = free[0], self.ranges[free[0]]
        left = [size for size in samples(range(dim.min, dim.max + 1)) if self._are_met(symbol, size)]
        false = [size for size in left if not holds(claim, {symbol: size})]
        if dim.min in false or dim.max in false:
            return False
        some = {false[i * (len(false) - 1) // 2] for i in range(3)} if false else set()
        if not all(self.is_refused(symbol, size) for size in sorted(some)):
            return False
        if false or dim.max - dim.min >= ENUMERATE:  # else those before say it already
            self.claims.setdefault(symbol, []).append(claim)
        return True

    def constrain(self) -> None:
        """Have every call checked."""
        for symbol, claims in self.claims.items():
            dim = self.ranges[symbol]
            met = [size for size in samples(range(dim.min, dim.max + 1)) if self._are_met(symbol, size)]
            step = math.gcd(*met)
            exact = met == list(range(met[0], met[-1] + 1, step))
            text = f"{dim} to be a multiple of {step}" if exact else None
            self.interface.constrain(sympy.And(*claims), self.ranges, text)

    def _are_met(self, symbol: sympy.Symbol, size: int) -> bool:
        return all(holds(claim, {symbol: size}) for claim in self.claims.get(symbol, []))
