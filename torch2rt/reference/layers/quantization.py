"""Layers to and from int8, int4 and fp8."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch2rt.backend.tensorrt import LOG
from torch2rt.reference.layers.common import Run, Stored, along, dims, floats, pick, require, torch_type

QUANTIZED_RANGE = {"INT8": (-128, 127), "INT4": (-8, 7), "FP8": (-448, 448)}


def _scale_like(x: Tensor, scale: Tensor, axis: int, block: tuple[int, ...] | None) -> Tensor:
    """Scales of a tensor, an axis or blocks, broadcastable to the data."""
    require(bool((scale > 0).all()), "scales must be positive")
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and scale.shape != x.shape:
        require(0 <= axis < x.ndim and x.shape[axis] == scale.numel(), f"{axis=} does not fit {scale.numel()} scales")
        return along(scale, axis, x.ndim)
    require(scale.ndim == x.ndim, f"scales of rank {scale.ndim} for data of rank {x.ndim}")
    for d, (n, blocks) in enumerate(zip(x.shape, scale.shape, strict=True)):
        size = n // blocks
        require(size * blocks == n and (block is None or block[d] in (-1, size)), f"blocks of {block} do not fit {n}")
        scale = scale.repeat_interleave(size, d)
    return scale


def _block_shape(layer: Any) -> tuple[int, ...] | None:
    with LOG.capture():
        try:
            return dims(layer.block_shape)
        except (AttributeError, RuntimeError):
            return None


def _no_zero_point(zero: Tensor | None) -> None:
    require(zero is None or not zero.float().any(), "zero points other than 0 are not supported")


def quantize(layer: Any, stored: Stored) -> Run:
    axis, block, to = layer.axis, _block_shape(layer), torch_type(layer.to_type)
    low, high = pick(QUANTIZED_RANGE, layer.to_type)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        _no_zero_point(zero)
        y = floats(x) * (1.0 / _scale_like(x, floats(scale), axis, block))  # as the kernels do, and torch's too
        y = y if to.is_floating_point else y.round()
        return y.clamp(low, high).to(to)

    return run


def dequantize(layer: Any, stored: Stored) -> Run:
    axis, block, to = layer.axis, _block_shape(layer), torch_type(layer.to_type)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        _no_zero_point(zero)
        return (x.float() * _scale_like(x, floats(scale), axis, block)).to(to)

    return run
