"""Cover a range of sizes with traces, where one trace is right for only a part of it.

A trace is one path through a module's Python. Its claims about sizes say for which sizes the module takes that path:
these are the path's region. `cover` traces again at sizes that no region has, until none are left but such as the
module itself refuses. Paths that compute the same become one variant.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import sympy
import torch

from torch2rt.errors import TraceError
from torch2rt.graph import graph_meta
from torch2rt.interface import Input, Shape
from torch2rt.sizes import describe
from torch2rt.tracing.sizes.regions import (
    IsSame,
    Region,
    Space,
    Symbol,
    Variant,
    claims_of,
    distinct_claims,
    not_empty,
    region_of,
    with_ties,
)
from torch2rt.tracing.sizes.served_sizes import restrict

MAX_VARIANTS = 8
MOST_TRACES = 4  # for each variant that may be, as several paths may compute the same


class Traces(Protocol):
    """What traces the module: `torch2rt.tracing.trace.Traces`."""

    specs: list[Input]

    def at(self, specs: Sequence[Input], shapes: Sequence[Shape]) -> torch.fx.GraphModule: ...

    def accepts(self, shapes: Sequence[Shape]) -> bool: ...


# Covering -------------------------------------------------------------------------------------------------------------


def cover(
    traces: Traces,
    first: Sequence[torch.fx.GraphModule],
    max_variants: int = MAX_VARIANTS,
    same: Sequence[IsSame] = (),
    listed: Sequence[Sequence[Shape]] | None = None,
) -> list[Variant]:
    """The variants that serve a range together; `first` are graphs of the whole range that are right for parts of it.

    `same` says how one region's graph is known to be right in another region, in words; `None` if it is not. Raises
    `TraceError` where there are more than `max_variants`, and where the module raises errors at an end of the range.
    """
    space = Space(traces.specs, listed)
    regions = [space.needing(region_of(graph, space.specs, space.specs)) for graph in first]
    space.look_at(distinct_claims(regions))
    regions = sorted(regions, key=lambda region: -int(space.where(region.all_claims()).sum()))[:1]
    variants = [Variant(region.graph, [region]) for region in regions]
    refused: list[list[sympy.Basic]] = []  # by the module: each the claims that are true there
    while True:
        claims = distinct_claims(regions)
        space.look_at(claims)
        left = ~space.where_any([*claims_of(regions), *refused])
        if not left.any():
            break
        cell, points = _cell(space, claims, left)
        region = _trace_in(traces, space, cell, points, [tie for region in regions for tie in region.ties])
        if region is None:
            refused += [cell] if space.where(cell)[points].all() else [_at(space, p) for p in points[:64]]
            continue
        space.look_at([*claims, *region.all_claims()])
        before, here = (space.where_any(claims_of(part)) for part in (regions, [region]))
        if not (here & ~before).any():
            raise TraceError(f"The module takes another path at each of two traces for {space.text(cell)}.")
        regions.append(region)
        _add(variants, region, space, same)
        is_hopeless = len(variants) > 2 and _needs_more(
            traces, space, variants, ~space.where_any(refused), max_variants
        )
        if len(variants) > max_variants or len(regions) > MOST_TRACES * max_variants or is_hopeless:
            raise _too_many(variants, space, max_variants)
    _check_ends(space, regions, space.where_any(refused))
    for variant in variants:
        _finish(traces, space, variant, regions)
    return variants


def _add(variants: list[Variant], region: Region, space: Space, same: Sequence[IsSame]) -> None:
    """Add a region to a variant that is right there, or as a variant of its own, which may be right for others."""
    for variant in variants:
        if (how := _how(variant.regions[0], region, space, same)) is not None:
            variant.regions.append(region)
            variant.notes.append(how)
            return
    added = Variant(region.graph, [region])
    for variant in list(variants):
        found = [_how(region, other, space, same) for other in variant.regions]
        if all(how is not None for how in found):
            variants.remove(variant)
            added.regions += variant.regions
            added.notes += [how for how in found if how is not None]
    variants.append(added)


def _how(ours: Region, theirs: Region, space: Space, same: Sequence[IsSame]) -> str | None:
    if 0 in [*ours.fixed.values(), *theirs.fixed.values()]:
        return None  # an engine of its own: converters take sizes for larger than 0
    return next((how for is_same in same if (how := is_same(ours, theirs, space)) is not None), None)


def _finish(traces: Traces, space: Space, variant: Variant, regions: Sequence[Region]) -> None:
    """Give a variant its interface and its words."""
    texts = [space.text(region.all_claims()) for region in variant.regions]
    variant.text = texts[0] if len(texts) == 1 else " or ".join(f"({text})" for text in texts)
    if space.listed is None and space.are_all and space.where_any(claims_of(variant.regions)).all():
        variant.text = "every size of the range"
    variant.line = next((line for region in (*variant.regions, *regions) for line in region.lines), "")
    variant.notes = list(dict.fromkeys(variant.notes))
    restrict(variant, space)
    _trace_fixed(traces, space, variant)


def _trace_fixed(traces: Traces, space: Space, variant: Variant) -> None:
    """Trace again where a region turns out to have only one size of a dimension: what computes with it is folded."""
    inputs = graph_meta(variant.graph).interface.inputs
    if len(variant.regions) > 1 or not any(
        inputs[dim.input].min[dim.axis] == inputs[dim.input].max[dim.axis] and symbol not in variant.regions[0].fixed
        for symbol, dim in space.symbols.items()
    ):
        return
    shapes = [tuple(max(x, 2) if a in spec.dynamic else x for a, x in enumerate(spec.opt)) for spec in inputs]
    graph = traces.at(inputs, shapes)  # torch takes a size of 1 for static
    if not graph_meta(graph).splits:
        constraints = graph_meta(variant.graph).interface.constraints
        meta = graph_meta(graph)
        graph.meta["torch2rt"] = dataclasses.replace(
            meta, interface=dataclasses.replace(meta.interface, constraints=constraints)
        )
        variant.graph = graph


def _check_ends(space: Space, regions: Sequence[Region], refused: np.ndarray) -> None:
    """Raise `TraceError` where the module raises errors at an end of a range, whatever the other sizes are."""
    for symbol, sizes in space.sizes.items():
        dim = space.symbols[symbol]
        for end in (dim.min, dim.max):
            if np.all(refused[sizes == end]):
                splits = [split for region in regions for split in graph_meta(region.graph).splits]
                raise next(
                    (split.error for split in splits if str(dim) in str(split.error)),
                    TraceError(f"The module raises an error for {dim} = {end}. Narrow the range."),
                )


def _cell(space: Space, claims: Sequence[sympy.Basic], left: np.ndarray) -> tuple[list[sympy.Basic], np.ndarray]:
    """Points that are left and at which the same claims are true: as claims, and their places.

    It is the cell of the sizes to tune for, if that is left, or else the largest.
    """
    places = np.flatnonzero(left)
    if not claims:  # no trace of the whole range: take one of the listed shapes
        return _at(space, places[0]), places[:1]
    bits = np.stack([space.where([claim]) for claim in claims])
    _, which, counts = np.unique(
        np.packbits(bits[:, places], axis=0).T, axis=0, return_inverse=True, return_counts=True
    )
    which = which.reshape(-1)
    at_opt = np.flatnonzero(
        functools.reduce(operator.and_, [space.sizes[s][places] == space.opt[s] for s in space.sizes])
    )
    points = places[which == (which[at_opt[0]] if len(at_opt) else counts.argmax())]
    return [claim if bits[i, points[0]] else sympy.Not(claim) for i, claim in enumerate(claims)], points


def _at(space: Space, point: int) -> list[sympy.Basic]:
    """The claims that are true of one point alone, where some claim and its opposite both divide by 0."""
    return [sympy.Eq(symbol, int(sizes[point]), evaluate=False) for symbol, sizes in space.sizes.items()]


def _trace_in(
    traces: Traces, space: Space, cell: Sequence[sympy.Basic], points: np.ndarray, ties: Sequence[tuple[Symbol, Symbol]]
) -> Region | None:
    """The region of a trace at one of some points; `None` where the module raises errors at all that were tried."""
    numbers = {claim.args[0] for claim in cell if isinstance(claim, sympy.Eq) and claim.args[1].is_number}
    single = {s for s, v in space.sizes.items() if s in numbers and (v[points] == v[points[0]]).all()}
    failure: Exception | None = None
    for point in _candidates(space, points):
        sizes = {symbol: int(values[point]) for symbol, values in space.sizes.items()}
        fixed = {s: size for s, size in sizes.items() if s in single or size < 2}  # torch specialises 0 and 1
        tied = {s: size for s, size in with_ties(fixed, ties).items() if s in fixed or s not in sizes}
        for known in (sizes, _with_alike(space, sizes)):
            specs = not_empty(_with_sizes(space, with_ties(known, ties), tied))
            shapes = [spec.opt for spec in specs]
            try:
                return space.needing(region_of(traces.at(specs, shapes), specs, space.specs))
            except Exception as error:
                if traces.accepts(shapes):
                    failure = failure or error
    if failure is not None:
        raise failure
    return None


def _with_alike(space: Space, sizes: Mapping[Symbol, int]) -> dict[Symbol, int]:
    """Sizes with those of the dimensions of the same range, which this path may be the first to tie."""
    of_range = {space.symbols[symbol].sizes: size for symbol, size in sizes.items()}
    alike = {symbol: of_range[dim.sizes] for symbol, dim in space.symbols.items() if dim.sizes in of_range}
    return {**alike, **sizes}


def _candidates(space: Space, points: np.ndarray) -> Iterator[int]:
    """Points to trace at, the most generic first: sizes of at least 2, in the middle, unlike each other."""
    values = np.stack([sizes[points] for sizes in space.sizes.values()])
    small = (values < 2).sum(0)
    alike = len(values) - np.array([len(set(column)) for column in values.T])
    middle = np.abs(values - np.median(values, axis=1, keepdims=True)).sum(0)
    best = np.lexsort((middle, alike, small))[0]
    yield from dict.fromkeys(int(points[place]) for place in (best, 0, len(points) // 2, len(points) - 1))


def _with_sizes(space: Space, sizes: Mapping[Symbol, int], fixed: Mapping[Symbol, int]) -> list[Input]:
    """The inputs with these sizes to tune for, of which some have no other."""
    ends = {which: [list(getattr(spec, which)) for spec in space.specs] for which in ("min", "opt", "max")}
    for symbol, dim in space.symbols.items():
        size = sizes.get(symbol, max(2, ends["opt"][dim.input][dim.axis]))
        size = min(max(size, dim.min), dim.max)
        for which in ("min", "opt", "max") if symbol in fixed else ("opt",):
            ends[which][dim.input][dim.axis] = size
    return [
        dataclasses.replace(spec, **{which: tuple(shapes[i]) for which, shapes in ends.items()})  # type: ignore[arg-type]
        for i, spec in enumerate(space.specs)
    ]


def _pinned(variants: Sequence[Variant]) -> dict[sympy.Basic, set[int]]:
    """The numbers that sizes are in the variants, each in one of its own."""
    pinned: dict[sympy.Basic, set[int]] = {}
    for claim in (claim for variant in variants for claim in variant.regions[0].claims):
        if isinstance(claim, sympy.Eq) and claim.args[1].is_number:
            pinned.setdefault(claim.args[0], set()).add(int(claim.args[1]))
    return pinned


def _needs_more(
    traces: Traces, space: Space, variants: Sequence[Variant], where: np.ndarray, max_variants: int
) -> bool:
    """Whether a size is another number in each of some variants, and has too many values for an engine each.

    So that a module is not traced for each of them; the module accepts others of these sizes, too.
    """
    for size, numbers in _pinned(variants).items():
        if len(numbers) < 3 or not size.free_symbols or (values := space.values(size)) is None:
            continue
        found, places = np.unique(values[where], return_index=True)
        others = [int(np.flatnonzero(where)[p]) for value, p in zip(found, places) if int(value) not in numbers]
        if len(found) <= max_variants:
            continue
        some = [others[len(others) // 3], others[2 * len(others) // 3]]
        if all(traces.accepts(_shapes_at(space, point, variants)) for point in some):
            return True
    return False


def _shapes_at(space: Space, point: int, variants: Sequence[Variant]) -> list[Shape]:
    """The shapes of a point, and of the dimensions that must equal those that it gives."""
    ties = [tie for variant in variants for region in variant.regions for tie in region.ties]
    sizes = with_ties({symbol: int(values[point]) for symbol, values in space.sizes.items()}, ties)
    return [spec.opt for spec in _with_sizes(space, sizes, {})]


def _too_many(variants: Sequence[Variant], space: Space, max_variants: int) -> TraceError:
    """The error where a range needs too many variants."""
    lines: list[str] = []
    for region in (variant.regions[0] for variant in variants):
        line = f" ({', '.join(region.lines[:2])})" if region.lines else ""
        lines.append(f"  {space.text(region.all_claims())}{line}")
    text = "\n".join([f"The module needs more than {max_variants} engines for the range, for such sizes:", *lines])
    if numbers := [describe(size, space.symbols) for size, values in _pinned(variants).items() if len(values) > 1]:
        text += (
            f"\nThe module makes {', '.join(numbers)} a plain number, so that each needs an engine of its own: "
            "range(size) does so, and size // 2, math.log(size), int(size * 0.5) and torch.arange(size) do not."
        )
    return TraceError(
        f"{text}\nNarrow the range, raise max_variants, or list the sizes: torch2rt(model, inputs, "
        'shapes=[{"x": (1, 3, 224, 224)}, {"x": (1, 3, 384, 384)}]).'
    )
