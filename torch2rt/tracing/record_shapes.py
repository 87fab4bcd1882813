"""The shapes that traffic brings to a module, and the ranges and optimization profiles that they ask for."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torch2rt.arguments import whole_number
from torch2rt.errors import InputError
from torch2rt.interface import Shape
from torch2rt.structure import flatten
from torch2rt.tracing.signature import tensor_names

FAR = math.log(2)  # calls whose sizes are on average twice those of the nearest profile, or half, pay for another
NEARER = 0.7  # times the distance before, at most, that another profile must leave
CANDIDATES = 64  # of the most frequent sets of shapes, for the place of an opt point

Shapes = tuple[Shape, ...]


class RecordedShapes:
    """The shapes of a module's calls, by how often they came; `torch2rt.record_shapes` fills it.

    - `counts`: how many calls had each set of shapes: one shape for each input tensor, in the order of `names`.
    - `names`: the input tensors, as `torch2rt.torch2rt` calls them.
    - `others`: how many calls had another form, such as other keywords or other constants. An engine serves one form:
      the most frequent.

    It prints as a report.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._forward = getattr(module, "_orig_mod", module).forward  # of what torch.compile has wrapped
        self._forms: dict[str, tuple[Any, collections.Counter[Shapes]]] = {}
        self._refused: str | None = None
        self._lock = threading.Lock()

    def _add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            leaves, arguments = flatten((args, dict(kwargs)), torch.is_tensor, "inputs")
            shapes = tuple(tuple(map(int, leaf.shape)) for leaf in leaves)
        except (InputError, RuntimeError) as error:  # a nested tensor, say; the call itself may do
            self._refused = self._refused or str(error)
            return
        with self._lock:
            _, counts = self._forms.setdefault(json.dumps(arguments), (arguments, collections.Counter()))
            counts[shapes] += 1

    def _form(self) -> tuple[Any, collections.Counter[Shapes]]:
        if self._forms:
            return max(self._forms.values(), key=lambda form: form[1].total())
        raise InputError(f"No call was recorded that can be converted{f': {self._refused}' if self._refused else '.'}")

    @property
    def counts(self) -> collections.Counter[Shapes]:
        """How many calls of the most frequent form had each set of shapes."""
        return collections.Counter(self._form()[1])

    @property
    def names(self) -> list[str]:
        """The input tensors of the most frequent form."""
        return tensor_names(self._forward, self._form()[0])

    @property
    def others(self) -> int:
        """How many calls had another form."""
        return sum(counts.total() for _, counts in self._forms.values()) - self._form()[1].total()

    def proposal(self, profiles: int = 4) -> dict[str, Any]:
        """The arguments `min_shapes`, `opt_shapes` and `max_shapes` of `torch2rt.torch2rt` for these calls.

        The ranges are those of the calls. The opt shapes are those of calls: the ones that are the nearest to all, by
        the ratios of the sizes. Where calls are still twice as large as these or half as large on average, `opt_shapes`
        are up to `profiles` of them, as long as each makes the average distance a third less.

        Raises `InputError` if no call was recorded, or if a tensor's rank varied.
        """
        most = whole_number("profiles", profiles, 1) or 1
        counts, names = self.counts, self.names
        for name, shapes in zip(names, zip(*counts)):
            if len(ranks := {len(shape) for shape in shapes}) > 1:
                raise InputError(f"Input '{name}' came with {sorted(ranks)} dimensions; an engine serves one number.")
        opts = _nearest_to_all(counts, most)
        low, high = ([tuple(map(end, zip(*shapes))) for shapes in zip(*counts)] for end in (min, max))
        sets = [dict(zip(names, shapes)) for shapes in opts]
        return {
            "min_shapes": dict(zip(names, low)),
            "opt_shapes": sets[0] if len(sets) == 1 else sets,
            "max_shapes": dict(zip(names, high)),
        }

    def __str__(self) -> str:
        if not self._forms:
            return f"no call was recorded{f' that can be converted: {self._refused}' if self._refused else ''}"
        counts, names = self.counts, self.names
        total = counts.total()
        lines = [f"{total} calls with {len(counts)} sets of shapes" + _others(self.others)]
        for shapes, count in counts.most_common(8):
            lines.append(f"  {100 * count / total:5.1f} %  {_described(names, shapes)}")
        try:
            proposal = self.proposal()
        except InputError as error:
            return "\n".join([*lines, str(error)])
        for what, shapes in proposal.items():
            sets = shapes if isinstance(shapes, list) else [shapes]
            lines.append(f"{what}: " + " | ".join(_described(one, one.values()) for one in sets))
        return "\n".join(lines)


@contextlib.contextmanager
def record_shapes(module: torch.nn.Module) -> Iterator[RecordedShapes]:
    """Count the shapes of a module's calls within `with`, in every thread, to convert the module for such calls.

    Only shapes are kept, no tensors. Calls of `module.forward` itself are not seen.

    Raises `InputError` for what is no `torch.nn.Module`.

    >>> from torch2rt import record_shapes, torch2rt
    >>> model = torch.nn.Linear(3, 5).eval()
    >>> with record_shapes(model) as shapes:
    ...     for size in (1, 4, 4, 7):
    ...         y = model(torch.randn(size, 3))
    >>> shapes.proposal()
    {'min_shapes': {'input': (1, 3)}, 'opt_shapes': {'input': (4, 3)}, 'max_shapes': {'input': (7, 3)}}
    >>> model_trt = torch2rt(model, [torch.randn(4, 3)], **shapes.proposal())
    """
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"record_shapes watches a torch.nn.Module, not a {type(module).__name__}.")
    recorded = RecordedShapes(module)
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: recorded._add(args, kwargs), with_kwargs=True, prepend=True
    )
    try:
        yield recorded
    finally:
        hook.remove()


def _distance(one: Shapes, other: Shapes) -> float:
    """The logarithms of the ratios of all sizes, added up."""
    pairs = [pair for shapes in zip(one, other) for pair in zip(*shapes)]
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in pairs)


def _nearest_to_all(counts: collections.Counter[Shapes], most: int) -> list[Shapes]:
    """Sets of shapes among these that the others are near to: one, and more as long as that pays."""
    candidates = [shapes for shapes, _ in counts.most_common(CANDIDATES)]
    nearest = dict.fromkeys(counts, math.inf)
    chosen: list[Shapes] = []
    mean = math.inf
    while len(chosen) < most and (not chosen or mean > FAR):
        options = [{shapes: min(now, _distance(shapes, one)) for shapes, now in nearest.items()} for one in candidates]
        means = [sum(d * counts[shapes] for shapes, d in option.items()) / counts.total() for option in options]
        best = means.index(min(means))
        if chosen and means[best] > NEARER * mean:
            break
        mean, nearest = means[best], options[best]
        chosen.append(candidates[best])
    return chosen


def _described(names: Any, shapes: Any) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(names, shapes))


def _others(count: int) -> str:
    return f", and {count} calls of other forms" if count else ""
