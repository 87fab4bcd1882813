"""Layers that read, write or find by index: gather, scatter, one hot, non-zero, reversed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, along, pick, require, same_type, take, torch_type


def _resolve(index: Tensor, n: int, declared: int) -> tuple[Tensor, Tensor]:
    """Indices counted from the front, and which of them are in range."""
    index = index.long()
    require(declared >= 0 or not bool((index < 0).any()), "a negative index into a dynamic dimension is undefined")
    index = torch.where(index < 0, index + n, index)
    return index, (index >= 0) & (index < n)


def _gather_axis(data: Tensor, index: Tensor, axis: int, declared: int) -> Tensor:
    flat, valid = _resolve(index.reshape(-1), data.shape[axis], declared)
    y = take(data, axis, flat)
    y = y.masked_fill(~along(valid, axis, y.ndim), 0)
    return y.reshape([*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]])


def _gather_element(data: Tensor, index: Tensor, axis: int, declared: int) -> Tensor:
    n = data.shape[axis]
    at, valid = _resolve(index, n, declared)
    if n == 0:
        return data.new_zeros(index.shape)
    return data.gather(axis, at.clamp(0, n - 1)).masked_fill(~valid, 0)


def _gather_nd(data: Tensor, index: Tensor, batch: int, declared: Sequence[int]) -> Tensor:
    depth = index.shape[-1]
    indexed, rest = data.shape[batch : batch + depth], data.shape[batch + depth :]
    outer = data.shape[:batch]
    require(index.shape[:batch] == outer, f"{batch} elementwise dimensions: {tuple(index.shape)}, {tuple(data.shape)}")
    linear = torch.zeros(index.shape[:-1], dtype=torch.int64, device=data.device)
    valid = torch.ones_like(linear, dtype=torch.bool)
    for i, n in enumerate(indexed):
        at, inside = _resolve(index[..., i], n, declared[batch + i])
        linear, valid = linear * n + at, valid & inside
    size = math.prod(indexed)
    row = torch.arange(math.prod(outer), device=data.device).reshape(*outer, *[1] * (linear.ndim - batch))
    linear = torch.where(valid, row * size + linear, 0).reshape(-1)
    y = take(data.reshape(math.prod(outer) * size, math.prod(rest)), 0, linear)
    y = y.masked_fill(~valid.reshape(-1, 1), 0)
    return y.reshape(*index.shape[:-1], *rest)


def gather(layer: Any, stored: Stored) -> Run:
    mode, axis, batch = layer.mode.name, layer.axis, layer.num_elementwise_dims
    declared = tuple(layer.get_input(0).shape)

    def run(data: Tensor, index: Tensor) -> Tensor:
        if mode == "ND":
            return _gather_nd(data, index, batch, declared)
        if mode == "ELEMENT":
            require(batch == 0, f"{batch} elementwise dimensions with {mode=}")
            return _gather_element(data, index, axis, declared[axis])
        if batch == 0:
            return _gather_axis(data, index, axis, declared[axis])
        require(mode == "DEFAULT" and batch == 1 and axis > 0, f"{mode=}, {axis=}, {batch} elementwise dimensions")
        rows = max(data.shape[0], index.shape[0]) if 0 not in (data.shape[0], index.shape[0]) else 0
        require(rows > 0, "gathering from an empty batch is not supported")
        data, index = data.expand(rows, *data.shape[1:]), index.expand(rows, *index.shape[1:])
        return torch.stack([_gather_axis(d, i, axis - 1, declared[axis]) for d, i in zip(data, index, strict=True)])

    return run


def _in_range(index: Tensor, n: int) -> Tensor:
    index = index.long()
    require(bool(((index >= 0) & (index < n)).all()), f"an index outside of 0 to {n - 1}")
    return index


def _written_once(updates: Tensor, found: Tensor) -> None:
    kept = (updates == found) | ((updates != updates) & (found != found))
    require(bool(kept.all()), "several updates for one element: the result is undefined")


def _scatter_element(data: Tensor, index: Tensor, updates: Tensor, axis: int) -> Tensor:
    index = _in_range(index, data.shape[axis])
    y = data.scatter(axis, index, updates)
    _written_once(updates, y.gather(axis, index))
    return y


def _scatter_nd(data: Tensor, index: Tensor, updates: Tensor, axis: int) -> Tensor:
    depth = index.shape[-1]
    linear = torch.zeros(index.shape[:-1], dtype=torch.int64, device=data.device)
    for i, n in enumerate(data.shape[:depth]):
        linear = linear * n + _in_range(index[..., i], n)
    linear = linear.reshape(-1)
    rest = math.prod(data.shape[depth:])
    rows, new = data.reshape(math.prod(data.shape[:depth]), rest).clone(), updates.reshape(linear.numel(), rest)
    rows[linear] = new
    _written_once(new, rows[linear])
    return rows.reshape(data.shape)


def scatter(layer: Any, stored: Stored) -> Run:
    write, axis = pick({"ELEMENT": _scatter_element, "ND": _scatter_nd}, layer.mode), layer.axis

    def run(data: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        same_type(data, updates)
        return write(data, index, updates, axis)

    return run


def one_hot(layer: Any, stored: Stored) -> Run:
    axis = layer.axis

    def run(index: Tensor, on_off: Tensor, depth: Tensor) -> Tensor:
        n = int(depth)
        index = _in_range(index, n).unsqueeze(axis)
        classes = along(torch.arange(n, device=index.device), axis % index.ndim, index.ndim)
        return torch.where(index == classes, on_off[1], on_off[0])

    return run


def non_zero(layer: Any, stored: Stored) -> Run:
    to = torch_type(layer.get_output(0).dtype)
    return lambda x: x.nonzero().t().to(to)


def reverse_sequence(layer: Any, stored: Stored) -> Run:
    batch, sequence = layer.batch_axis, layer.sequence_axis

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        n = x.shape[sequence]
        at = torch.arange(n, device=x.device).expand(x.shape[batch], n)
        ends = lengths.long()[:, None]
        at = torch.where(at < ends, ends - 1 - at, at)
        moved = x.movedim((batch, sequence), (0, 1))
        rows = [row.index_select(0, order) for row, order in zip(moved, at, strict=True)]
        return torch.stack(rows).movedim((0, 1), (batch, sequence)) if rows else x

    return run
