"""What patterns are made of: blocks with parts that can be exchanged, and layers of one's own choice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from torch2rt.backend.tensorrt import trt
from torch2rt.vocabulary import converter, elementwise, matmul

EW = trt.ElementWiseOperation


class Pattern(NamedTuple):
    """A block of a model; each of `others` is another formulation of it: its name, and the parts that differ."""

    block: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]  # by the batch size
    others: dict[str, dict[str, Any]]
    places: int = 1  # how often the block stands in the network

    def formulations(self) -> dict[str, nn.Module]:
        block = self.block()
        if not isinstance(block, Block):
            return {"torch2rt": block}
        modules = {"as written": block, **{name: block.with_(**parts) for name, parts in self.others.items()}}
        return {name: Chain(module, self.places) for name, module in modules.items()}


class Block(nn.Module):
    """A module with functions as attributes: `with_(pool=f)` is the same module with `f` as `pool`, wherever it is."""

    def with_(self, **parts: Any) -> Block:
        other = copy.deepcopy(self)
        for name, part in parts.items():
            owners = [module for module in other.modules() if name in vars(module)]
            if not owners:
                raise AttributeError(f"{type(self).__name__} has no part {name!r}")
            for module in owners:
                setattr(module, name, part)
        return other

    def prepare(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arguments of the first block, from the inputs of the network; the others get all but the first again."""
        return inputs


class Chain(nn.Module):
    """A block after itself, so that the ends of the network count for less."""

    def __init__(self, block: Block, times: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(times))

    def forward(self, *inputs):
        x, *others = self.blocks[0].prepare(*inputs)
        for block in self.blocks:
            x = block(x, *others)
        return x


def image(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


# Layers --------------------------------------------------------------------------------------------------------------


def layer(lowering: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The torch function, with layers of one's own choice."""

    def call(*args: Any) -> Any:
        tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
        return handle_torch_function(call, tensors, *args) if has_torch_function(tensors) else function(*args)

    converter(call)(lowering)
    return call


def _convolution(ctx, x, weight, bias, stride, padding):
    kernel, shift = ctx.weights(weight, "kernel"), ctx.weights(bias, "bias")
    layer = ctx.network.add_convolution_nd(x, weight.shape[0], tuple(weight.shape[2:]), kernel, shift)
    layer.stride_nd, layer.padding_nd = stride, padding
    return ctx.track(layer.get_output(0), ctx.out.shape)


def _times(ctx, x, factor):
    return elementwise(ctx, EW.PROD, x, factor, ctx.out.dtype)


def _times_transposed(ctx, a, b):
    return matmul(ctx, a, b, transpose_b=True)


# a convolution layer, whatever the sizes; a product without the detour to float32; a transposition by a flag
convolution = layer(_convolution, F.conv2d)
times = layer(_times, lambda x, factor: x * factor)
times_transposed = layer(_times_transposed, lambda a, b: a @ b.mT)
