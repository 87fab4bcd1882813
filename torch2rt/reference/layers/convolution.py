"""Convolution and deconvolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, accumulator, padded, require, same_type, values
from torch2rt.reference.layers.windows import Window


def _kernels(layer: Any, stored: Stored) -> Run:
    """Whether kernel and bias are weights or inputs: both as tensors, checked against the data's type."""
    kernel, bias = values(layer, stored, "kernel"), values(layer, stored, "bias")

    def get(x: Tensor, k: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        require(k is None or kernel is None, "a kernel both as weights and as input")
        require(b is None or bias is None, "a bias both as weights and as input")
        k, b = kernel if k is None else k, bias if b is None else b
        assert k is not None
        same_type(x, k, b)
        return accumulator(k.to(x.device)), None if b is None else accumulator(b.to(x.device))

    return get


def _batched(x: Tensor, n: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """All dimensions before the channel are batch."""
    y = run(x.reshape(math.prod(x.shape[: -n - 1]), *x.shape[-n - 1 :]))
    return y.reshape(*x.shape[: -n - 1], *y.shape[1:])


def convolution(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.kernel_size_nd, layer.dilation_nd)
    maps, groups, n, kernels = layer.num_output_maps, layer.num_groups, len(window.size), _kernels(layer, stored)
    conv = {2: F.conv2d, 3: F.conv3d}[n]

    def run(x: Tensor, k: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        kernel, bias = kernels(x, k, b)
        kernel = kernel.reshape(maps, x.shape[-n - 1] // groups, *window.size)
        pads = [(before, after + over) for before, after, over in window.padding(x.shape[-n:])]
        y = padded(accumulator(x), pads)
        stride, dilation = window.stride, window.dilation
        return _batched(y, n, lambda t: conv(t, kernel, bias, stride, 0, dilation, groups)).to(x.dtype)

    return run


def deconvolution(layer: Any, stored: Stored) -> Run:
    window = Window.of(layer, layer.kernel_size_nd, layer.dilation_nd)
    maps, groups, n, kernels = layer.num_output_maps, layer.num_groups, len(window.size), _kernels(layer, stored)
    conv = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]

    def run(x: Tensor, k: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        kernel, bias = kernels(x, k, b)
        kernel = kernel.reshape(x.shape[-n - 1], maps // groups, *window.size)
        stride, dilation = window.stride, window.dilation
        y = _batched(accumulator(x), n, lambda t: conv(t, kernel, bias, stride, 0, 0, groups, dilation))
        return padded(y, [(-before, -after) for before, after in window.cropping()]).to(x.dtype)

    return run
