"""The inputs that a conversion is compared with its module on: the example, and others of the served range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface, Shape
from torch2rt.structure import bare_name

DRAWN = 3  # calls with sizes between the smallest and the largest that `calls_in_range` makes
LARGE = 2**19  # numbers in the inputs, above which smaller sizes are preferred where `is_slow`
MULTIPLES = (1, 2, 4, 8, 14, 16, 32, 64)  # modules may serve only multiples of such a number
Tensors = Sequence[torch.Tensor]


@dataclasses.dataclass
class Call:
    """Inputs to compare on; `made` if the user has not given these values at these sizes."""

    tensors: list[torch.Tensor]
    made: bool

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(x.shape) for x in self.tensors]

    def __str__(self) -> str:
        inputs = ", ".join(f"{bare_name(x.dtype)}{list(x.shape)}" for x in self.tensors)
        return f"for {'drawn ' if self.made else ''}inputs {inputs}"


def first_calls(interface: Interface, tensors: Tensors, is_slow: bool) -> list[Call]:
    """The example, and inputs that may take its place, best first.

    Only sizes that are served are among them. `is_slow` puts small inputs before a large example.
    """
    specs, example = interface.inputs, [tuple(x.shape) for x in tensors]
    small = [
        tuple(low if low == high else max(low, min(size, 2)) for size, low, high in zip(shape, s.min, s.max))
        for s, shape in zip(specs, example, strict=True)
    ]
    choices = [example, *([getattr(spec, which) for spec in specs] for which in ("opt", "min", "max"))]
    if is_slow and sum(x.numel() for x in tensors) > LARGE:
        choices = [small, *choices]
    served = {tuple(shapes): shapes for shapes in choices if _is_served(interface, shapes)}
    return [Call(list(map(fitted, tensors, shapes)), shapes != example) for shapes in served.values()]


def calls_in_range(interface: Interface, tensors: Tensors) -> Iterator[Call]:
    """The smallest, the largest and some sizes between them, with values drawn from the example's."""
    generator = torch.Generator().manual_seed(0)
    specs = interface.inputs
    ends = [[getattr(spec, which) for spec in specs] for which in ("min", "max")]
    chosen = {tuple(shapes): shapes for shapes in ends if _is_served(interface, shapes)}
    wanted = len(chosen) + DRAWN if any(spec.dynamic for spec in specs) else 1
    for _ in range(1000):
        if len(chosen) >= wanted:
            break
        if _is_served(interface, shapes := _drawn_shapes(interface, generator)):
            chosen[tuple(shapes)] = shapes
    for shapes in chosen.values():
        yield Call([drawn_values(fitted(x, s), generator) for x, s in zip(tensors, shapes)], True)


def _is_served(interface: Interface, shapes: Sequence[Shape]) -> bool:
    try:
        interface.check(list(shapes), [spec.dtype for spec in interface.inputs])
    except InputError:
        return False
    return True


def _drawn_shapes(interface: Interface, generator: torch.Generator) -> list[Shape]:
    """Sizes drawn from the range. Dimensions that have one range have one size, as far as they are drawn alike."""
    place = torch.rand((), generator=generator).item()
    multiple = MULTIPLES[int(torch.randint(0, len(MULTIPLES), (), generator=generator))]
    drawn: dict[tuple[int, int], int] = {}
    for spec in interface.inputs:
        for low, high in zip(spec.min, spec.max, strict=True):
            size = low + round(place * (high - low))
            drawn[low, high] = min(max(round(size / multiple) * multiple, low), high)
    return [tuple(drawn[ends] for ends in zip(s.min, s.max, strict=True)) for s in interface.inputs]


def fitted(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A tensor cut or repeated to a shape: its values stay its own."""
    for axis, size in enumerate(shape):
        if size != x.shape[axis]:
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def drawn_values(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values like a tensor's: some of its own, and between them where they are not whole numbers."""
    if not x.numel():
        return x
    flat = x.flatten()
    first, second = (
        flat[torch.randint(0, x.numel(), (x.numel(),), generator=generator).to(x.device)] for _ in range(2)
    )
    if x.is_floating_point() and not (flat == flat.round()).all():
        share = torch.rand(x.numel(), generator=generator).to(x.device, x.dtype)
        between = first + (second - first) * share
        first = torch.where(between.isfinite(), between, first)
    return first.view(x.shape)
