"""Pooling: the highest, the average, or a blend of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, floats, limit_of, padded, require, without_nan
from torch2rt.reference.layers.windows import Window


def pooling(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.window_size_nd)
    op, n = layer.type.name, len(window.size)
    inside = tuple(range(-n, 0))
    excluding, blend = layer.average_count_excludes_padding, layer.blend_factor
    require(op in ("MAX", "AVERAGE", "MAX_AVERAGE_BLEND"), f"{op=} is not supported")

    def windows(x: Tensor) -> Tensor:
        for size, stride in zip(window.size, window.stride, strict=True):
            x = x.unfold(-n, size, stride)
        return x

    def highest(x: Tensor, pads: Sequence[tuple[int, int, int]]) -> Tensor:
        x = without_nan(x, "MAX")
        outer = [(before, after + over) for before, after, over in pads]
        return windows(padded(x, outer, limit_of(x.dtype, "MAX"))).amax(inside)

    def average(x: Tensor, pads: Sequence[tuple[int, int, int]]) -> Tensor:
        explicit, hanging = [pad[:2] for pad in pads], [(0, over) for *_, over in pads]
        # TensorRT for RTX 1.6 divides by the whole window here, and nothing documented says by what to divide.
        require(excluding or not any(over for *_, over in pads), "an average over windows beyond the padding it counts")
        counted = padded(padded(torch.ones(x.shape[-n:], device=x.device), explicit, 0 if excluding else 1), hanging)
        return windows(padded(padded(x, explicit), hanging)).sum(inside) / windows(counted).sum(inside)

    def run(x: Tensor) -> Tensor:
        require(x.is_floating_point() or op == "MAX", f"{op} of {x.dtype}")
        pads = window.padding(x.shape[-n:])
        if op == "MAX":
            return highest(x, pads)
        if op == "AVERAGE":
            return average(floats(x), pads).to(x.dtype)
        return ((1 - blend) * highest(floats(x), pads) + blend * average(floats(x), pads)).to(x.dtype)

    return run
