"""The interface of a variant: it takes the sizes of the variant's regions, and no others."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torch2rt.graph import Assumed, GraphMeta, graph_meta
from torch2rt.interface import Interface
from torch2rt.sizes import holds, to_json
from torch2rt.tracing.sizes.regions import (
    SHOWN,
    Space,
    Symbol,
    Variant,
    claims_of,
    false_assumptions,
    symbol_of,
    with_ties,
)


def restrict(variant: Variant, space: Space) -> None:
    """Make a variant's graph take the sizes of its regions and no others."""
    graph, own = variant.graph, variant.regions[0]
    meta = graph_meta(graph)
    inside = _inside(variant, space)
    box = {symbol: (dim.min, dim.max) for symbol, dim in space.symbols.items()}
    if space.are_all:
        box |= {s: (int(sizes[inside].min()), int(sizes[inside].max())) for s, sizes in space.sizes.items()}
    else:  # what a claim about one dimension says holds for sizes that are not looked at, too
        ends = [space.ends(region.all_claims()) for region in variant.regions]
        box = {s: (min(each[s][0] for each in ends), max(each[s][1] for each in ends)) for s in box}
    for symbol in own.fixed:  # also where not all sizes are looked at
        if all(symbol in region.fixed for region in variant.regions):
            sizes = [region.fixed[symbol] for region in variant.regions]
            box[symbol] = min(sizes), max(sizes)
    for left, right in [*own.ties, *own.ties]:
        box[left] = box[right] = max(box[left][0], box[right][0]), min(box[left][1], box[right][1])
    opt = with_ties(_opt_inside(variant, space, inside), own.ties)
    shapes = {which: [list(getattr(spec, which)) for spec in space.specs] for which in ("min", "opt", "max")}
    for symbol, dim in space.symbols.items():
        low, high = box[symbol]
        sizes_of = {"min": low, "opt": min(max(opt.get(symbol, space.opt[symbol]), low), high), "max": high}
        for which, size in sizes_of.items():
            shapes[which][dim.input][dim.axis] = size
    inputs = [
        dataclasses.replace(spec, **{which: tuple(sizes[i]) for which, sizes in shapes.items()})  # type: ignore[arg-type]
        for i, spec in enumerate(meta.interface.inputs)
    ]
    symbols = {
        symbol: dataclasses.replace(dim, min=box[symbol_of(dim)][0], max=box[symbol_of(dim)][1])
        for symbol, dim in meta.symbols.items()
    }
    interface = _constrained(dataclasses.replace(meta.interface, inputs=inputs), variant, space, box)
    assumed = without_claims(meta).assumed.decisions
    graph.meta["torch2rt"] = dataclasses.replace(
        meta,
        interface=interface,
        symbols=symbols,
        assumed=Assumed(assumed, {symbol: symbols[symbol] for symbol in meta.assumed.ranges}),
        splits=(),
    )


def without_claims(meta: GraphMeta) -> GraphMeta:
    """What is known of a graph, without the claims of its region, of which no call is checked for any."""
    # a claim of torch's that is false somewhere in the range is one of the region's
    ranges = meta.assumed.ranges
    false = false_assumptions(meta)
    assumed = [decision for decision in meta.assumed.decisions if decision not in false]
    interface = dataclasses.replace(meta.interface, constraints=[])
    return dataclasses.replace(meta, interface=interface, assumed=Assumed(assumed, ranges), splits=())


def _inside(variant: Variant, space: Space) -> np.ndarray:
    return space.where_any(claims_of(variant.regions))


def _opt_inside(variant: Variant, space: Space, inside: np.ndarray) -> dict[Symbol, int]:
    """The sizes to tune for, or those of the variant's own region that are nearest to them."""
    if any(all(holds(claim, space.opt) for claim in region.all_claims()) for region in variant.regions):
        return space.opt
    own = np.flatnonzero(space.where(variant.regions[0].all_claims()) & inside)
    away = sum(np.abs(sizes[own] / max(space.opt[symbol], 1) - 1) for symbol, sizes in space.sizes.items())
    nearest = own[np.argmin(away)]
    return {symbol: int(sizes[nearest]) for symbol, sizes in space.sizes.items()}


def _constrained(
    interface: Interface, variant: Variant, space: Space, box: Mapping[Symbol, tuple[int, int]]
) -> Interface:
    """The interface that checks calls for what the ranges do not say of the variant's regions."""
    regions = variant.regions
    of_each = [list(graph_meta(region.graph).interface.constraints) for region in regions]
    shared = all(constraints == of_each[0] for constraints in of_each)
    within = functools.reduce(
        operator.and_, [(sizes >= box[s][0]) & (sizes <= box[s][1]) for s, sizes in space.sizes.items()], True
    )
    if space.listed is not None:
        shapes = [shapes for shapes, is_in in zip(space.listed, _inside(variant, space)) if is_in]
        if len(shapes) > 1:
            either = [
                _all([["eq", ["dim", d.input, d.axis], s[d.input][d.axis]] for d in space.symbols.values()])
                for s in shapes
            ]
            text = f"one of the shapes that were listed: {', '.join(str(list(s)) for s in shapes[:SHOWN])}"
            interface = dataclasses.replace(interface, constraints=[*interface.constraints, (_any(either), text)])
        return interface
    if shared and space.are_all and bool(np.all(_inside(variant, space)[within])):
        return interface
    if len(regions) == 1:
        for claim in regions[0].claims:
            interface = interface.constrained(claim, space.symbols, space.text([claim]))
        return interface
    parts = [
        _all(
            [
                *(to_json(claim, space.symbols) for claim in region.all_claims()),
                *([c for c, _ in cs] if not shared else []),
            ]
        )
        for region, cs in zip(regions, of_each)
    ]
    text = " or ".join(f"({space.text(region.all_claims())})" for region in regions)
    return dataclasses.replace(interface, constraints=[*(interface.constraints if shared else []), (_any(parts), text)])


def _all(claims: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: ["and_", a, b], claims) if claims else True


def _any(claims: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: ["or_", a, b], claims)
