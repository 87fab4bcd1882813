"""Layers that go element by element: identity and casts, activations, arithmetic, comparisons, selection, scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, floats, pick, require, same_type, torch_type, values, wide


def identity(layer: Any, stored: Stored) -> Run:
    return lambda x: x


def cast(layer: Any, stored: Stored) -> Run:
    to = torch_type(layer.to_type)
    return lambda x: x.to(to)


ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: x.clamp_min(0),
    "SIGMOID": lambda x, a, b: x.sigmoid(),
    "TANH": lambda x, a, b: x.tanh(),
    "LEAKY_RELU": lambda x, a, b: x.clamp_min(0) + a * x.clamp_max(0),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * x.expm1()),
    "SELU": lambda x, a, b: b * torch.where(x > 0, x, a * x.exp() - a),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.logaddexp(b * x, torch.zeros_like(x)),
    "CLIP": lambda x, a, b: torch.fmin(torch.fmax(x, x.new_tensor(a)), x.new_tensor(b)),
    "HARD_SIGMOID": lambda x, a, b: torch.fmax(torch.fmin(a * x + b, x.new_tensor(1)), x.new_tensor(0)),
    "SCALED_TANH": lambda x, a, b: a * (b * x).tanh(),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(0.5) * x).erf()),
    "GELU_TANH": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (0.044715 * x**3 + x)).tanh()),
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name.lower())
        for name in """
            EXP LOG SQRT ABS NEG SIN COS TAN SINH COSH ASIN ACOS ATAN ASINH ACOSH ATANH CEIL FLOOR ERF
            ROUND ISINF ISNAN
        """.split()
    },
    "RECIP": torch.reciprocal,
    "SIGN": lambda x: torch.where(x == x, x.sign(), x),  # NaN stays NaN, where torch makes it 0
    "NOT": torch.logical_not,
}
UNARY_INTEGER = {"ABS", "NEG", "SIGN"}


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    return (a / b).floor() if a.is_floating_point() else torch.div(a, b, rounding_mode="floor")


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.fmax,  # of a NaN and a number, GPUs give the number
    "MIN": torch.fmin,
    "SUB": torch.sub,
    "DIV": _divide,
    "POW": torch.pow,
    "FLOOR_DIV": _floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
LOGICAL = {"AND", "OR", "XOR"}
COMPARISONS = {"EQUAL", "GREATER", "LESS"}


def activation(layer: Any, stored: Stored) -> Run:
    name, op, alpha, beta = layer.type.name, pick(ACTIVATIONS, layer.type), layer.alpha, layer.beta

    def run(x: Tensor) -> Tensor:
        require(x.is_floating_point() or name == "RELU", f"{name} of {x.dtype}")
        return op(wide(x), alpha, beta).to(x.dtype)

    return run


def unary(layer: Any, stored: Stored) -> Run:
    name, op = layer.op.name, pick(UNARY, layer.op)

    def run(x: Tensor) -> Tensor:
        known = x.dtype == torch.bool if name == "NOT" else x.is_floating_point() or name in UNARY_INTEGER
        require(known, f"{name} of {x.dtype}")
        y = op(wide(x))
        return y if y.dtype == torch.bool else y.to(x.dtype)

    return run


def elementwise(layer: Any, stored: Stored) -> Run:
    name, op = layer.op.name, pick(ELEMENTWISE, layer.op)

    def run(a: Tensor, b: Tensor) -> Tensor:
        dtype = same_type(a, b)
        require(a.ndim == b.ndim, f"ranks {a.ndim} and {b.ndim} differ")
        require(name == "EQUAL" or (name in LOGICAL) == (dtype == torch.bool), f"{name} of {dtype}")
        y = op(wide(a), wide(b))
        return y if name in COMPARISONS else y.to(dtype)

    return run


def select(layer: Any, stored: Stored) -> Run:
    def run(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        same_type(a, b)
        require(condition.dtype == torch.bool, f"a condition of {condition.dtype}")
        require(condition.ndim == a.ndim == b.ndim, f"ranks {condition.ndim}, {a.ndim} and {b.ndim} differ")
        return torch.where(condition, a, b)

    return run


def parametric_relu(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, slopes: Tensor) -> Tensor:
        dtype = same_type(x, slopes)
        return torch.where(x < 0, wide(x) * wide(slopes), wide(x)).to(dtype)

    return run


def scale(layer: Any, stored: Stored) -> Run:
    mode, axis = layer.mode.name, layer.channel_axis
    parts = {role: values(layer, stored, role) for role in ("scale", "shift", "power")}

    def run(x: Tensor) -> Tensor:
        same_type(x, *parts.values())
        shape = {"UNIFORM": (), "CHANNEL": x.shape[axis : axis + 1], "ELEMENTWISE": x.shape[axis:]}[mode]
        trailing = (1,) * (x.ndim - axis - 1) if mode == "CHANNEL" else ()
        weight = {k: floats(v).to(x.device).reshape((*shape, *trailing)) for k, v in parts.items() if v is not None}
        y = floats(x) * weight.get("scale", 1.0) + weight.get("shift", 0.0)
        return (y ** weight["power"] if "power" in weight else y).to(x.dtype)

    return run
