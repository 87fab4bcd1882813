"""What users say of the inputs' shapes, as the inputs of an `Interface`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.interface import AXES, Input, Interface, Shape, is_shape, shapes_by_name, with_size
from torch2rt.promises import Asked, in_words, multiples, with_asked, within
from torch2rt.structure import Spec, bare_name, flatten


def describe_inputs(
    leaves: Sequence[torch.Tensor],
    arguments: Spec,
    names: Sequence[str],
    min_shapes: Any,
    opt_shapes: Any,
    max_shapes: Any,
    max_batch_size: int | None,
    dtypes: Mapping[torch.dtype, Any] | None,
    multiple_of: Any = None,
    asked: Mapping[int, Mapping[int, Asked]] | None = None,
) -> list[Input]:
    """Check the tensors of a conversion and give each its name and range.

    `dtypes` are those that inputs may have, `None` for any; `asked` is what `dynamic_shapes` says.
    """
    if len(names) != len(leaves):
        raise InputError(f"input_names has {len(names)} names for {len(leaves)} input tensors: {names}.")
    if len(set(names)) != len(names) or not all(names):
        raise InputError(f"input_names must be distinct and not empty: {names}.")
    for name, leaf in zip(names, leaves, strict=True):
        if dtypes is not None and leaf.dtype.is_complex:
            raise InputError(
                f"Input '{name}' is {leaf.dtype}: TensorRT has no complex numbers. Pass torch.view_as_real(x)."
            )
        if dtypes is not None and leaf.dtype not in dtypes:
            known = ", ".join(map(bare_name, dtypes))
            advice = " Pass x.float() to a module in float32." if leaf.dtype is torch.float64 else ""
            raise InputError(f"Input '{name}' is {leaf.dtype}, TensorRT takes {known}.{advice}")
        if leaf.layout is not torch.strided or leaf.is_nested:
            raise InputError(f"Input '{name}' is not a dense tensor ({leaf.layout}).")
    shapes = [tuple(leaf.shape) for leaf in leaves]
    example = dict(zip(names, shapes, strict=True))

    def with_batch(size: int) -> dict[str, Shape]:
        batched = max_batch_size is not None
        return {name: (size, *shape[1:]) if batched and shape else shape for name, shape in example.items()}

    lows = shapes_by_name("min_shapes", min_shapes, arguments, with_batch(1))
    highs = shapes_by_name("max_shapes", max_shapes, arguments, with_batch(max_batch_size or 1))
    between = {name: clipped(shape, lows[name], highs[name]) for name, shape in example.items()}
    sets = [shapes_by_name("opt_shapes", one, arguments, between) for one in _sets(opt_shapes, list(example))]
    profiles = list({tuple(opts.items()): opts for opts in sets}.values())
    factors = shapes_by_name(
        "multiple_of", multiple_of, arguments, {name: (1,) * len(s) for name, s in example.items()}
    )
    if asked is not None and (max_batch_size is not None or multiple_of is not None):
        raise InputError("dynamic_shapes says what max_batch_size and multiple_of would: leave one of them out.")
    result = []
    for name, leaf in zip(names, leaves, strict=True):
        low, high = lows[name], highs[name]
        opt, *others = (opts[name] for opts in profiles)
        promises = multiples(name, factors[name], low, high)
        if asked is not None:
            given = min_shapes is not None, max_shapes is not None
            low, high, promises = with_asked(asked[id(leaf)], name, low, high, *given)
            opt = opt if opt_shapes is not None else clipped(tuple(leaf.shape), low, high)
        for promise in promises:
            where, axis = f"Input '{name}', dimension {promise.axis}", promise.axis
            for number, other in enumerate(others):
                _, size, _ = within(promise, where, low[axis], other[axis], high[axis], True)
                others[number] = with_size(other, axis, size)
            ends = within(promise, where, low[axis], opt[axis], high[axis], opt_shapes is not None)
            low, opt, high = (with_size(shape, axis, end) for shape, end in zip((low, opt, high), ends, strict=True))
        if max_batch_size is not None and high and high[0] != max_batch_size:
            raise InputError(
                f"{max_batch_size=} contradicts max_shapes, which gives input '{name}' {high}. Leave one of them out."
            )
        ranges = [
            (axis, *sizes)
            for middle_shape in (opt, *others)
            for axis, sizes in enumerate(zip(low, middle_shape, high, strict=True))
        ]
        for axis, first, middle, last in ranges:
            if not 0 <= first <= middle <= last:
                raise InputError(
                    f"Input '{name}', dimension {axis}: min {first}, opt {middle}, max {last} are not in order."
                )
        result.append(Input(name, leaf.dtype, low, opt, high, _memory_format(leaf), promises, tuple(others)))
    return result


def listed_shapes(
    shapes: Any, leaves: Sequence[torch.Tensor], arguments: Spec, names: Sequence[str], ranges: Sequence[Any]
) -> list[list[Shape]]:
    """The choices of shapes in `shapes=[...]`, each with one for each input; `ranges` must not be given beside."""
    if any(value is not None for value in ranges):
        raise InputError(
            "shapes lists all that is to be served, so that there are no ranges: leave out min_shapes, opt_shapes, "
            "max_shapes and max_batch_size."
        )
    if not isinstance(shapes, (list, tuple)) or not shapes or is_shape(shapes):
        raise InputError(
            f"shapes must be a list of choices of shapes, such as [{{'x': (1, 3)}}, {{'x': (2, 3)}}]: {shapes!r}."
        )
    if len(names) != len(leaves):
        raise InputError(f"input_names has {len(names)} names for {len(leaves)} input tensors: {names}.")
    example = {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
    choices = [list(shapes_by_name(f"shapes[{i}]", one, arguments, example).values()) for i, one in enumerate(shapes)]
    return [list(choice) for choice in dict.fromkeys(map(tuple, choices))]


def check_listed(
    listed: Sequence[Sequence[Shape]],
    specs: Sequence[Input],
    leaves: Sequence[torch.Tensor],
    asked: Mapping[int, Mapping[int, Asked]] | None,
) -> None:
    """Raise `InputError` for listed shapes that are not as `multiple_of` and `dynamic_shapes` promise."""
    for number, shapes in enumerate(listed):
        roots: dict[str, tuple[int, str]] = {}
        for spec, leaf, shape in zip(specs, leaves, shapes, strict=True):
            where = [
                f"shapes[{number}]: input '{spec.name}', dimension {axis}, size {n}" for axis, n in enumerate(shape)
            ]
            for axis, one in ({} if asked is None else asked[id(leaf)]).items():
                low, high = one.low or 0, one.high or math.inf
                if not low <= shape[axis] <= high:
                    raise InputError(f"{where[axis]}: dynamic_shapes says from {low} to {high}.")
            for promise in spec.promises:
                n, rest = divmod(shape[promise.axis] - promise.offset, promise.factor)
                if rest:
                    raise InputError(f"{where[promise.axis]}: promised is {in_words(promise)}.")
                other, first = roots.setdefault(promise.root, (n, where[promise.axis]))
                if other != n:
                    raise InputError(
                        f"{where[promise.axis]}: '{promise.root}' would be {n}, and {other} in {first.split(': ')[1]}."
                    )


def check_profiles(interfaces: Sequence[Interface]) -> None:
    """Raise `InputError` for opt shapes that none of the engines for a range serves."""
    first = interfaces[0]
    for shapes in first.asked_profiles[1:]:
        if not any(one.serves(shapes) for one in interfaces):
            try:
                first.check(shapes, [spec.dtype for spec in first.inputs])
            except InputError as error:
                raise InputError(f"opt_shapes has shapes that no call may have: {error}") from error


def _sets(shapes: Any, names: Sequence[str]) -> list[Any]:
    """The sets of shapes in `opt_shapes`, which is one set or a list of several."""
    if not isinstance(shapes, (list, tuple)) or not shapes or is_shape(shapes):
        return [shapes]
    if all(isinstance(one, Mapping) and set(one) <= set(names) for one in shapes):
        given = [name for one in shapes for name in one]
        if len(given) != len(set(given)) or len(given) != len(names):
            return list(shapes)
    elif len(names) != sum(_count(one) for one in shapes) and all(_count(one) == len(names) for one in shapes):
        return list(shapes)
    return [shapes]


def _count(shapes: Any) -> int:
    """How many shapes there are in a nested value."""
    return len(flatten(shapes, is_shape, "opt_shapes")[0])


def clipped(shape: Shape, low: Shape, high: Shape) -> Shape:
    """The nearest shape within a range; the lower end of a range that has its ends the wrong way round."""
    return tuple(max(min(size, last), first) for size, first, last in zip(shape, low, high, strict=True))


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """How an example lies in memory, if that is one of the orders that torch has a name for."""
    fits = (f for f, axes in AXES.items() if x.dim() == len(axes) and x.is_contiguous(memory_format=f))
    return torch.contiguous_format if x.is_contiguous() else next(fits, torch.contiguous_format)
