"""Layers that make a tensor: constants and fills."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, along, dims, ints, require, same_type, torch_type, values


def constant(layer: Any, stored: Stored) -> Run:
    shape = dims(layer.shape) or ()
    output = layer.get_output(0).dtype
    value = values(layer, stored, "weights")
    if value is None:
        value = torch.empty(0, dtype=torch_type(output))
    if output.name == "INT4" and value.dtype == torch.uint8:
        packed = value.to(torch.int16)
        value = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)[: math.prod(shape)]
        value = torch.where(value > 7, value - 16, value).to(torch.int8)
    value = value.reshape(shape)
    return lambda: value


def fill(layer: Any, stored: Stored) -> Run:
    require(layer.operation.name == "LINSPACE", f"{layer.operation} has no reference result")
    static, to = dims(layer.shape), torch_type(layer.to_type)
    number = float if to.is_floating_point else int
    alpha, beta = (None if value is None else number(value) for value in (layer.alpha, layer.beta))

    def run(shape: Tensor | None = None, start: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        size = static if shape is None else ints(shape)
        assert size is not None
        require((start is None) == (delta is None), "alpha and beta must both be inputs, or neither")
        if start is not None and delta is not None:
            require(same_type(start, delta) == to, f"alpha and beta of {start.dtype} for an output of {to}")
            first, steps = start.reshape(()).tolist(), delta.reshape(-1).tolist()
        else:
            first, steps = alpha, [beta] * len(size)
            require(len(size) < 2, "a static beta is for vectors")
        require(len(steps) == len(size), f"{len(steps)} steps for {len(size)} dimensions")
        exact = torch.float64 if to.is_floating_point else torch.int64
        y = torch.full(tuple(size), first, dtype=exact)
        for d, step in enumerate(steps):
            y = y + along(torch.arange(size[d], dtype=exact) * step, d, len(size))
        return y.to(to)

    return run
