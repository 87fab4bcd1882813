"""What a user promises about dynamic sizes: multiples of a number, and sizes that depend on one common number.

`dynamic_shapes` says it as `torch.export.export` takes it, `multiple_of` beside `min_shapes` and `max_shapes`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch2rt.errors import InputError


@dataclasses.dataclass(frozen=True)
class Promise:
    """A dynamic size is `factor * n + offset`, for a whole number n that all sizes with this `root` have in common."""

    axis: int
    root: str
    factor: int = 1
    offset: int = 0


class Asked(NamedTuple):
    """What `dynamic_shapes` says of one dimension: its range, as far as it is given, and how its size is made."""

    low: int | None
    high: int | None
    is_dynamic: bool
    root: str | None = None
    factor: int = 1
    offset: int = 0


def asked(
    dynamic_shapes: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, dict[int, Asked]]:
    """What `dynamic_shapes` says, by the ids of the tensors among the arguments and by dimension."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"The inputs do not fit the module's forward: {error}.") from error
    found: dict[int, dict[int, Asked]] = {}
    if isinstance(dynamic_shapes, Mapping):
        _walk(dict(bound.arguments), dynamic_shapes, "dynamic_shapes", found)
    elif isinstance(dynamic_shapes, (tuple, list)):
        values = [value for _, value in _flat_arguments(bound)]
        _walk(tuple(values), tuple(dynamic_shapes), "dynamic_shapes", found)
    else:
        raise InputError(
            "dynamic_shapes must be a dict by the names of forward's parameters, or a tuple with an item for each "
            f"argument, as for torch.export.export: got a {type(dynamic_shapes).__name__}."
        )
    _check_roots(found)
    return found


def _flat_arguments(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """The arguments in order, those in `*args` and `**kwargs` one by one."""
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _walk(value: Any, spec: Any, path: str, found: dict[int, dict[int, Asked]]) -> None:
    if isinstance(value, torch.Tensor):
        given = _of_tensor(value, spec, path)
        if found.setdefault(id(value), given) != given:
            raise InputError(f"{path}: the same tensor is given twice, with different dynamic shapes.")
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        spec = dict(zip(value, spec)) if isinstance(spec, (tuple, list)) and len(spec) == len(value) else spec
    if isinstance(value, Mapping):
        if spec is not None and not isinstance(spec, Mapping):
            raise InputError(f"{path} must be a dict with some of {list(value)}, or None, got {spec!r}.")
        if unknown := set(spec or {}) - set(value):
            raise InputError(f"{path} names {sorted(map(str, unknown))}, the arguments are {list(value)}.")
        for key, item in value.items():
            _walk(item, (spec or {}).get(key), f"{path}[{key!r}]", found)
    elif isinstance(value, (tuple, list)):
        if spec is not None and (not isinstance(spec, (tuple, list)) or len(spec) != len(value)):
            raise InputError(f"{path} must have {len(value)} items, or be None, got {spec!r}.")
        for i, item in enumerate(value):
            _walk(item, None if spec is None else spec[i], f"{path}[{i}]", found)
    elif spec is not None:
        raise InputError(f"{path} is {spec!r} for a {type(value).__name__}, which has no shape: write None.")


def _of_tensor(tensor: torch.Tensor, spec: Any, path: str) -> dict[int, Asked]:
    if spec is None:
        spec = {}
    if isinstance(spec, (tuple, list)):
        if len(spec) != tensor.dim():
            raise InputError(f"{path} has {len(spec)} dimensions, the example {tuple(tensor.shape)}: {spec!r}.")
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        raise InputError(f"{path} must be a dict by dimension, a tuple with an item for each one, or None: {spec!r}.")
    by_axis: dict[int, Asked] = {}
    for axis, dim in spec.items():
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise InputError(f"{path} names dimension {axis!r} of an example of shape {tuple(tensor.shape)}.")
        by_axis[axis % tensor.dim()] = _of_dim(dim, tensor.shape[axis], f"{path}[{axis}]")
    static = Asked(None, None, False)
    return {axis: by_axis.get(axis, static) for axis in range(tensor.dim())}


def _of_dim(dim: Any, size: int, path: str) -> Asked:
    if dim is None or getattr(getattr(dim, "type", None), "name", "") == "STATIC":
        return Asked(None, None, False)
    if type(dim) is int:
        if dim != size:
            raise InputError(f"{path} says that the size is {dim}, the example has {size}.")
        return Asked(None, None, False)
    if getattr(getattr(dim, "type", None), "name", "") in ("AUTO", "DYNAMIC"):
        return Asked(_bound(dim.min), _bound(dim.max), True)
    if not isinstance(dim, torch.export.Dim):
        raise InputError(f"{path} must be a torch.export.Dim, Dim.AUTO, Dim.STATIC, an int or None, got {dim!r}.")
    root, fn = getattr(dim, "root", dim), getattr(dim, "fn", None)
    offset = 0 if fn is None else int(fn(0))
    factor = 1 if fn is None else int(fn(1)) - offset
    low, high = _bound(root.min), _bound(root.max)
    low, high = (None if end is None else factor * end + offset for end in (low, high))
    return Asked(low, high, True, root.__name__, factor, offset)


def _bound(value: Any) -> int | None:
    """An end of a range; `None` where torch leaves it open: 0, as every size is at least that, or infinity."""
    try:
        number = int(value)
    except (TypeError, OverflowError, AttributeError):
        return None
    return number if 0 < number < 2**31 else None


def _check_roots(found: Mapping[int, Mapping[int, Asked]]) -> None:
    """Raise `InputError` for two ranges of one name, and for factors below 1."""
    ranges: dict[str, tuple[Any, Any]] = {}
    for each in found.values():
        for one in each.values():
            if one.root is None:
                continue
            if one.factor < 1:
                raise InputError(f"dynamic_shapes: a size that is {one.factor} * {one.root} does not grow with it.")
            ends = tuple(end if end is None else (end - one.offset) // one.factor for end in (one.low, one.high))
            if ranges.setdefault(one.root, ends) != ends:  # type: ignore[arg-type]
                raise InputError(f"dynamic_shapes: Dim '{one.root}' has two ranges, {ranges[one.root]} and {ends}.")


def with_asked(
    given: Mapping[int, Asked], name: str, low: Sequence[int], high: Sequence[int], has_low: bool, has_high: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Promise, ...]]:
    """The range of an input and what is promised of it; `low` and `high` are what `min_shapes` and `max_shapes` say."""
    lows, highs, promises = list(low), list(high), []
    for axis, one in given.items():
        where = f"Input '{name}', dimension {axis}"
        if not one.is_dynamic:
            if low[axis] != high[axis]:
                raise InputError(f"{where}: static in dynamic_shapes, but {low[axis]} to {high[axis]} in the others.")
            continue
        ends = []
        for end, other, which, is_given in (
            (one.low, low[axis], "min", has_low),
            (one.high, high[axis], "max", has_high),
        ):
            if end is None and not is_given and which == "max":
                raise InputError(
                    f"{where}: TensorRT needs a largest size. Give Dim({one.root or 'h'!r}, max=...), "
                    "Dim.AUTO(max=...), or min_shapes and max_shapes."
                )
            if end is not None and is_given and end != other:
                raise InputError(f"{where}: {which} {end} in dynamic_shapes contradicts {which}_shapes, {other}.")
            ends.append(end if end is not None else other if is_given else max(one.factor + one.offset, 1))
        lows[axis], highs[axis] = ends
        if one.root is not None:
            promises.append(Promise(axis, one.root, one.factor, one.offset))
    return tuple(lows), tuple(highs), tuple(promises)


def without_ends(given: Mapping[int, Mapping[int, Asked]] | None) -> dict[int, dict[int, Asked]] | None:
    """What is said of dimensions without their ranges, where these are known otherwise."""
    if given is None:
        return None
    return {key: {axis: one._replace(low=None, high=None) for axis, one in by.items()} for key, by in given.items()}


def multiples(name: str, factors: Sequence[int], low: Sequence[int], high: Sequence[int]) -> tuple[Promise, ...]:
    """The promises of an input whose sizes are multiples of `factors`."""
    promises = []
    for axis, factor in enumerate(factors):
        if factor < 1:
            raise InputError(f"multiple_of must be at least 1, is {factor} for input '{name}', dimension {axis}.")
        if factor > 1 and low[axis] != high[axis]:
            promises.append(Promise(axis, f"{name}.shape[{axis}]", factor))
        elif low[axis] % factor:
            raise InputError(f"Input '{name}', dimension {axis}: its size {low[axis]} is no multiple of {factor}.")
    return tuple(promises)


def within(promise: Promise, where: str, low: int, opt: int, high: int, is_given: bool) -> tuple[int, int, int]:
    """The ends of a range and the size to tune for, such that they are as promised: the range has the same sizes."""
    factor, offset = promise.factor, promise.offset
    first = -((offset - low) // factor) * factor + offset
    last = (high - offset) // factor * factor + offset
    if first > last:
        raise InputError(f"{where}: no size from {low} to {high} is {in_words(promise)}.")
    nearest = min(max((opt - offset) // factor * factor + offset, first), last)
    if is_given and nearest != opt:
        raise InputError(f"{where}: the opt size {opt} is not {in_words(promise)}.")
    return first, nearest, last


def in_words(promise: Promise) -> str:
    """What a size must be, of a promise."""
    rest = f" plus {promise.offset}" if promise.offset else ""
    return f"a multiple of {promise.factor}{rest}"
