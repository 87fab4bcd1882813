"""Softmax, normalization by mean and variance, local response normalization."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch2rt.backend.tensorrt import trt
from torch2rt.reference.layers.common import Run, Stored, bits, floats, require, same_type


def softmax(layer: Any, stored: Stored) -> Run:
    axes = bits(layer.axes)
    require(len(axes) == 1, f"softmax over {axes=}")
    return lambda x: floats(x).softmax(axes[0]).to(x.dtype)


def ragged_softmax(layer: Any, stored: Stored) -> Run:
    def run(x: Tensor, bounds: Tensor) -> Tensor:
        inside = torch.arange(x.shape[-1], device=x.device) < bounds
        y = floats(x).masked_fill(~inside, -math.inf).softmax(-1)
        return y.masked_fill(~inside, 0).to(x.dtype)

    return run


def normalization(layer: Any, stored: Stored) -> Run:
    axes, groups, epsilon = bits(layer.axes), layer.num_groups, layer.epsilon
    precision = getattr(layer, "compute_precision", trt.DataType.FLOAT)
    require(precision == trt.DataType.FLOAT, f"{precision=} is not supported")

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        dtype = same_type(x, scale, bias)
        y, over = floats(x), axes
        scale, bias = scale.float(), bias.float()
        if groups != 1:
            require(axes == tuple(range(2, x.ndim)), f"{axes=} with {groups=}: all axes after the channel are meant")
            require(x.shape[1] % groups == 0, f"{groups=} of {x.shape[1]} channels")
            y, over = y.unflatten(1, (groups, -1)), tuple(range(2, x.ndim + 1))
            if scale.shape[1] == groups:
                scale, bias = (t.repeat_interleave(x.shape[1] // groups, 1) for t in (scale, bias))
        centred = y - y.mean(over, keepdim=True)
        y = centred / (centred.square().mean(over, keepdim=True) + epsilon).sqrt()
        return (y.reshape(x.shape) * scale + bias).to(dtype)

    return run


def lrn(layer: Any, stored: Stored) -> Run:
    """The window is centred and alpha divided by its size, as measured on GPUs: the operator page says otherwise."""
    window, alpha, beta, k = layer.window_size, layer.alpha, layer.beta, layer.k

    def run(x: Tensor) -> Tensor:
        y = floats(x)
        around = F.pad(y.square(), (0, 0, 0, 0, window // 2, window // 2)).unfold(-3, window, 1).sum(-1)
        return (y / (k + alpha / window * around) ** beta).to(x.dtype)

    return run
