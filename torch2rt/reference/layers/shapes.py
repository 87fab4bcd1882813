"""Layers that read or change a shape: shuffle, slice, padding, concatenation, squeeze, unsqueeze, and shape itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, along, dims, ints, padded, require, same_type, take


def shape_of(layer: Any, stored: Stored) -> Run:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def shuffle(layer: Any, stored: Stored) -> Run:
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    static, placeholder = dims(layer.reshape_dims), layer.zero_is_placeholder

    def run(x: Tensor, dynamic: Tensor | None = None) -> Tensor:
        x = x.permute(first[: x.ndim])
        shape = static if dynamic is None else ints(dynamic)
        if shape is not None:
            shape = [x.shape[i] if d == 0 and placeholder else d for i, d in enumerate(shape)]
            x = x.reshape(shape)
        return x.permute(second[: x.ndim])

    return run


def _sampled(mode: str, index: Tensor, n: int) -> Tensor:
    """Coordinates of a slice brought into the data; those of FILL are left outside."""
    if mode == "FILL" or not index.numel():
        return index
    require(n > 0, f"{mode} of an empty dimension")
    if mode == "STRICT_BOUNDS":
        first, last = int(index[0]), int(index[-1])
        require(min(first, last) >= 0 and max(first, last) < n, f"reads elements {first} to {last} of {n}")
        return index
    if mode == "WRAP":
        return index % n
    if mode == "CLAMP":
        return index.clamp(0, n - 1)
    require(mode == "REFLECT", f"{mode=} is not supported")
    around = index % max(2 * (n - 1), 1)
    return torch.minimum(around, 2 * (n - 1) - around)


def slice_(layer: Any, stored: Stored) -> Run:
    static = dims(layer.start), dims(layer.shape), dims(layer.stride)
    static_axes, mode = dims(getattr(layer, "axes", None)), layer.mode.name

    def run(
        x: Tensor,
        start: Tensor | None = None,
        size: Tensor | None = None,
        stride: Tensor | None = None,
        fill: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Tensor:
        require(fill is None or mode == "FILL", f"a fill value with {mode=}")
        first, count, step = (s if t is None else ints(t) for s, t in zip(static, (start, size, stride), strict=True))
        where = ints(axes) if axes is not None else static_axes or range(x.ndim)
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for axis, at, m, by in zip(where, first or (), count or (), step or (), strict=True):
            axis, n = axis % x.ndim, x.shape[axis]
            if (at, m, by) == (0, n, 1):
                continue
            index = _sampled(mode, at + by * torch.arange(m, device=x.device), n)
            if mode == "FILL":
                inside = inside & along((index >= 0) & (index < n), axis, x.ndim)
            x = take(x, axis, index)
        if mode != "FILL" or bool(inside.all()):
            return x
        if fill is None:
            return x.masked_fill(~inside, 0)
        require(fill.dtype == x.dtype or (fill.is_floating_point() and x.is_floating_point()), f"fill of {fill.dtype}")
        return torch.where(inside, x, fill.reshape(()).to(x.dtype))

    return run


def padding(layer: Any, stored: Stored) -> Run:
    pads = list(zip(layer.pre_padding_nd, layer.post_padding_nd, strict=True))
    return lambda x: padded(x, pads)


def concatenation(layer: Any, stored: Stored) -> Run:
    axis = layer.axis

    def run(*tensors: Tensor) -> Tensor:
        same_type(*tensors)
        require(len({t.ndim for t in tensors}) == 1, "ranks differ")
        return torch.cat(tensors, axis)

    return run


def squeeze(layer: Any, stored: Stored) -> Run:
    declared = tuple(layer.get_input(0).shape)

    def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
        if axes is None:
            require(not any(d == -1 and n == 1 for d, n in zip(declared, x.shape, strict=True)), "a dynamic size is 1")
            drop = [i for i, d in enumerate(declared) if d == 1]
        else:
            drop = [a % x.ndim for a in ints(axes)]
        require(all(x.shape[a] == 1 for a in drop), f"sizes of {drop} in {tuple(x.shape)} are not 1")
        return x.reshape([n for i, n in enumerate(x.shape) if i not in drop])

    return run


def unsqueeze(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(a % rank for a in ints(axes)):
            x = x.unsqueeze(axis)
        return x

    return run
