"""The range to quantise a value to, from a histogram of its absolute values on calibration data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from torch2rt.passes.quantization.quantized import FP8, INT8

BINS = 2048
FIRST = 128  # bins that a threshold leaves at least: as many as an int8 has absolute values
MOST = 32 * BINS  # bins; where more would be needed, they become twice as wide
FEWEST = 8
PERCENTILE = 99.99


@dataclasses.dataclass(frozen=True)
class Number:
    """A type that values are quantised to: its largest number, and how numbers up to that are rounded in it."""

    largest: float
    rounded: Callable[[np.ndarray], np.ndarray]


def _fp8(x: np.ndarray) -> np.ndarray:
    """Rounded to 3 bits after the point, and to multiples of 2 ** -9 where that is coarser."""
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(x, 2.0**-9))), -6) - 3)
    rounded: np.ndarray = np.round(x / step) * step
    return rounded


INT8_NUMBER, FP8_NUMBER = Number(INT8, np.round), Number(FP8, _fp8)


class Histogram:
    """Counts of absolute values: 2,048 bins up to the largest of the first batch, and further ones as they are needed.

    >>> histogram = Histogram()
    >>> histogram.add(torch.tensor([0.5, -2.0]))
    >>> histogram.largest, int(histogram.counts.sum()), histogram.width == 2 / BINS
    (2.0, 2, True)
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.width = 0.0
        self.counts = np.zeros(0)
        self.zeros = 0  # seen before anything else was
        self.nonzero = 0
        self.not_finite: str | None = None

    def add(self, x: torch.Tensor, extent: tuple[float, float] | None = None) -> None:
        """Count a tensor's values; of one with a NaN or an infinity, only remember that.

        `extent`: its least and its largest value, where they are known.
        """
        x = x.detach().float().flatten()
        if not x.numel():
            return
        low, high = (float(end) for end in torch.aminmax(x)) if extent is None else extent
        x = x if low >= 0 else x.abs()
        largest = math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)
        if not math.isfinite(largest):
            self.not_finite = "NaN" if math.isnan(largest) else "an infinity"
            return
        self.largest = max(self.largest, largest)
        self.nonzero += int(torch.count_nonzero(x))
        if not self.largest:
            self.zeros += x.numel()
            return
        if not self.width:
            self.width, self.counts = max(largest / BINS, np.finfo(np.float32).tiny), np.zeros(BINS)
            self.counts[0] += self.zeros
        self._reach(largest)
        size = len(self.counts)
        counted = torch.histc(x, size, 0.0, size * self.width)
        missing = x.numel() - int(counted.double().sum())  # the largest, where rounding put it past the last bin
        self.counts += counted.double().cpu().numpy()
        self.counts[-1] += max(missing, 0)

    def _reach(self, largest: float) -> None:
        """Add bins until they hold a number, and make them wider where there would be too many."""
        while largest > MOST * self.width:
            counts = np.pad(self.counts, (0, len(self.counts) % 2))
            self.width, self.counts = 2 * self.width, counts.reshape(-1, 2).sum(1)
        needed = max(BINS, math.ceil(largest / self.width - 1e-6))
        if needed > len(self.counts):
            self.counts = np.pad(self.counts, (0, needed - len(self.counts)))

    def lost(self, largest: float, number: Number) -> float:
        """The share of the values but 0 that become 0 where this is the largest that a type's largest number is for.

        >>> histogram = Histogram()
        >>> histogram.add(torch.tensor([0.0] * 50 + [0.001] * 99 + [1.0]))
        >>> histogram.lost(1.0, INT8_NUMBER), histogram.lost(0.01, INT8_NUMBER)
        (0.99, 0.0)
        """
        centers = self.edges[:-1] + self.width / 2
        small = self.counts[number.rounded(centers / largest * number.largest) == 0].sum()
        zeros = self.counts.sum() - self.nonzero
        return max(0.0, float(small - zeros)) / max(self.nonzero, 1)

    @property
    def edges(self) -> np.ndarray:
        return self.width * np.arange(len(self.counts) + 1)


def minmax(histogram: Histogram, number: Number = INT8_NUMBER) -> float:
    """The largest value: nothing saturates."""
    return histogram.largest


def percentile(histogram: Histogram, number: Number = INT8_NUMBER) -> float:
    """The left edge of the first bin at which 99.99 % of the values are reached."""
    reached = np.cumsum(histogram.counts) / histogram.counts.sum()
    return float(histogram.edges[np.searchsorted(reached, PERCENTILE / 100)])


def mse(histogram: Histogram, number: Number = INT8_NUMBER) -> float:
    """The centre of a bin for which the squared error of quantised bin centres is least."""
    centers, counts = histogram.edges[:-1] + histogram.width / 2, histogram.counts
    used = counts > 0
    values, weights = centers[used], counts[used]
    errors, tried = [], centers[FIRST :: max(1, len(counts) // (4 * BINS))]
    for largest in tried:
        scale = largest / number.largest
        back = number.rounded(np.minimum(values / scale, number.largest)) * scale
        errors.append(float(((back - values) ** 2 * weights).sum()))
    return float(tried[int(np.argmin(errors))])


def entropy(histogram: Histogram, number: Number = INT8_NUMBER) -> float:
    """The threshold for which the Kullback-Leibler divergence of quantised from saturated values is least.

    Of those up to each edge from the 128th on, the last with the least divergence. The first bin counts as the second
    does, as zeros say nothing about a scale. With fewer numbers than `FEWEST` for each bin most bins are empty, and the
    divergence says nothing: then it is the largest value. It is for int8, whose numbers are 128 groups of equal size.
    """
    if histogram.counts.sum() < FEWEST * len(histogram.counts):
        return minmax(histogram)
    counts = histogram.counts.copy()
    counts[0] = counts[1]
    sizes = np.array([*range(FIRST, len(counts), max(1, len(counts) // (4 * BINS))), len(counts)])
    parts = [_divergences(counts, part) for part in np.array_split(sizes, -(-len(sizes) // 1024))]
    divergences = np.concatenate(parts)
    (least,) = np.nonzero(divergences <= divergences.min() + 1e-12)
    return float(histogram.edges[sizes[least[-1]]])


def _divergences(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For so many bins: that of their counts, the last with the tail, from what 128 groups of bins can tell apart.

    With all counts `n`, the counts of bins `f`, and of groups the mean count `c` of bins that are not empty, whose sum
    is `q`, it is the sum of `f / n * log((f / n) / (c / q))`. Sums over bins are differences of running sums.
    """
    total, is_used = counts.sum(), counts > 0
    logs = counts * np.log(np.where(is_used, counts, 1.0))
    running, used, entropies = (np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, is_used, logs))
    starts = np.ceil(np.linspace(0, sizes, FIRST + 1, axis=1) - 1e-9).astype(int)
    sums = np.diff(running[starts], axis=1)
    means = sums / np.maximum(np.diff(used[starts], axis=1), 1)
    coarse_logs = np.log(np.where(means > 0, means, 1.0))
    last, tails = counts[sizes - 1], total - running[sizes]
    with_tail = last + tails
    fine = entropies[sizes] - logs[sizes - 1] + with_tail * np.log(np.where(with_tail > 0, with_tail, 1.0))
    coarse = (sums * coarse_logs).sum(1) + tails * coarse_logs[:, -1]
    seen = running[sizes]
    found = (fine - coarse) / total + np.log(np.where(seen > 0, seen, 1.0) / total)
    # a tail in an empty bin, which no group of bins can stand for
    return np.where((last == 0) & (tails > 1e-9 * total) | (seen == 0), math.inf, found)


METHODS: dict[str, Callable[[Histogram, Number], float]] = {
    "entropy": entropy,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}
