"""Sums of products: matrix multiplication and einsum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, accumulator, require, same_type


def matrix_multiply(layer: Any, stored: Stored) -> Run:
    op0, op1 = layer.op0.name, layer.op1.name

    def run(a: Tensor, b: Tensor) -> Tensor:
        dtype = same_type(a, b)
        a = a.unsqueeze(-2) if op0 == "VECTOR" else a.mT if op0 == "TRANSPOSE" else a
        b = b.unsqueeze(-1) if op1 == "VECTOR" else b.mT if op1 == "TRANSPOSE" else b
        require(a.ndim == b.ndim, f"{a.ndim - 2} and {b.ndim - 2} batch dimensions")
        y = accumulator(a) @ accumulator(b)
        y = y.squeeze(-2) if op0 == "VECTOR" else y
        return (y.squeeze(-1) if op1 == "VECTOR" else y).to(dtype)

    return run


def einsum(layer: Any, stored: Stored) -> Run:
    equation = layer.equation

    def run(*operands: Tensor) -> Tensor:
        dtype = same_type(*operands)
        return torch.einsum(equation, *map(accumulator, operands)).to(dtype)

    return run
