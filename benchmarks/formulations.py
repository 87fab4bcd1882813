"""Which way of writing a block in TensorRT layers runs fastest: the converters' own, and others that mean the same.

    python benchmarks/formulations.py [--only TEXT] [--batch 1,16] [--onnx] [--json FILE]
    python benchmarks/formulations.py --models all [--batch 1,16] [--json FILE]
    python benchmarks/formulations.py --build-only

Blocks of resnet50, mobilenet_v3_large, efficientnet_b0, convnext_tiny, vit_b_16, swin_t and BERT, in half precision and
in the shapes these models use them in. The first formulation of a block is the plain torch code, as the converters
lower it; the others are other torch code, or layers that no converter adds. With `--onnx` one more is what TensorRT's
own ONNX parser makes of the plain code, and `--models` puts whole models through both, with the time of each kernel.

Engines are built in processes of their own, many at a time, and then measured one after the other: the median over
replays of a CUDA graph of many calls. The error is the largest one against float32 in torch, over the largest value.
`--build-only` needs no GPU and shows how many kernels TensorRT makes of each formulation.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from torch2rt.converters import attention as attention_converters

from torch2rt import build, lower, trace
from torch2rt.backend import FLAVOUR, LOG, VERSION, create_builder, create_execution_context, create_network, trt
from torch2rt.kernels import KernelCache
from torch2rt.lowering import Network
from torch2rt.runtime import Runtime
from torch2rt.vocabulary import axes, cast, constant, converter, dims, elementwise, matmul, reduce

CALLS = 20  # in one CUDA graph
REPLAYS = 25

EW, Reduce = trt.ElementWiseOperation, trt.ReduceOperation


# Layers that no converter adds in this form --------------------------------------------------------------------------


def layer(lowering: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A torch function with layers of its own choice."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
            return handle_torch_function(call, tensors, *args) if has_torch_function(tensors) else function(*args)

        converter(call)(lowering)
        return call

    return wrap


def _mean(ctx, x, dtype):
    x = cast(ctx, x, dtype)
    y = ctx.network.add_reduce(x, Reduce.AVG, axes([2, 3], 4), True).get_output(0)
    return cast(ctx, ctx.track(y, (*dims(ctx, x)[:2], 1, 1)), ctx.out.dtype)


@layer(_mean)
def mean(x, dtype):
    """The mean of each plane: one reduce layer over both axes, in this type."""
    return x.mean((2, 3), keepdim=True)


def _means(ctx, x):
    x = cast(ctx, x, torch.float32)
    return cast(ctx, reduce(ctx, Reduce.AVG, x, [2, 3], True), ctx.out.dtype)


@layer(_means)
def means(x):
    """The mean of each plane: a reduce layer for each axis, in float32."""
    return x.mean((2, 3), keepdim=True)


def _pool(ctx, x):
    y = ctx.network.add_pooling_nd(x, trt.PoolingType.AVERAGE, tuple(dims(ctx, x)[2:])).get_output(0)
    return ctx.track(y, (*dims(ctx, x)[:2], 1, 1))


@layer(_pool)
def pool(x):
    """The mean of each plane: one pooling layer."""
    return x.mean((2, 3), keepdim=True)


def _flat_mean(ctx, x):
    return reduce(ctx, Reduce.AVG, x, -1)


@layer(_flat_mean)
def flat_mean(x):
    """The mean along the last axis: one reduce layer, in the tensor's own type."""
    return x.mean(-1)


def _times(ctx, x, factor):
    return elementwise(ctx, EW.PROD, x, factor, ctx.out.dtype)


@layer(_times)
def times(x, factor):
    """A tensor times a number, without the detour to float32."""
    return x * factor


def _times_transposed(ctx, a, b):
    return matmul(ctx, a, b, transpose_b=True)


@layer(_times_transposed)
def times_transposed(a, b):
    """`a @ b.T` with the transposition as a flag of the matrix layer."""
    return a @ b.mT


def _softmax_float(ctx, x):
    y = ctx.network.add_softmax(cast(ctx, x, torch.float32))
    y.axes = 1 << (len(dims(ctx, x)) - 1)
    return cast(ctx, ctx.track(y.get_output(0), dims(ctx, x)), ctx.out.dtype)


@layer(_softmax_float)
def softmax_float(x):
    """A softmax of float32 values."""
    return x.float().softmax(-1).to(x.dtype)


def _attend(ctx, query, key, value, mask):
    return attention_converters.fused(ctx, query, key, value, mask, False, False)


@layer(_attend)
def attend(query, key, value, mask=None):
    """TensorRT's attention layer on queries that are scaled already, whatever the mask."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)


def _old_norm(ctx, x, weight, bias, eps):
    shape = (*[1] * (len(dims(ctx, x)) - 1), -1)
    scale, shift = (constant(ctx, v.reshape(shape)) for v in (weight, bias))
    y = ctx.network.add_normalization(x, scale, shift, 1 << (len(shape) - 1))
    y.epsilon = eps
    return ctx.track(y.get_output(0), dims(ctx, x))


@layer(_old_norm)
def old_norm(x, weight, bias, eps):
    """The first version of the normalization layer."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _clip_swish(ctx, x):
    shifted = elementwise(ctx, EW.SUM, x, 3.0, ctx.out.dtype)
    y = ctx.network.add_activation(shifted, trt.ActivationType.CLIP)
    y.alpha, y.beta = 0.0, 6.0
    gate = elementwise(ctx, EW.PROD, ctx.track(y.get_output(0), dims(ctx, x)), 1 / 6, ctx.out.dtype)
    return elementwise(ctx, EW.PROD, x, gate)


@layer(_clip_swish)
def clip_swish(x):
    """Hard-swish as x * clip(x + 3, 0, 6) / 6."""
    return F.hardswish(x)


# Blocks --------------------------------------------------------------------------------------------------------------


class Formulation(NamedTuple):
    """A module in float32 whose half precision is built; with `onnx`, by TensorRT's ONNX parser."""

    module: nn.Module
    onnx: bool = False


class Block(nn.Module):
    """A block whose parts can be exchanged: `with_(pool=mean)` is the same with another function as `pool`."""

    def with_(self, fold: bool = False, **parts: Any) -> Any:
        other = copy.deepcopy(self)
        for name, part in parts.items():
            setattr(other, name, part)
        return folded(other) if fold else other


class ConvBN(nn.Sequential):
    """A convolution and its batch normalization, with statistics that are not trivial."""

    def __init__(self, maps: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(maps, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(out)
        nn.init.normal_(conv.weight, std=(2 / (maps // groups * kernel**2)) ** 0.5)
        with torch.no_grad():
            norm.running_mean.normal_(std=0.1), norm.bias.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5), norm.weight.uniform_(0.5, 1.5)
        super().__init__(conv, norm)


class BiasApart(nn.Module):
    """A convolution whose bias is added by a layer of its own."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.bias = conv, nn.Parameter(conv.bias.detach().reshape(-1, 1, 1))
        self.conv.bias = None

    def forward(self, x):
        return self.conv(x) + self.bias


def folded(module: nn.Module, wrap: Callable[[nn.Conv2d], nn.Module] = lambda conv: conv) -> nn.Module:
    """A copy in which batch normalizations are part of the convolutions before them."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvBN):
                setattr(parent, name, wrap(nn.utils.fuse_conv_bn_eval(child[0].eval(), child[1].eval())))
    return module


def adaptive(x):
    return F.adaptive_avg_pool2d(x, 1)


POOLS = {
    "mean as two float32 reductions": means,
    "mean as one float32 reduction": lambda x: mean(x, torch.float32),
    "mean as one half reduction": lambda x: mean(x, torch.float16),
    "mean as pooling": pool,
    "mean of flat planes in float32": lambda x: x.flatten(2).float().mean(-1)[:, :, None, None].to(x.dtype),
    "mean of flat planes in half": lambda x: flat_mean(x.flatten(2))[:, :, None, None],
}  # fmt: skip


class Bottleneck(Block):
    """Of resnet50."""

    def __init__(self, maps: int, mid: int) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(maps, mid, 1), ConvBN(mid, mid, 3), ConvBN(mid, maps, 1)

    def forward(self, x):
        return (self.c(self.b(self.a(x).relu()).relu()) + x).relu()


class ChannelsLast(nn.Module):
    """A block whose input and output are (batch, height, width, channels)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(Block):
    """Of resnet50."""

    def __init__(self) -> None:
        super().__init__()
        self.a = ConvBN(3, 64, 7, 2)

    def forward(self, x):
        return F.max_pool2d(self.a(x).relu(), 3, 2, 1)


class Inverted(Block):
    """A block with squeeze and excitation, of mobilenet_v3_large or efficientnet_b0."""

    def __init__(self, maps: int, mid: int, squeezed: int, kernel: int, swish: Any, relu: Any, gate: Any) -> None:
        super().__init__()
        self.a, self.b = ConvBN(maps, mid, 1), ConvBN(mid, mid, kernel, groups=mid)
        self.c = ConvBN(mid, maps, 1)
        self.down, self.up = nn.Conv2d(mid, squeezed, 1), nn.Conv2d(squeezed, mid, 1)
        self.swish, self.relu, self.gate, self.pool = swish, relu, gate, adaptive

    def excite(self, x):
        return self.gate(self.up(self.relu(self.down(self.pool(x)))))

    def forward(self, x):
        y = self.swish(self.b(self.swish(self.a(x))))
        return self.c(self.excite(y) * y) + x


class InvertedLinear(Inverted):
    """The same with matrix products for the gate."""

    def excite(self, x):
        y = self.pool(x).flatten(1)
        y = self.relu(F.linear(y, self.down.weight.flatten(1), self.down.bias))
        return self.gate(F.linear(y, self.up.weight.flatten(1), self.up.bias))[:, :, None, None]


class Head(Block):
    """A mean and a classifier."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.fc, self.pool = nn.Linear(maps, 1000), adaptive

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


class HeadConv(Head):
    def forward(self, x):
        return F.conv2d(self.pool(x), self.fc.weight[:, :, None, None], self.fc.bias).flatten(1)


# Matrix products with constant weights, on (batch, tokens, features)


def plain(x, linear):
    return linear(x)


def transposed_before(x, linear):
    return x @ linear.weight.T.contiguous() + linear.bias


def flat(x, linear):
    return linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], linear.out_features)


def flat_transposed_before(x, linear):
    y = x.reshape(-1, x.shape[-1]) @ linear.weight.T.contiguous() + linear.bias
    return y.reshape(*x.shape[:-1], linear.out_features)


def as_conv(x, linear):
    """A 1x1 convolution of a plane with one pixel a token."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    return F.conv2d(rows, linear.weight[:, :, None, None], linear.bias).reshape(*x.shape[:-1], linear.out_features)


def as_conv_plane(x, linear):
    """A 1x1 convolution of one plane of tokens."""
    plane = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(plane, linear.weight[:, :, None, None], linear.bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], linear.out_features)


LINEARS = {
    "weight transposed before": transposed_before,
    "rows flat": flat,
    "rows flat, weight transposed before": flat_transposed_before,
    "1x1 convolution, tokens as batch": as_conv,
    "1x1 convolution, tokens as plane": as_conv_plane,
}  # fmt: skip


class Linear(Block):
    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.fc, self.linear = nn.Linear(features, out), plain

    def forward(self, x):
        return self.linear(x, self.fc)


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def float_gelu(x):
    return F.gelu(x.float()).to(x.dtype)


class MLP(Block):
    """With its normalization and its residual, of vit_b_16 and swin_t."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(features), nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.linear, self.gelu = plain, F.gelu
        self.normalize: Any = norm_layer

    def forward(self, x):
        y = self.gelu(self.linear(self.normalize(x, self.norm), self.up))
        return x + self.linear(y, self.down)


def norm_layer(x, norm):
    return norm(x)


def norm_old(x, norm):
    return old_norm(x, norm.weight, norm.bias, norm.eps)


def norm_float(x, norm):
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def norm_float_affine_half(x, norm):
    return F.layer_norm(x.float(), norm.normalized_shape, None, None, norm.eps).to(x.dtype) * norm.weight + norm.bias


def norm_composed(x, norm):
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * ((y * y).mean(-1, keepdim=True) + norm.eps).rsqrt()
    return y.to(x.dtype) * norm.weight + norm.bias


NORMS = {
    "first version of the layer": norm_old,
    "in float32": norm_float,
    "in float32, affine in half": norm_float_affine_half,
    "composed in float32": norm_composed,
}  # fmt: skip


class Norm(Block):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.normalize = nn.LayerNorm(features), norm_layer

    def forward(self, x, y):
        z = x + y
        return z, self.normalize(z, self.norm)


class ConvNeXt(Block):
    """A block of convnext_tiny."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(maps, maps, 7, padding=3, groups=maps)
        self.norm, self.up, self.down = nn.LayerNorm(maps), nn.Linear(maps, 4 * maps), nn.Linear(4 * maps, maps)
        self.scale = nn.Parameter(torch.randn(maps, 1, 1))
        self.linear, self.gelu, self.normalize = plain, F.gelu, norm_layer

    def forward(self, x):
        y = self.normalize(self.conv(x).permute(0, 2, 3, 1), self.norm)
        y = self.linear(self.gelu(self.linear(y, self.up)), self.down)
        return x + self.scale * y.permute(0, 3, 1, 2)

    def scale_folded(self):
        """The layer scale as part of the last product."""
        other = copy.deepcopy(self)
        with torch.no_grad():
            other.down.weight *= other.scale[:, :, 0]
            other.down.bias *= other.scale[:, 0, 0]
        other.__class__ = ConvNeXtUnscaled
        return other


class ConvNeXtUnscaled(ConvNeXt):
    def forward(self, x):
        y = self.normalize(self.conv(x).permute(0, 2, 3, 1), self.norm)
        return x + self.linear(self.gelu(self.linear(y, self.up)), self.down).permute(0, 3, 1, 2)


class ConvNeXtLast(ConvNeXtUnscaled):
    """The sum before the permutation."""

    def forward(self, x):
        y = self.normalize(self.conv(x).permute(0, 2, 3, 1), self.norm)
        y = self.linear(self.gelu(self.linear(y, self.up)), self.down)
        return (x.permute(0, 2, 3, 1) + y).permute(0, 3, 1, 2)


class ConvNeXtConv(ConvNeXt):
    """1x1 convolutions, and a normalization between two permutations."""

    def forward(self, x):
        y = self.normalize(self.conv(x).permute(0, 2, 3, 1), self.norm).permute(0, 3, 1, 2)
        y = self.gelu(F.conv2d(y, self.up.weight[:, :, None, None], self.up.bias))
        return x + self.scale * F.conv2d(y, self.down.weight[:, :, None, None], self.down.bias)


def chain(module: nn.Module, times: int) -> nn.Module:
    """A block after itself, so that the ends of the network count for less."""
    return nn.Sequential(*[copy.deepcopy(module) for _ in range(times)])


# Attention, on (batch, heads, tokens, size)


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def attention_layer(q, k, v, mask):
    return attend(times(q, q.shape[-1] ** -0.5), k, v, mask)


def composed(q, k, v, mask, scale_scores=False, transposed=times_transposed, softmax=None, scaled=False):
    scale = 1.0 if scaled else q.shape[-1] ** -0.5
    if scaled:
        scores = transposed(q, k)
    else:
        scores = times(transposed(q, k), scale) if scale_scores else transposed(times(q, scale), k)
    if mask is not None and mask.dtype is torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return (softmax or functools.partial(torch.softmax, dim=-1))(scores) @ v


def composed_float(q, k, v, mask, transposed=times_transposed):
    """As the converter composes attention: the scale on q, in float32."""
    return composed(q * q.shape[-1] ** -0.5, k, v, mask, scaled=True, transposed=transposed)


def composed_flat(q, k, v, mask, inner=None):
    """With batch and heads as one axis."""
    if mask is not None:
        mask = mask.expand(*q.shape[:2], -1, -1).flatten(0, 1)
    result = (inner or composed)(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
    return result.unflatten(0, q.shape[:2])


def zeros_kept(attention):
    """Zeros for a query that may see no key, which a softmax gives NaN for."""

    def attend_or_zero(q, k, v, mask):
        return torch.where(mask.any(-1, keepdim=True), attention(q, k, v, mask), 0.0)

    return attend_or_zero


def zeros_by_value(attention):
    """The same where all queries see the same keys: then the values may be zeros, and the mask finite."""

    def attend_to_zeros(q, k, v, mask):
        seen = mask.any(-1, keepdim=True)
        return attention(q, k, torch.where(seen, v, 0.0), torch.where(mask, 0.0, -3e4).to(q.dtype))

    return attend_to_zeros


def both_scaled(q, k, v, mask):
    """As torch's own decomposition and the ONNX exporter have it: half of the scale on either side, k transposed."""
    root = q.shape[-1] ** -0.25
    scores = times(q, root) @ times(k.transpose(-1, -2), root)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


ATTENTIONS: dict[str, Any] = {
    "layer": attention_layer,
    "products, scale on q": composed,
    "products, scale on scores": functools.partial(composed, scale_scores=True),
    "products, key permuted": functools.partial(composed, transposed=lambda a, b: a @ b.transpose(-1, -2)),
    "products, scale on both": both_scaled,
    "products, softmax in float32": functools.partial(composed, softmax=softmax_float),
    "products, heads in batch": composed_flat,
    "products, scale on q in float32": composed_float,
    "products, scale on q in float32, key permuted": functools.partial(
        composed_float, transposed=lambda a, b: a @ b.transpose(-1, -2)
    ),
    "products, heads in batch, scale in float32": functools.partial(composed_flat, inner=composed_float),
}  # fmt: skip


def split_view(x, fc, heads):
    """One product, then (3, batch, heads, tokens, size), then parts."""
    qkv = fc(x).reshape(x.shape[0], x.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


def split_mha(x, fc, heads):
    """As `nn.MultiheadAttention` writes it: tokens first."""
    tokens, batch = x.shape[1], x.shape[0]
    qkv = fc(x.transpose(0, 1)).unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return tuple(
        part.view(tokens, batch * heads, -1).transpose(0, 1).view(batch, heads, tokens, -1) for part in qkv.unbind(0)
    )


def split_early(x, fc, heads):
    """One product, parts along the features, then heads."""
    parts = fc(x).chunk(3, -1)
    return tuple(p.reshape(*p.shape[:2], heads, -1).transpose(1, 2) for p in parts)


def split_transposed(x, fc, heads):
    """One product, (batch, heads, tokens, 3, size) by one permutation, then parts."""
    qkv = fc(x).reshape(x.shape[0], x.shape[1], 3, heads, -1).permute(0, 3, 1, 2, 4)
    return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


def split_products(x, fc, heads):
    """Three products."""
    parts = (F.linear(x, w, b) for w, b in zip(fc.weight.chunk(3), fc.bias.chunk(3), strict=True))
    return tuple(p.reshape(*p.shape[:2], heads, -1).transpose(1, 2) for p in parts)


SPLITS = {
    "one product, view": split_view, "one product, chunk": split_early,
    "one product, heads outside": split_transposed, "three products": split_products,
}  # fmt: skip


class Attention(Block):
    """Self-attention with its normalization, projections and residual, of vit_b_16 or BERT (which norms at the end)."""

    def __init__(self, features: int, heads: int, first: bool, split: Any) -> None:
        super().__init__()
        self.heads, self.first, self.split, self.attention = heads, first, split, sdpa
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(features), nn.Linear(features, 3 * features), nn.Linear(features, features)
        )  # fmt: skip
        nn.init.normal_(self.qkv.weight, std=0.06)
        nn.init.normal_(self.qkv.bias, std=0.1)

    def forward(self, x, mask=None):
        q, k, v = self.split(self.norm(x) if self.first else x, self.qkv, self.heads)
        y = self.attention(q, k, v, mask).transpose(1, 2).flatten(2)
        y = x + self.out(y)
        return y if self.first else self.norm(y)


class AttentionMHA(Attention):
    """With the result's layout as `nn.MultiheadAttention` has it."""

    def forward(self, x, mask=None):
        q, k, v = self.split(self.norm(x), self.qkv, self.heads)
        y = self.attention(q, k, v, mask).permute(2, 0, 1, 3).reshape(x.shape[1] * x.shape[0], -1)
        return x + self.out(y).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


class Masked(Block):
    """Attention that is told which tokens count by ones and zeros, as BERT is."""

    def __init__(self, attention: Attention, mask: Any = None, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(attention) for _ in range(layers))
        self.mask = mask or bool_mask

    def forward(self, x, mask):
        mask = self.mask(mask, x)
        for attention in self.layers:
            x = attention(x, mask)
        return x

    def with_attention(self, attention=None, split=None, mask=None):
        other = self.with_(mask=mask or self.mask)
        for block in other.layers:
            block.attention, block.split = attention or block.attention, split or block.split
        return other


def bool_mask(mask, x):
    """(batch, 1, tokens, tokens), as transformers makes it."""
    return mask.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1)


def bool_row(mask, x):
    return mask.bool()[:, None, None, :]


def added_row(mask, x):
    """(batch, 1, 1, tokens) of 0 and the lowest number."""
    return torch.where(mask.bool(), 0.0, -3e4).to(x.dtype)[:, None, None, :]


def added_mask(mask, x):
    return added_row(mask, x).expand(-1, 1, x.shape[1], -1)


# swin_t


def roll_gather(x, shift):
    rows, columns = ((torch.arange(n) + shift) % n for n in x.shape[1:3])
    return x.index_select(1, rows).index_select(2, columns)


def roll_concat(x, shift):
    x = torch.cat([x[:, shift:], x[:, :shift]], 1)
    return torch.cat([x[:, :, shift:], x[:, :, :shift]], 2)


def roll_plain(x, shift):
    return torch.roll(x, (-shift, -shift), (1, 2))


class Window(Block):
    """Attention in windows of 7x7, with a bias for relative positions and, if shifted, a mask, and the residual."""

    def __init__(self, features: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.shift, self.norm = heads, shift, nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.register_buffer("bias", torch.randn(1, heads, 49, 49) * 0.5)
        regions = torch.zeros(size, size)
        edges = [slice(0, -7), slice(-7, -3), slice(-3, None)]
        for i, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
            regions[rows, columns] = i
        windows = regions.view(size // 7, 7, size // 7, 7).transpose(1, 2).reshape(-1, 49)
        self.register_buffer("mask", (windows[:, None] != windows[:, :, None]) * -100.0)
        self.roll, self.attention = roll_plain, window_as_written

    def forward(self, x):
        batch, height, width, features = x.shape
        y = self.norm(x)
        y = self.roll(y, self.shift) if self.shift else y
        y = y.view(batch, height // 7, 7, width // 7, 7, features).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, features)
        q, k, v = self.qkv(y).reshape(-1, 49, 3, self.heads, features // self.heads).permute(2, 0, 3, 1, 4)
        y = self.attention(q, k, v, self.bias, self.mask if self.shift else None)
        y = self.out(y.transpose(1, 2).reshape(-1, 49, features))
        y = y.view(batch, height // 7, width // 7, 7, 7, features).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, height, width, features)
        return x + (self.roll(y, height - self.shift) if self.shift else y)


def window_as_written(q, k, v, bias, mask, scaled=lambda x, s: x * s, transposed=lambda a, b: a @ b.transpose(-2, -1)):
    scores = transposed(scaled(q, q.shape[-1] ** -0.5), k) + bias
    if mask is not None:
        windows, (heads, n) = mask.shape[0], scores.shape[1:3]
        scores = scores.view(-1, windows, heads, n, n) + mask[:, None]
        scores = scores.view(-1, heads, n, n)
    return scores.softmax(-1) @ v


def all_biases(q, bias, mask):
    """Bias and mask as one constant for all windows of the batch."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)


def window_one_bias(q, k, v, bias, mask):
    return composed(q, k, v, all_biases(q, bias, mask))


def window_one_bias_float(q, k, v, bias, mask):
    return composed_float(q, k, v, all_biases(q, bias, mask))


def window_layer(q, k, v, bias, mask):
    return attention_layer(q, k, v, all_biases(q, bias, mask))


def window_sdpa(q, k, v, bias, mask):
    return F.scaled_dot_product_attention(q, k, v, all_biases(q, bias, mask))


class Patches(Block):
    """The patches of vit_b_16, with the class token and the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 768, 16, 16), nn.LayerNorm(768)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 768)), nn.Parameter(torch.randn(1, 197, 768))

    def tokens(self, x):
        return self.conv(x).reshape(x.shape[0], 768, 196).permute(0, 2, 1)

    def forward(self, x):
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), self.tokens(x)], 1) + self.positions
        return self.norm(y)


class PatchesProduct(Patches):
    """A matrix product of patches."""

    def tokens(self, x):
        patches = x.reshape(x.shape[0], 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], 196, 768)
        return F.linear(patches, self.conv.weight.flatten(1), self.conv.bias)


class PatchesSumFirst(Patches):
    """Positions added to the patches, and to the token beforehand."""

    def forward(self, x):
        token = self.token + self.positions[:, :1]
        y = torch.cat([token.expand(x.shape[0], -1, -1), self.tokens(x) + self.positions[:, 1:]], 1)
        return self.norm(y)


class Downsampling(Block):
    """A convolution of patches that do not overlap, and a normalization of each: convnext's and swin's."""

    def __init__(self, maps: int, out: int, size: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(maps, out, size, size), nn.LayerNorm(out)

    def patches(self, x):
        return self.conv(x).permute(0, 2, 3, 1)

    def forward(self, x):
        return self.norm(self.patches(x)).permute(0, 3, 1, 2)


class DownsamplingProduct(Downsampling):
    """A matrix product of patches."""

    def patches(self, x):
        (batch, maps, high, wide), size = x.shape, self.conv.stride[0]
        x = x.reshape(batch, maps, high // size, size, wide // size, size).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x.reshape(batch, high // size, wide // size, -1), self.conv.weight.flatten(1), self.conv.bias)


# The table of patterns -----------------------------------------------------------------------------------------------


def image(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape),)


def pair(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape), torch.randn(batch, *shape))


def tokens_and_mask(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 128, 768), (torch.arange(128) < 96).long().expand(batch, -1).contiguous()


def convolutions(base: Block) -> dict[str, nn.Module]:
    return {
        "as written": base,
        "normalization folded": folded(base),
        "folded, bias apart": folded(base, BiasApart),
    }


def bottleneck(maps: int, mid: int) -> dict[str, nn.Module]:
    base = chain(Bottleneck(maps, mid), 3)
    return convolutions(base)


def bottleneck_last(maps: int, mid: int) -> dict[str, nn.Module]:
    base = chain(Bottleneck(maps, mid), 3)
    return {
        "as written": ChannelsLast(base),
        "normalization folded": ChannelsLast(folded(base)),
    }


def inverted(*args: Any) -> dict[str, nn.Module]:
    base = Inverted(*args)
    variants = {
        "as written": base,
        "normalization folded": base.with_(fold=True),
        **{f"folded, {name}": base.with_(fold=True, pool=part) for name, part in POOLS.items()},
        **{f"as written, {name}": base.with_(pool=part) for name, part in list(POOLS.items())[1:3]},
    }
    if base.swish is F.hardswish:
        variants["folded, hard-swish by clip"] = base.with_(fold=True, swish=clip_swish)
    other = base.with_(fold=True, pool=POOLS["mean as one half reduction"])
    other.__class__ = InvertedLinear
    variants["folded, half mean, gate by products"] = other
    return {name: chain(module, 2) for name, module in variants.items()}


def head(maps: int) -> dict[str, nn.Module]:
    base = Head(maps)
    conv = base.with_(pool=POOLS["mean as one half reduction"])
    conv.__class__ = HeadConv
    return {
        "as written": base, **{name: base.with_(pool=part) for name, part in POOLS.items()},
        "half mean, 1x1 convolution": conv,
    }  # fmt: skip


def linears(features: int, out: int) -> dict[str, nn.Module]:
    base = Linear(features, out)
    return {"as written": base, **{name: base.with_(linear=part) for name, part in LINEARS.items()}}


def mlp(features: int, hidden: int) -> dict[str, nn.Module]:
    base = MLP(features, hidden)
    return {
        "as written": base,
        **{name: base.with_(linear=part) for name, part in LINEARS.items()},
        "gelu in float32": base.with_(gelu=float_gelu),
        "gelu by tanh (not the same)": base.with_(gelu=tanh_gelu),
        "normalization in float32": base.with_(normalize=norm_float),
    }


def norms(features: int) -> dict[str, nn.Module]:
    base = Norm(features)
    return {"as written": base, **{name: base.with_(normalize=part) for name, part in NORMS.items()}}


def convnext(maps: int) -> dict[str, nn.Module]:
    base = ConvNeXt(maps)
    conv, last = base.with_(), base.scale_folded()
    conv.__class__, last.__class__ = ConvNeXtConv, ConvNeXtLast
    variants = {
        "as written": base,
        "scale folded": base.scale_folded(),
        "scale folded, sum before permuting": last,
        "rows flat": base.with_(linear=flat),
        "weight transposed before": base.with_(linear=transposed_before),
        "1x1 convolutions": conv,
        "normalization in float32": base.with_(normalize=norm_float),
    }
    return {name: chain(module, 2) for name, module in variants.items()}


def vit_attention() -> dict[str, nn.Module]:
    base = AttentionMHA(768, 12, True, split_mha)
    simple = base.with_(split=split_view)
    simple.__class__ = Attention
    variants = {
        "as written": base,
        **{f"as written, {name}": base.with_(attention=part) for name, part in ATTENTIONS.items()},
        **{name: simple.with_(attention=part) for name, part in ATTENTIONS.items()},
        **{f"layer, {name}": simple.with_(split=part, attention=attention_layer) for name, part in SPLITS.items()},
        **{f"products, {name}": simple.with_(split=part, attention=composed) for name, part in SPLITS.items()},
        "products, float32 scale, one product, chunk": simple.with_(split=split_early, attention=composed_float),
        "products, float32 scale, three products": simple.with_(split=split_products, attention=composed_float),
    }
    return {name: chain(module, 2) for name, module in variants.items()}


def bert_attention() -> dict[str, nn.Module]:
    base = Masked(Attention(768, 12, False, split_products))
    return {
        "as written": base,
        "layer, bool mask, no rows of zeros": base.with_attention(attention_layer),
        "layer, added mask": base.with_attention(attention_layer, mask=added_mask),
        "layer, added row": base.with_attention(attention_layer, mask=added_row),
        "as written, added row": base.with_attention(mask=added_row),
        "products, bool mask": base.with_attention(composed),
        "products, bool row": base.with_attention(composed, mask=bool_row),
        "products, added mask": base.with_attention(composed, mask=added_mask),
        "products, added row": base.with_attention(composed, mask=added_row),
        "products, added row, scale on scores": base.with_attention(
            ATTENTIONS["products, scale on scores"], mask=added_row
        ),
        "one product, products, added row": base.with_attention(composed, split_view, added_row),
        "one product, layer, added row": base.with_attention(attention_layer, split_view, added_row),
        "one product, chunk, products, added row": base.with_attention(composed, split_early, added_row),
        "one product, heads outside, products, added row": base.with_attention(composed, split_transposed, added_row),
        "one product, products in float32 scale, added row": base.with_attention(composed_float, split_view, added_row),
        "one product, heads in batch, added row": base.with_attention(composed_flat, split_view, added_row),
        "products in float32 scale, added row": base.with_attention(composed_float, mask=added_row),
        "products in float32 scale, bool mask": base.with_attention(composed_float),
        "products, bool mask, zeros kept": base.with_attention(zeros_kept(composed)),
        "products, bool row, zeros kept": base.with_attention(zeros_kept(composed), mask=bool_row),
        "products, bool row, zeros by value": base.with_attention(zeros_by_value(composed), mask=bool_row),
        "one product, float32 scale, bool row, zeros by value": base.with_attention(
            zeros_by_value(composed_float), split_view, bool_row
        ),
    }


def window(features: int, heads: int, size: int) -> dict[str, nn.Module]:
    base = Window(features, heads, size, 3)
    variants = {
        "as written": base,
        "roll by gathers": base.with_(roll=roll_gather),
        "roll by slices": base.with_(roll=roll_concat),
        "scale in half": base.with_(attention=functools.partial(window_as_written, scaled=times)),
        "scale in half, key by flag": base.with_(
            attention=functools.partial(window_as_written, scaled=times, transposed=times_transposed)
        ),
        "key by flag": base.with_(attention=functools.partial(window_as_written, transposed=times_transposed)),
        "bias and mask as one, scale in half": base.with_(attention=window_one_bias),
        "bias and mask as one": base.with_(attention=window_one_bias_float),
        "attention layer": base.with_(attention=window_layer),
        "scaled_dot_product_attention": base.with_(attention=window_sdpa),
    }
    return {name: chain(module, 2) for name, module in variants.items()}


def patches() -> dict[str, nn.Module]:
    base = Patches()
    product, first = base.with_(), base.with_()
    product.__class__, first.__class__ = PatchesProduct, PatchesSumFirst
    return {"as written": base, "matrix product": product, "positions first": first}


def downsampling(*args: int) -> dict[str, nn.Module]:
    base = Downsampling(*args)
    product = base.with_()
    product.__class__ = DownsamplingProduct
    return {"as written": base, "matrix product": product}


class Pattern(NamedTuple):
    formulations: Callable[[], dict[str, nn.Module]]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    places: int  # how often the block stands in a formulation


HS = (F.hardswish, F.relu, F.hardsigmoid)
SILU = (F.silu, F.silu, torch.sigmoid)

PATTERNS = {
    "resnet50 bottleneck 256x56": Pattern(lambda: bottleneck(256, 64), image(256, 56, 56), 3),
    "resnet50 bottleneck 1024x14": Pattern(lambda: bottleneck(1024, 256), image(1024, 14, 14), 3),
    "resnet50 bottleneck 1024x14, NHWC ends": Pattern(lambda: bottleneck_last(1024, 256), image(14, 14, 1024), 3),
    "resnet50 stem": Pattern(lambda: convolutions(Stem()), image(3, 224, 224), 1),
    "resnet50 head": Pattern(lambda: head(2048), image(2048, 7, 7), 1),
    "mobilenet_v3 block 112x14": Pattern(lambda: inverted(112, 672, 168, 3, *HS), image(112, 14, 14), 2),
    "mobilenet_v3 block 160x7": Pattern(lambda: inverted(160, 960, 240, 5, *HS), image(160, 7, 7), 2),
    "efficientnet_b0 block 112x14": Pattern(lambda: inverted(112, 672, 28, 5, *SILU), image(112, 14, 14), 2),
    "convnext block 96x56": Pattern(lambda: convnext(96), image(96, 56, 56), 2),
    "convnext block 384x14": Pattern(lambda: convnext(384), image(384, 14, 14), 2),
    "linear 197x768 to 2304": Pattern(lambda: linears(768, 2304), image(197, 768), 1),
    "vit mlp 197x768": Pattern(lambda: mlp(768, 3072), image(197, 768), 1),
    "swin mlp 56x56x96": Pattern(lambda: mlp(96, 384), image(56, 56, 96), 1),
    "layer norm 197x768": Pattern(lambda: norms(768), pair(197, 768), 1),
    "layer norm 56x56x96": Pattern(lambda: norms(96), pair(56, 56, 96), 1),
    "vit attention 197x768": Pattern(vit_attention, image(197, 768), 2),
    "vit patches": Pattern(patches, image(3, 224, 224), 1),
    "convnext stem": Pattern(lambda: downsampling(3, 96, 4), image(3, 224, 224), 1),
    "convnext downsampling 96x56": Pattern(lambda: downsampling(96, 192, 2), image(96, 56, 56), 1),
    "convnext downsampling 384x14": Pattern(lambda: downsampling(384, 768, 2), image(384, 14, 14), 1),
    "mean 96x112": Pattern(lambda: head(96), image(96, 112, 112), 1),
    "mean 240x28": Pattern(lambda: head(240), image(240, 28, 28), 1),
    "bert attention 128x768": Pattern(bert_attention, tokens_and_mask, 2),
    "swin window 96x56": Pattern(lambda: window(96, 3, 56), image(56, 56, 96), 2),
    "swin window 384x14": Pattern(lambda: window(384, 12, 14), image(14, 14, 384), 2),
}

MODELS = ["resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t", "bert"]


def model(name: str) -> Pattern:
    """A whole model with random weights."""
    if name == "bert":
        return Pattern(lambda: {"torch2rt": _bert()}, _ids_and_mask, 1)
    import torchvision

    return Pattern(lambda: {"torch2rt": getattr(torchvision.models, name)()}, image(3, 224, 224), 1)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def _ids_and_mask(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 30000, (batch, 128)), torch.ones(batch, 128, dtype=torch.int64)


# Building, in a process for each pattern and batch size ---------------------------------------------------------------


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for x in (result.values() if hasattr(result, "values") else result) if isinstance(x, torch.Tensor)]


def network_of(formulation: Formulation, inputs: tuple[torch.Tensor, ...], folder: Path) -> Network:
    if not formulation.onnx:
        return lower(trace(formulation.module, inputs))
    path = folder / f"{os.getpid()}.onnx"
    names = [f"input_{i}" for i in range(len(inputs))]
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            formulation.module, inputs, str(path), dynamo=True, external_data=False, input_names=names, verbose=False
        )
    interface = trace(formulation.module, inputs).meta["interface"]
    builder = create_builder()
    network = Network(create_network(builder), builder, interface)
    parser = trt.OnnxParser(network.definition, LOG)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    path.unlink()
    definition = network.definition
    for i in range(definition.num_outputs):
        definition.get_output(i).name = interface.outputs[i]
    network.parser = parser  # type: ignore[attr-defined]  # the weights are its own
    return network


def kernels_of(network: Network) -> tuple[bytes, list[str]]:
    """An engine, and its kernels as the builder lists them."""

    def detailed(config):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        plan = build(network, configure=detailed, log_level=trt.ILogger.Severity.VERBOSE, progress=False)
    text = said.getvalue()
    text = text[text.find("[TensorRT] Layers:") :].split("Bindings:")[0]
    found = re.findall(r"^Name: (.*?), LayerType: (\w+)", text, re.M)
    return plan, [
        f"{kind} {re.sub('_myl[0-9_]+$', '', name)}" for name, kind in found if kind not in ("signal", "wait")
    ]


def work(arguments: argparse.Namespace) -> None:
    """Build all formulations of one pattern, each into a file of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, batch = Path(arguments.folder), int(arguments.batch)
    pattern = model(arguments.worker) if arguments.worker in MODELS else PATTERNS[arguments.worker]
    modules = {name: m.eval() for name, m in pattern.formulations().items()}
    formulations = {name: Formulation(m) for name, m in modules.items()}
    first = next(iter(formulations.values()))
    if arguments.onnx:
        formulations["ONNX parser"] = Formulation(first.module, onnx=True)
    inputs = tuple(x.half() if x.is_floating_point() else x for x in pattern.inputs(batch))
    with torch.no_grad():
        wide = copy.deepcopy(first.module).half().float()
        reference = tensors(wide(*(x.float() if x.is_floating_point() else x for x in inputs)))
    torch.save({"inputs": inputs, "reference": reference, "names": list(formulations)}, folder / "case.pt")
    for index, (name, formulation) in enumerate(formulations.items()):
        record: dict[str, Any] = {"name": name}
        try:
            start = time.perf_counter()
            half = formulation._replace(module=copy.deepcopy(formulation.module).half())
            network = network_of(half, inputs, folder)
            record["layers"] = network.num_layers
            record["plan"], record["kernels"] = kernels_of(network)
            record["build"] = time.perf_counter() - start
            if not arguments.build_only:
                start = time.perf_counter()
                Runtime(record["plan"], {"flavour": FLAVOUR, "version": VERSION}, network.interface).close()
                record["compile"] = time.perf_counter() - start
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {str(error).strip()}"[:400]
        torch.save(record, folder / f"{index}.partial")
        os.replace(folder / f"{index}.partial", folder / f"{index}.pt")


def start(pattern: str, batch: int, arguments: argparse.Namespace, folder: Path) -> Path:
    """Run a worker, once more if it ends with nothing done; returns its folder."""
    place = folder / f"{re.sub('[^a-z0-9]+', '-', pattern)}-{batch}"
    place.mkdir()
    command = [sys.executable, __file__, "--worker", pattern, "--batch", str(batch), "--folder", str(place)]
    command += ["--onnx"] * arguments.onnx + ["--build-only"] * arguments.build_only
    for _ in range(2):
        with open(place / "log", "w") as log:
            try:
                done = subprocess.run(command, check=False, stdout=log, stderr=log, timeout=arguments.patience)
                why = f"ended with {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"was stopped after {arguments.patience:.0f} s"
        if not why or (place / "0.pt").exists():
            break
    if why:
        print(f"{pattern}, batch {batch}: the worker {why}", flush=True)
    return place


# Measuring -----------------------------------------------------------------------------------------------------------


class Engine:
    """An engine with a context, on fixed inputs and outputs."""

    def __init__(self, plan: bytes, inputs: list[torch.Tensor]) -> None:
        self.runtime = trt.Runtime(LOG)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        device = torch.device("cuda", torch.cuda.current_device())
        self.kernels = KernelCache(self.engine, plan, device)
        capability = torch.cuda.get_device_capability(device)
        self.context = create_execution_context(self.engine, capability, self.kernels.cache)
        self.inputs = inputs
        self.outputs: list[torch.Tensor] = []  # in the order of the network
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        for name in names:
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                value = self.inputs[int(name.rsplit("_", 1)[1])]
                self.context.set_input_shape(name, tuple(value.shape))
            else:
                dtype = torch.float16 if self.engine.get_tensor_dtype(name) == trt.DataType.HALF else torch.float32
                value = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device=device)
                self.outputs.append(value)
            self.context.set_tensor_address(name, value.data_ptr())
        size = self.context.update_device_memory_size_for_shapes()
        self.scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        if size:
            self.context.set_device_memory(self.scratch.data_ptr(), size)
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # the inputs are there

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("; ".join(LOG.recent()) or "TensorRT gave no reason")

    def close(self) -> None:
        """Let go of everything, what was made from what first."""
        torch.cuda.synchronize()
        self.context = self.kernels.cache = None
        self.engine = None
        self.runtime = None

    def microseconds(self) -> float:
        """The median time of a call."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.enqueue()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                for _ in range(CALLS):
                    self.enqueue()
            times = []
            for turn in range(REPLAYS + 3):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(self.stream)
                graph.replay()
                end.record(self.stream)
                end.synchronize()
                if turn >= 3:
                    times.append(begin.elapsed_time(end) / CALLS * 1e3)
        return statistics.median(times)

    def error(self, reference: list[torch.Tensor]) -> float:
        """The largest difference over the largest value."""
        outputs = [value.float().cpu() for value in self.outputs]
        return max(
            float((ours - theirs).abs().max() / theirs.abs().max())
            for ours, theirs in zip(outputs, reference, strict=True)
        )

    def kernel_times(self) -> list[tuple[str, int, float]]:
        """Per call: the name of each kernel, how often it runs, and its microseconds in all."""
        from torch.profiler import ProfilerActivity, profile

        calls = 10
        with torch.cuda.stream(self.stream):
            self.enqueue()
            self.stream.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(calls):
                    self.enqueue()
                self.stream.synchronize()
        sums: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                sums[event.name] += event.time_range.elapsed_us()
                counts[event.name] += 1
        return [(name, round(counts[name] / calls), us / calls) for name, us in sums.most_common()]


def measure(place: Path, arguments: argparse.Namespace, profiled: bool) -> list[dict[str, Any]]:
    """The rows of one pattern and batch size; what fails is a row with an error."""
    if not (place / "case.pt").exists():
        return [{"formulation": "all", "error": "the worker failed: " + (place / "log").read_text()[-300:]}]
    case = torch.load(place / "case.pt", weights_only=True)
    if not arguments.build_only:
        inputs = [x.cuda() for x in case["inputs"]]
    rows = []
    for index, name in enumerate(case["names"]):
        path = place / f"{index}.pt"
        record = torch.load(path, weights_only=True) if path.exists() else {"name": name, "error": "the worker died"}
        row: dict[str, Any] = {"formulation": record["name"]}
        row |= {key: record[key] for key in ("layers", "kernels", "build", "compile", "error") if key in record}
        if "error" not in record and not arguments.build_only:
            try:
                engine = Engine(record["plan"], inputs)
                row["us"] = engine.microseconds()
                row["difference"] = engine.error(case["reference"])
                if profiled:
                    row["kernel_times"] = engine.kernel_times()
                engine.close()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).strip()}"[:400]
        rows.append(row)
    return rows


# Tables --------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> None:
    """All rows, pattern by pattern: the time of one block, relative to that of the first formulation."""
    for key, group in _groups(rows).items():
        print(f"\n{key[0]}, batch {key[1]}")
        base = group[0].get("us")
        for row in group:
            if "error" in row:
                print(f"  {row['formulation']:44} failed: {row['error'][:120]}")
                continue
            text = f"  {row['formulation']:44} {row['layers']:5} layers {len(row['kernels']):4} kernels"
            if "us" in row:
                share = f"{row['us'] / base:7.3f}" if base else "      -"
                text += f" {row['us'] / row['places']:10.2f} us {share}   {row['difference']:.1e}"
            print(text)


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pattern"], row["batch"]), []).append(row)
    return groups


def short_table(rows: list[dict[str, Any]]) -> None:
    """What beats the converters, and by how much."""
    print("\nfaster than the converters' own by more than 2 %: the best three")
    for (pattern, batch), group in _groups(rows).items():
        if "us" not in group[0]:
            continue
        base = group[0]["us"]
        times = ((row["us"] / base, row["formulation"]) for row in group[1:] if "us" in row and "error" not in row)
        better = sorted(pair for pair in times if pair[0] < 0.98)
        shown = ", ".join(f"{name} {share:.2f}" for share, name in better[:3]) or "-"
        print(f"{pattern:40} {batch:3} {base / group[0]['places']:9.2f} us  {shown}")


def kernel_tables(rows: list[dict[str, Any]], top: int = 12) -> None:
    for row in rows:
        if "kernel_times" not in row:
            continue
        times = row["kernel_times"]
        total, count = sum(us for _, _, us in times), sum(n for _, n, _ in times)
        print(f"\n{row['pattern']}, batch {row['batch']}, {row['formulation']}: {row['us']:.1f} us a call, ", end="")
        print(f"{count} kernels of {total:.1f} us")
        for name, n, us in times[:top]:
            print(f"  {us:9.1f} us {n:4} x {name[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="patterns whose name has this text in it; several with |")
    parser.add_argument("--batch", default="1,16", help="batch sizes")
    parser.add_argument("--models", default="", help="whole models instead of blocks: all, or names with commas")
    parser.add_argument("--onnx", action="store_true", help="also what the ONNX parser makes of it")
    parser.add_argument("--build-only", action="store_true", help="build, without a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that build at a time")
    parser.add_argument("--patience", type=float, default=180, help="seconds for the engines of one pattern")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which nothing more is measured")
    parser.add_argument("--json", help="write all rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    names = [n for n in PATTERNS if re.search(arguments.only, n)]
    if arguments.models:
        names = MODELS if arguments.models == "all" else arguments.models.split(",")
        arguments.onnx = True
    batches = [int(b) for b in arguments.batch.split(",")]
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH2RT_CACHE"] = str(Path(folder) / "kernels")
        os.environ["OMP_NUM_THREADS"] = "1"
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            jobs = {
                (name, batch): pool.submit(start, name, batch, arguments, Path(folder))
                for batch in sorted(batches, reverse=True) for name in reversed(names)
            }  # fmt: skip
            concurrent.futures.wait(jobs.values())
        print(f"built in {time.perf_counter() - began:.0f} s", flush=True)
        for name, batch in ((n, b) for n in names for b in batches):
            if time.perf_counter() - began > arguments.limit:
                print(f"{name}, batch {batch}: not measured, {arguments.limit:.0f} s are over")
                continue
            try:
                found = measure(jobs[name, batch].result(), arguments, bool(arguments.models))
            except Exception as error:
                found = [{"formulation": "all", "error": f"{type(error).__name__}: {error}"[:400]}]
            places = 1 if arguments.models else PATTERNS[name].places
            rows += [{"pattern": name, "batch": batch, "places": places, **row} for row in found]
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(rows, indent=1))
    table(rows)
    kernel_tables(rows)
    if not arguments.build_only:
        short_table(rows)
    print(f"\n{FLAVOUR} {VERSION}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
