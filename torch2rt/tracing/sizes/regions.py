"""Regions: for which sizes of a range one path through a module's Python is right, and the sizes to look at."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import sympy
import torch

from torch2rt.graph import Decision, GraphMeta, graph_meta
from torch2rt.interface import Input, Shape
from torch2rt.promises import Promise
from torch2rt.size_choices import ENUMERATE, choices_of, combined, counterexample, is_sampled, samples
from torch2rt.sizes import Dim, describe, to_json, truths, values_at

DRAWN = 1 << 14  # more choices of sizes, where not all are looked at
MOST_NAMED = 6  # numbers in claims that are looked at for each dimension
SHOWN = 4  # of the claims of a region, and of sizes, in a text
Symbol: TypeAlias = sympy.Symbol


@dataclasses.dataclass
class Region:
    """The sizes for which one path is right: where its claims are true and its fixed sizes are met.

    `lines` are the user's lines that asked, `graph` is what was traced there.
    """

    graph: torch.fx.GraphModule
    claims: list[sympy.Basic]
    fixed: dict[Symbol, int]
    lines: list[str]
    ties: list[tuple[Symbol, Symbol]]

    def all_claims(self) -> list[sympy.Basic]:
        return [*self.claims, *(sympy.Eq(symbol, size, evaluate=False) for symbol, size in self.fixed.items())]


@dataclasses.dataclass
class Variant:
    """A graph and the regions that it serves: its own is the first.

    - `graph`: its interface takes exactly the sizes of the regions, as far as the module accepts them.
    - `text`: the regions in the user's terms. `line`: the user's line that split the range.
    - `notes`: how it is known that the graph is right for regions other than its own.
    """

    graph: torch.fx.GraphModule
    regions: list[Region]
    text: str = ""
    line: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


IsSame = Callable[[Region, Region, "Space"], str | None]


class Space:
    """The sizes to serve, as points: all choices of sizes for the dimensions that claims are about, or an even spread.

    `listed` gives the points, where only some shapes are to be served.
    """

    def __init__(self, specs: Sequence[Input], listed: Sequence[Sequence[Shape]] | None = None) -> None:
        self.specs, self.listed = list(specs), listed
        dims = [spec.dim(i, axis) for i, spec in enumerate(specs) for axis in spec.dynamic]
        self.symbols = {symbol_of(dim): dim for dim in dims}
        self.opt = {symbol: specs[dim.input].opt[dim.axis] for symbol, dim in self.symbols.items()}
        self.sizes: dict[Symbol, np.ndarray] = {}
        self.are_all = True
        self._where: dict[sympy.Basic, np.ndarray] = {}
        self.look_at([])

    def look_at(self, claims: Sequence[sympy.Basic]) -> None:
        """Choose the points that show where these claims are true."""
        self._where = {}
        if self.listed is not None:
            found = [[shapes[d.input][d.axis] for shapes in self.listed] for d in self.symbols.values()]
            self.sizes = {symbol: np.array(sizes) for symbol, sizes in zip(self.symbols, found)}
            return
        if not any(claim.free_symbols for claim in claims):
            return
        choices = choices_of(self.symbols, *claims)
        self.sizes, self.are_all = dict(choices.sizes), choices.are_all
        if not choices.are_all:
            self.sizes = self._spread(claims)
        self._keep_promises()

    def _spread(self, claims: Sequence[sympy.Basic]) -> dict[Symbol, np.ndarray]:
        """A grid of sizes and drawn ones, with those that the claims name, and their neighbours."""
        generator, grid = np.random.default_rng(0), []
        dims = [self.symbols[symbol] for symbol in self.sizes]
        count = math.floor(ENUMERATE ** (1 / len(dims)))
        for symbol, dim in zip(self.sizes, dims, strict=True):
            of_dim = [claim for claim in claims if symbol in claim.free_symbols]
            named = {int(number) for claim in of_dim for number in claim.atoms(sympy.Integer)}
            near = {number + i for number in sorted(named)[-MOST_NAMED:] for i in (-1, 0, 1)} | {self.opt[symbol]}
            grid.append(sorted({*samples(dim.sizes, count), *near.intersection(dim.sizes)}))
        points = combined([np.array(sizes) for sizes in grid])
        drawn = [generator.choice(dim.sizes, DRAWN) for dim in dims]
        return {s: np.concatenate(each) for s, *each in zip(self.sizes, points, drawn, strict=True)}

    def _keep_promises(self) -> None:
        """Let sizes with a common root depend on each other at all points as they do at calls."""
        within = self.where([])
        first: dict[str, tuple[np.ndarray, Promise]] = {}
        for symbol, sizes in self.sizes.items():
            dim = self.symbols[symbol]
            for promise in (p for p in self.specs[dim.input].promises if p.axis == dim.axis):
                other, one = first.setdefault(promise.root, (sizes, promise))
                sizes = (other - one.offset) // one.factor * promise.factor + promise.offset
                self.sizes[symbol] = sizes
                within &= (dim.min <= sizes) & (sizes <= dim.max)
        self.sizes = {symbol: sizes[within] for symbol, sizes in self.sizes.items()}

    def where(self, claims: Sequence[sympy.Basic]) -> np.ndarray:
        """At which points all claims are true."""
        count = len(next(iter(self.sizes.values()))) if self.sizes else 1
        result = np.ones(count, bool)
        for claim in claims:
            if claim not in self._where:
                self._where[claim] = truths(claim, self.sizes) if claim.free_symbols else np.full(count, bool(claim))
            result = result & self._where[claim]
        return result

    def values(self, size: sympy.Basic) -> np.ndarray | None:
        """What a size is at the points; `None` where it has no whole number at some."""
        if not size.free_symbols <= self.sizes.keys():
            return None
        order = list(self.sizes)
        tree = to_json(size, {symbol: Dim(0, "", axis, 0, 0) for axis, symbol in enumerate(order)})
        return values_at(tree, [[self.sizes[symbol] for symbol in order]], len(self.where([])))

    def where_any(self, parts: Sequence[Sequence[sympy.Basic]]) -> np.ndarray:
        """At which points all claims of one of several lists are true."""
        return functools.reduce(operator.or_, map(self.where, parts), np.zeros_like(self.where([])))

    def ends(self, claims: Sequence[sympy.Basic]) -> dict[Symbol, tuple[int, int]]:
        """The smallest and largest size of each dimension at which the claims about it alone are true."""
        found = {symbol: self._meeting(symbol, claims) for symbol in self.symbols}
        return {s: (int(sizes[0]), int(sizes[-1])) for s, sizes in found.items() if len(sizes)} | {
            s: (self.symbols[s].min, self.symbols[s].max) for s, sizes in found.items() if not len(sizes)
        }

    def needing(self, region: Region) -> Region:
        """A region without the claims that those about one dimension alone imply."""
        symbols = {s: self.symbols[s].between(*ends) for s, ends in self.ends(region.all_claims()).items()}
        needed = [c for c in region.claims if len(c.free_symbols) < 2 or counterexample(c, symbols) is not None]
        return dataclasses.replace(region, claims=needed)

    def _meeting(self, symbol: Symbol, claims: Sequence[sympy.Basic]) -> np.ndarray:
        """The sizes of a dimension for which the claims about it alone are true; its ends if there are too many."""
        dim = self.symbols[symbol]
        if is_sampled(dim.sizes):
            return np.array([dim.min, dim.max])
        sizes = np.array(dim.sizes)
        for claim in claims:
            if claim.free_symbols == {symbol}:
                sizes = sizes[truths(claim, {symbol: sizes})]
        return sizes

    def text(self, claims: Sequence[sympy.Basic]) -> str:
        """Claims in the user's terms; those that say which sizes of one dimension, from one to another, in that way."""
        words: list[str] = []
        said: set[Symbol] = set()
        for claim in claims:
            symbol = next(iter(claim.free_symbols)) if len(claim.free_symbols) == 1 else None
            interval = None if symbol not in self.symbols else self._interval(symbol, claims)
            if interval is None:
                words.append(describe(shortened(claim), self.symbols))
            elif symbol not in said:
                words.append(interval)
                said.add(symbol)
        words = list(dict.fromkeys(words))
        return " and ".join([*words[:SHOWN], *["..."] * (len(words) > SHOWN)]) or "every size"

    def _interval(self, symbol: Symbol, claims: Sequence[sympy.Basic]) -> str | None:
        """The claims about one dimension as bounds, where they say no more than these."""
        dim = self.symbols[symbol]
        sizes = self._meeting(symbol, claims)
        if is_sampled(dim.sizes) or not len(sizes) or len(sizes) - 1 != (sizes[-1] - sizes[0]) // dim.step:
            return None
        low, high = int(sizes[0]), int(sizes[-1])
        if low == high:
            return f"{dim} == {low}"
        if low == dim.min or high == dim.max:
            return f"{dim} <= {high}" if low == dim.min else f"{dim} >= {low}"
        return f"{low} <= {dim} <= {high}"


def shortened(claim: sympy.Basic) -> sympy.Basic:
    """A comparison for a text: `4*x*y + 8 <= 4*x*y + 4*x` is `x >= 2`; others, and those it does not shorten, as is."""
    if not isinstance(claim, sympy.core.relational.Relational):
        return claim
    _, difference = sympy.expand(claim.lhs - claim.rhs).as_content_primitive()
    number, rest = difference.as_independent(*claim.free_symbols, as_Add=True)
    short = claim.func(rest, -number, evaluate=False)
    if rest.could_extract_minus_sign():
        short = claim.reversed.func(-rest, number, evaluate=False)
    return short if len(str(short)) < len(str(claim)) else claim


def symbol_of(dim: Dim) -> Symbol:
    """The symbol of a dimension in claims of several traces."""
    return Symbol(f"d{dim.input}_{dim.axis}", integer=True)


def not_empty(specs: Sequence[Input]) -> list[Input]:
    """The inputs without the sizes of 0 among others: a trace for these has a static size."""
    ends = [[tuple(max(1, x) if a in s.dynamic else x for a, x in enumerate(e)) for e in (s.min, s.opt)] for s in specs]
    return [dataclasses.replace(spec, min=low, opt=opt) for spec, (low, opt) in zip(specs, ends, strict=True)]


def region_of(graph: torch.fx.GraphModule, specs: Sequence[Input], whole: Sequence[Input]) -> Region:
    """The region of a graph that was traced with these ranges, as a part of the whole range."""
    meta = graph_meta(graph)
    names = {symbol: symbol_of(dim) for symbol, dim in meta.symbols.items()}
    decisions = [split.decision for split in meta.splits]
    decisions += false_assumptions(meta)
    claims = {decision.claim.xreplace(names): decision.place for decision in decisions}
    fixed = {
        symbol_of(Dim(i, spec.name, axis, 0, 0)): spec.min[axis]
        for i, spec in enumerate(specs)
        for axis in whole[i].dynamic
        if axis not in spec.dynamic
    }
    for i, spec in enumerate(whole):  # torch takes every dynamic size for larger than 0
        for axis in spec.dynamic:
            symbol = symbol_of(Dim(i, spec.name, axis, 0, 0))
            if not spec.min[axis] and symbol not in fixed:
                claims[sympy.Ge(symbol, 1)] = ""
    lines = list(dict.fromkeys(place for place in claims.values() if ":" in place))
    return Region(graph, list(claims), fixed, lines, _ties(meta, list(claims)))


def false_assumptions(meta: GraphMeta) -> list[Decision]:
    """The claims that torch took for granted which are false somewhere in the range."""
    return [d for d in meta.assumed.decisions if isinstance(counterexample(d.claim, meta.assumed.ranges), dict)]


def _ties(meta: GraphMeta, claims: Sequence[sympy.Basic]) -> list[tuple[Symbol, Symbol]]:
    """Dimensions that must be equal, by claims or by what calls are checked for."""
    found = [claim.args for claim in claims if isinstance(claim, sympy.Eq) and all(a.is_Symbol for a in claim.args)]
    for relation, _ in meta.interface.constraints:
        if relation[0] == "eq" and all(isinstance(side, list) and side[0] == "dim" for side in relation[1:]):
            found.append(tuple(symbol_of(Dim(side[1], "", side[2], 0, 0)) for side in relation[1:]))
    return found


def with_ties(sizes: Mapping[Symbol, int], ties: Sequence[tuple[Symbol, Symbol]]) -> dict[Symbol, int]:
    """Sizes with those of the dimensions that must equal them."""
    sizes = dict(sizes)
    for _ in ties:
        for left, right in ties:
            for one, other in ((left, right), (right, left)):
                if one in sizes and other not in sizes:
                    sizes[other] = sizes[one]
    return sizes


def claims_of(regions: Sequence[Region]) -> list[list[sympy.Basic]]:
    return [region.all_claims() for region in regions]


def distinct_claims(regions: Sequence[Region]) -> list[sympy.Basic]:
    """The claims of some regions, each once."""
    return list(dict.fromkeys(claim for region in regions for claim in region.all_claims()))
