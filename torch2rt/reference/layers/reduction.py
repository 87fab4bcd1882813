"""Layers along axes: reductions, cumulative sums, top k."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, bits, limit_of, require, torch_type, wide, without_nan


def reduce(layer: Any, stored: Stored) -> Run:
    op, axes, keep = layer.op.name, bits(layer.axes), layer.keep_dims
    require(op in ("SUM", "PROD", "MAX", "MIN", "AVG"), f"{op=} is not supported")

    def run(x: Tensor) -> Tensor:
        require(x.dtype != torch.bool, "a reduction of bool")
        require(x.dtype != torch.int8 or op in ("MAX", "MIN"), f"{op} of int8 is not supported")
        y = wide(x)
        count = math.prod(x.shape[a] for a in axes)
        if op in ("MAX", "MIN"):
            if count == 0:
                limit = limit_of(x.dtype, op)
                kept = [1 if d in axes else n for d, n in enumerate(x.shape)]
                y = x.new_full(kept if keep else [n for d, n in enumerate(x.shape) if d not in axes], limit)
            else:
                y = without_nan(y, op)
                y = y.amax(axes, keepdim=keep) if op == "MAX" else y.amin(axes, keepdim=keep)
        elif op == "PROD":
            for a in reversed(axes):
                y = y.prod(a, keepdim=keep, dtype=y.dtype)
        elif op == "AVG" and x.is_floating_point():
            y = y.mean(axes, keepdim=keep)
        else:
            y = y.sum(axes, keepdim=keep, dtype=y.dtype)
            y = torch.div(y, max(count, 1), rounding_mode="trunc") if op == "AVG" else y
        return y.to(x.dtype)

    return run


def cumulative(layer: Any, stored: Stored) -> Run:
    require(layer.op.name == "SUM", f"{layer.op} is not supported")
    exclusive, reverse = layer.exclusive, layer.reverse

    def run(x: Tensor, axis_tensor: Tensor) -> Tensor:
        axis = int(axis_tensor)
        y = wide(x)
        y = y.flip(axis) if reverse else y
        if exclusive:
            n = y.shape[axis]
            y = torch.cat([torch.zeros_like(y.narrow(axis, 0, min(n, 1))), y.narrow(axis, 0, max(n - 1, 0))], axis)
        y = y.cumsum(axis, dtype=y.dtype)
        return (y.flip(axis) if reverse else y).to(x.dtype)

    return run


def topk(layer: Any, stored: Stored) -> Run:
    """TensorRT leaves open where a NaN goes; here it is below everything, which torch never has it."""
    dynamic = layer.num_inputs > 1 and layer.get_input(1) is not None
    static = -1 if dynamic else layer.k
    largest, axes = layer.op.name == "MAX", bits(layer.axes)
    index_type = torch_type(layer.get_output(1).dtype)
    require(len(axes) == 1, f"top k over {axes=}")

    def run(x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = static if size is None else int(size)
        require(x.dtype != torch.bool, "top k of bool")
        require(0 <= k <= min(x.shape[axes[0]], 3840), f"{k=} of {x.shape[axes[0]]}, 3840 at most")
        y, index = without_nan(x, "MAX" if largest else "MIN").sort(dim=axes[0], descending=largest, stable=True)
        return y.narrow(axes[0], 0, k).contiguous(), index.narrow(axes[0], 0, k).to(index_type)

    return run
