"""Sizes to trace with: they stand for the dynamic ones while the module runs.

Any sizes of the range would do if the module asked no questions about them. A module that pads to a multiple of 32 asks
`size % 32`, and a size of 224 gives an answer that hardly another size gives. So the first sizes are unlike round
numbers and unlike each other. Modules that refuse such sizes are traced at the user's own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torch2rt.input_ranges import clipped
from torch2rt.interface import Input, Shape
from torch2rt.tracing.calls.refusals import RefusedError

_FARTHEST = 64  # from the opt size; and not far smaller, as small sizes meet limits that others do not


@dataclasses.dataclass(frozen=True)
class _Dim:
    """A dynamic dimension of one input, whose size is `factor * n + offset` for an n from `min` to `max`.

    Dimensions with one `root` have their n in common.
    """

    input: int
    axis: int
    min: int
    opt: int
    max: int
    root: str = ""
    factor: int = 1
    offset: int = 0

    @classmethod
    def of(cls, index: int, spec: Input, axis: int) -> _Dim:
        low, opt, high = max(spec.min[axis], 2), spec.opt[axis], spec.max[axis]
        for promise in spec.promises:
            if promise.axis == axis:
                factor, offset = promise.factor, promise.offset
                ends = (-((offset - low) // factor), (opt - offset) // factor, (high - offset) // factor)
                return cls(index, axis, *ends, promise.root, factor, offset)
        return cls(index, axis, low, opt, high)

    def size(self, n: int) -> int:
        return self.factor * n + self.offset


def shapes_to_try(specs: Sequence[Input], leaves: Sequence[torch.Tensor]) -> list[list[Shape]]:
    """Shapes to trace with, in the order to try them: such as the engine serves, whatever the example's are.

    torch specialises on 0 and 1, so all dynamic sizes are at least 2. First come generic sizes, where only dimensions
    of several inputs that have the same range are equal; then generic ones that are equal, or sums of two others, where
    the opt shapes are; then the user's. Small sizes may derive a 1 that large ones do not.
    """
    opt = [spec.opt for spec in specs]
    example = [clipped(tuple(leaf.shape), s.min, s.max) for s, leaf in zip(specs, leaves, strict=True)]
    users = (opt, [s.max for s in specs], example, [s.min for s in specs])
    raised = [tuple(max(size, 2) if axis in s.dynamic else size for axis, size in enumerate(s.opt)) for s in specs]
    fit = [shapes for shapes in (*_generic(specs), *users) if _are_traceable(specs, shapes)]
    return list({tuple(shapes): shapes for shapes in [*fit, raised]}.values())


def most_telling(failures: Sequence[Exception]) -> Exception:
    """Of the errors of several shapes, in the order of `shapes_to_try`, the one to show.

    That a module refuses sizes which nobody has asked for says little: another error of it comes first, and of such
    refusals that of the user's sizes.
    """
    refusals = [error for error in failures if isinstance(error, RefusedError) and error.of_traced]
    others = [error for error in failures if error not in refusals]
    return (others or refusals[-1:])[0]


def _are_traceable(specs: Sequence[Input], shapes: Sequence[Shape]) -> bool:
    return all(shape[axis] > 1 for spec, shape in zip(specs, shapes, strict=True) for axis in spec.dynamic)


def _generic(specs: Sequence[Input]) -> Iterator[list[Shape]]:
    """Generic shapes, those with fewer equal sizes first."""
    dims = [_Dim.of(i, spec, axis) for i, spec in enumerate(specs) for axis in spec.dynamic]
    if not dims:
        return
    taken = {size for spec in specs for axis, size in enumerate(spec.opt) if axis not in spec.dynamic}
    yield _with_sizes(specs, _chosen(_by_range(dims), taken))
    if len({dim.input for dim in dims}) > 1:  # only several inputs have sizes that must agree
        groups = _by_opt(dims)
        if all(max(d.min for d in group) <= min(d.max for d in group) for group in groups):
            yield _with_sizes(specs, _with_sums(_chosen(groups, taken)))


def _by_range(dims: Sequence[_Dim]) -> list[list[_Dim]]:
    """Dimensions with the same range: the first such ones of all inputs, the second ones, and so on."""
    groups: dict[Any, list[_Dim]] = {}
    for dim in dims:
        if dim.root:
            groups.setdefault(dim.root, []).append(dim)
            continue
        range_ = (dim.min, dim.opt, dim.max)
        before = sum((d.input, d.min, d.opt, d.max) == (dim.input, *range_) for g in groups.values() for d in g)
        groups.setdefault((*range_, before), []).append(dim)
    return list(groups.values())


def _by_opt(dims: Sequence[_Dim]) -> list[list[_Dim]]:
    groups: dict[Any, list[_Dim]] = {}
    for dim in dims:
        groups.setdefault(dim.root or dim.opt, []).append(dim)
    return list(groups.values())


def _chosen(groups: Sequence[Sequence[_Dim]], taken: set[int]) -> dict[_Dim, int]:
    """One n for each group, unlike those of the other groups and the sizes that are `taken`."""
    sizes: dict[_Dim, int] = {}
    for group in sorted(groups, key=lambda group: group[0].max - group[0].min):
        low, high = max(d.min for d in group), min(d.max for d in group)
        size = _unlike(low, group[0].opt, high, {*taken, *sizes.values()})
        sizes.update((dim, size) for dim in group)
    return sizes


def _unlike(low: int, near: int, high: int, others: set[int]) -> int:
    """The size within a range that is least like a round number and like other sizes; of several such, the nearest."""
    near = max(low, min(near, high))
    below, above = min(near // 4, _FARTHEST), min(near // 2 + 1, _FARTHEST)
    sizes = range(max(low, near - below), min(high, near + above) + 1)

    def cost(size: int) -> tuple[float, int]:
        return _roundness(size) + sum(_likeness(size, other) for other in others), abs(size - near)

    return min(sizes, key=cost)


def _roundness(size: int) -> int:
    """How often a size is a multiple of a small number, or next to one."""
    weights = {0: 8, 1: 1, -1: 1}
    rests = ((size % d, d) for d in range(2, min(size, 33)))
    return sum(weights.get(rest if rest < 2 else rest - d, 0) for rest, d in rests) + (100 if size < 3 else 0)


def _likeness(size: int, other: int) -> int:
    if size == other:
        return 1000
    small, large = sorted((size, other))
    return 10 if small > 1 and large % small == 0 else 5 if large - small == 1 else 0


def _with_sums(sizes: dict[_Dim, int]) -> dict[_Dim, int]:
    """Make a size the sum of two others, or of one and a small number, where the opt sizes are: `past + new == all`."""
    by_opt = {dim.opt: size for dim, size in sizes.items() if not dim.root}
    for total in sorted(by_opt):
        smaller = sorted((opt for opt in by_opt if opt < total), reverse=True)
        pairs = itertools.combinations_with_replacement(smaller, 2)
        found = next(((a, b) for a, b in pairs if a + b == total), None)
        if found is not None:
            by_opt[total] = by_opt[found[0]] + by_opt[found[1]]
        elif smaller and total - smaller[0] <= 2:
            by_opt[total] = by_opt[smaller[0]] + total - smaller[0]
    return {d: n if d.root else max(d.min, min(by_opt[d.opt], d.max)) for d, n in sizes.items()}


def _with_sizes(specs: Sequence[Input], sizes: dict[_Dim, int]) -> list[Shape]:
    shapes = [list(spec.opt) for spec in specs]
    for dim, size in sizes.items():
        shapes[dim.input][dim.axis] = dim.size(size)
    return [tuple(shape) for shape in shapes]
