"""Compare: is a result another one but for roundings?

How much roundings change an output is a property of the network, so it is not a fixed tolerance but learned from runs
whose numbers were all off by a rounding (`torch2rt.debug.disturbance`): `MULTIPLE` times what such a run changes is
allowed. At least a few roundings of the output's own dtype are.

The numbers of one output are compared in groups of about the same magnitude: boxes in pixels must not hide the
probabilities beside them.
"""

from __future__ import annotations

import math

import torch

MULTIPLE = 8.0  # times the effect of a rounding; right engines were seen to differ by up to 2
WITHIN = 3.0  # more for float32, whose calls round within, as bicubic interpolation does its coefficients
FLOOR = {torch.float32: 32.0}  # roundings of a group's largest number that are allowed in any case
FLOOR_OF_OTHERS = 4.0  # the same for the narrow dtypes
EXCUSED = 0.98  # of the numbers that are too far off, the share that disturbances must move as far
SPAN = 4  # magnitudes in one group differ by less than a factor of 2 ** SPAN
GROUPS = 6  # the last has all smaller ones, and zeros
NEAR = 64.0  # roundings of the largest number
SMALLEST = 32  # numbers in a group; fewer join the next larger ones


class Comparison:
    """Two tensors of one dtype and shape, `actual` and `expected`, and what disturbances do to `expected`.

    Floating-point numbers must be close, integers and bools equal, NaN and infinities where the others are. Where a
    disturbance changes an integer (a tie of an argmax), moves a number past a jump or makes a NaN, either is right.
    `narrowest` is the type with the smallest range that the numbers pass through: what is tiny may vanish there.

    >>> comparison = Comparison(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    >>> comparison.passes()
    False
    >>> comparison.learn(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), MULTIPLE)
    >>> comparison.passes()
    True
    """

    def __init__(self, actual: torch.Tensor, expected: torch.Tensor, narrowest: torch.dtype | None = None) -> None:
        self.is_exact = not (expected.is_floating_point() or expected.is_complex())
        self.count, self.distance = expected.numel(), self._distance(actual, expected)
        magnitude = _finite(expected).double().abs().flatten()
        self.largest = magnitude.max().item() if magnitude.numel() else 0.0
        self.groups = _groups(magnitude) if not self.is_exact and self.largest else torch.zeros_like(magnitude).long()
        self.allowed = torch.zeros(GROUPS, dtype=torch.float64, device=expected.device)
        if not self.is_exact:
            dtype = expected.dtype.to_real()
            eps = torch.finfo(dtype).eps
            self.allowed += FLOOR.get(dtype, FLOOR_OF_OTHERS) * eps * self._most(magnitude)
            eps = max(eps, torch.finfo(narrowest or dtype).eps)
            self.allowed.clamp_(min=eps**2 * self.largest)  # what is 0 but for sines of multiples of pi is not 0
        self.within = WITHIN if not self.is_exact and dtype is torch.float32 else 1.0
        self.moved = torch.zeros_like(self.distance)  # the most that a disturbance has moved each number
        self.lost = torch.zeros_like(self.distance, dtype=torch.bool)  # whether one made it, or a NaN of it, finite
        self.learned = 0.0

    def learn(self, before: torch.Tensor, after: torch.Tensor, multiple: float) -> None:
        """Allow what a disturbance has done to the module's result, `multiple` times.

        Nothing is learned where the result has another shape: its size depends on values, which were disturbed.
        """
        if before.shape != after.shape or before.numel() != self.count:
            return
        moved = self._distance(after, before)
        self.lost |= moved.isinf()
        moved = torch.where(moved.isinf(), 0.0, moved)
        self.moved = torch.maximum(self.moved, moved)
        if self.is_exact:
            self.learned = max(self.learned, moved.sum().item())
        else:
            multiple *= self.within
            self.allowed = torch.maximum(self.allowed, multiple * self._most(moved))

    def passes(self) -> bool:
        """Whether the two are one but for roundings, as far as has been learned."""
        too_far = self.distance > self.allowed[self.groups]
        count = int(too_far.sum())
        if not count:
            return True
        moved = torch.where(self.distance.isinf(), self.lost, self.distance <= 2 * self.within * self.moved)
        return int((too_far & moved).sum()) >= EXCUSED * count

    @property
    def doubt(self) -> str | None:
        """Why the comparison says little about the tensor, if it does."""
        if self.is_exact or not self.distance.numel():
            return None
        if not self.largest:
            return "has no number but 0, NaN and infinities"
        return "may change by more than its largest value by roundings" if self.allowed[0] > self.largest else None

    def worst(self) -> tuple[float, float]:
        """The error and what is allowed, of the group where it is largest beside that.

        They are absolute differences; of integers and bools, how many differ.
        """
        if self.is_exact:
            return self.distance.sum().item(), self.learned
        errors, allowed = self._most(self.distance).tolist(), self.allowed.tolist()
        pairs = [(a / b if b else math.inf if a else 0.0, a, b) for a, b in zip(errors, allowed, strict=True)]
        _, error, bound = max(pairs)
        return error, bound

    def _distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """How far each number is off; infinitely if one of the two is NaN or infinite and the other is not."""
        a, b = a.detach().flatten(), b.detach().flatten()
        if self.is_exact:
            return (a != b).double()
        if a.is_complex():
            a, b = (torch.view_as_real(x.resolve_conj()).flatten() for x in (a, b))
        same = (a == b) | (a.isnan() & b.isnan())
        return torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(torch.inf, torch.inf)

    def _most(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each group."""
        return torch.zeros(GROUPS, dtype=torch.float64, device=values.device).scatter_reduce_(
            0, self.groups, values, "amax"
        )


def is_near(after: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a disturbed graph gives the module's result so nearly that the graph does what the module does."""
    if expected.dtype is not torch.float32 or not expected.numel() or after.shape != expected.shape:
        return torch.equal(after, expected)
    return bool((after - expected).abs().max() <= NEAR * torch.finfo(torch.float32).eps * expected.abs().max())


def _finite(x: torch.Tensor) -> torch.Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.detach()
    return torch.where(x.isfinite(), x, torch.zeros_like(x))


def _groups(magnitude: torch.Tensor) -> torch.Tensor:
    """Which group each number belongs to: 0 for the largest."""
    exponent = torch.where(magnitude > 0, torch.frexp(magnitude).exponent, -(2**20))
    groups = ((exponent.max() - exponent) // SPAN).clamp(0, GROUPS - 1).long()
    counts = torch.bincount(groups, minlength=GROUPS).tolist()
    join = list(range(GROUPS))
    for group in range(GROUPS - 1, 0, -1):
        if counts[group] < SMALLEST:
            counts[group - 1] += counts[group]
            join = [group - 1 if target == group else target for target in join]
    return torch.tensor(join, device=magnitude.device)[groups]
