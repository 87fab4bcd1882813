"""Layers that read between the elements: resize and grid sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, along, dims, floats, ints, pick, require, same_type

COORDINATES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ALIGN_CORNERS": lambda x, n, m: x * ((n - 1) / (m - 1) if m > 1 else 0),
    "ASYMMETRIC": lambda x, n, m: x * (n / m),
    "HALF_PIXEL": lambda x, n, m: (x + 0.5) * (n / m) - 0.5,
}
ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "HALF_UP": lambda x: (x + 0.5).floor(),
    "HALF_DOWN": lambda x: (x - 0.5).ceil(),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}


def _cubic(distance: Tensor, a: float) -> Tensor:
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize(layer: Any, stored: Stored) -> Run:
    scales = [float(s) for s in layer.scales or ()]
    static = None if scales else dims(layer.shape)
    mode, upper = layer.resize_mode.name, layer.selector_for_single_pixel.name == "UPPER"
    coordinates, rounding = pick(COORDINATES, layer.coordinate_transformation), pick(ROUNDING, layer.nearest_rounding)
    coefficient, exclude = layer.cubic_coeff, layer.exclude_outside
    require(mode in ("NEAREST", "LINEAR", "CUBIC"), f"{mode=} is not supported")

    def taps(at: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """Where to read, and with which weight."""
        if mode == "NEAREST":
            return [(rounding(at), torch.ones_like(at))]
        if mode == "LINEAR":
            at = at.clamp(0, n - 1)
            return [(at.floor(), 1 - at.frac()), (at.floor() + 1, at.frac())]
        places = [at.floor() + i for i in (-1, 0, 1, 2)]
        weights = [_cubic(at - place, coefficient) for place in places]
        if exclude:
            weights = [w * ((p >= 0) & (p < n)) for p, w in zip(places, weights, strict=True)]
            total = torch.stack(weights).sum(0)
            weights = [w / total for w in weights]
        return list(zip(places, weights, strict=True))

    def run(x: Tensor, size: Tensor | None = None) -> Tensor:
        if size is not None:
            target: Sequence[int] = ints(size)
        elif scales:
            target = np.floor(np.array(x.shape, np.float32) * np.array(scales, np.float32)).astype(int).tolist()
        else:
            assert static is not None
            target = static
        resized = [d for d, (n, m) in enumerate(zip(x.shape, target, strict=True)) if n != m]
        innermost = 2 if mode == "CUBIC" else 3
        require(all(d >= x.ndim - innermost for d in resized), f"{mode} resizes the last {innermost} dimensions only")
        single = [target[d] == 1 for d in resized]
        require(not upper or all(single) or not any(single), "selector UPPER where one of the sizes is 1")
        if not resized:
            return x
        y = x if mode == "NEAREST" else floats(x)
        for d in resized:
            n, m = x.shape[d], target[d]
            require(n > 0, "resizing an empty dimension")
            at = coordinates(torch.arange(m, dtype=torch.float32, device=x.device), n, m)
            at = torch.zeros_like(at) if upper and all(single) else at
            reads = [(y.index_select(d, place.long().clamp(0, n - 1)), weight) for place, weight in taps(at, n)]
            y = reads[0][0] if mode == "NEAREST" else torch.stack([r * along(w, d, x.ndim) for r, w in reads]).sum(0)
        return y.to(x.dtype)

    return run


def grid_sample(layer: Any, stored: Stored) -> Run:
    mode = pick({"NEAREST": "nearest", "LINEAR": "bilinear", "CUBIC": "bicubic"}, layer.interpolation_mode)
    outside = pick({"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}, layer.sample_mode)
    align = layer.align_corners

    def run(x: Tensor, grid: Tensor) -> Tensor:
        dtype = same_type(x, grid)
        require(mode != "bicubic" or x.ndim == 4, "cubic grid sampling of volumes is not supported")
        return F.grid_sample(floats(x), floats(grid), mode, outside, align).to(dtype)

    return run
