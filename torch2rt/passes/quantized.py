"""Quantised numbers in a graph: integers and the scales that they stand for."""

from __future__ import annotations

import torch

INT8 = 127.0  # the largest integer that a range is mapped to; its negative is the smallest


def dequantize(weight: torch.Tensor, scale: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Quantised weights as numbers of a floating-point type.

    `weight` is int8; `scale` is float32, a number for each index of the dimension `axis`.

    >>> dequantize(torch.tensor([[2], [-3]], dtype=torch.int8), torch.tensor([0.5, 2.0]), 0, torch.float32)
    tensor([[ 1.],
            [-6.]])
    """
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    return (weight.float() * scale.reshape(shape)).to(dtype)


def quantized(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as int8, and its scales for each index of a dimension: nothing saturates. Zeros have the scale 1."""
    rows = weight.detach().float().transpose(0, axis).flatten(1)
    scale = rows.abs().amax(1) / INT8
    scale = torch.where(scale > 0, scale, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (rows / scale[:, None]).round_().clamp_(-INT8, INT8).to(torch.int8)
    moved = weight.transpose(0, axis).shape
    return steps.reshape(moved).transpose(0, axis).contiguous(), scale
