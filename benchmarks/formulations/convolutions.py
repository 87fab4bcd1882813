"""Blocks of convolutions: of resnet50, mobilenet_v3_large and efficientnet_b0, and where images become patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from parts import EW, Block, Pattern, convolution, image, layer
from torch import nn
from torch2rt.converters.normalization import batch_norm

from torch2rt.backend.tensorrt import trt
from torch2rt.vocabulary import axes, cast, dims, elementwise

AVG = trt.ReduceOperation.AVG


# Convolutions and normalizations -------------------------------------------------------------------------------------


def as_module(x, module):
    return module(x)


def as_layer(x, conv):
    return convolution(x, conv.weight, conv.bias, conv.stride, conv.padding)


def _norm_apart(ctx, x, weight, bias, mean, var, eps):
    """Batch normalization that stays a layer of its own."""
    return batch_norm(ctx, x, weight, bias, mean, var, False, 0.0, eps)


norm_apart = layer(
    _norm_apart, lambda x, weight, bias, mean, var, eps: F.batch_norm(x, mean, var, weight, bias, eps=eps)
)


def plain(x, conv, norm):
    return norm(conv(x))


def apart(x, conv, norm):
    return norm_apart(conv(x), norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def folded_layer(x, conv, norm):
    """A convolution layer with the normalization in its weights."""
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    weight = (conv.weight.float() * scale.reshape(-1, 1, 1, 1)).to(x.dtype)
    bias = (norm.bias.float() - norm.running_mean.float() * scale).to(x.dtype)
    return convolution(x, weight, bias, conv.stride, conv.padding)


class ConvNorm(Block):
    """A convolution and its batch normalization, with statistics that are not trivial."""

    def __init__(self, maps: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(maps, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm, self.conv_norm = nn.BatchNorm2d(out), plain
        nn.init.normal_(self.conv.weight, std=(2 / (maps // groups * kernel**2)) ** 0.5)
        with torch.no_grad():
            self.norm.running_mean.normal_(std=0.1), self.norm.bias.normal_(std=0.1)
            self.norm.running_var.uniform_(0.5, 1.5), self.norm.weight.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.conv_norm(x, self.conv, self.norm)


class Bottleneck(Block):
    """Of resnet50."""

    def __init__(self, maps: int, mid: int) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvNorm(maps, mid, 1), ConvNorm(mid, mid, 3), ConvNorm(mid, maps, 1)

    def forward(self, x):
        return (self.c(self.b(self.a(x).relu()).relu()) + x).relu()


class Stem(Block):
    """Of resnet50."""

    def __init__(self) -> None:
        super().__init__()
        self.a = ConvNorm(3, 64, 7, 2)

    def forward(self, x):
        return F.max_pool2d(self.a(x).relu(), 3, 2, 1)


# Means of planes -----------------------------------------------------------------------------------------------------


def _mean(ctx, x, dtype):
    """One reduce layer over both axes."""
    x = cast(ctx, x, dtype)
    y = ctx.network.add_reduce(x, AVG, axes([2, 3], 4), True).get_output(0)
    return cast(ctx, ctx.track(y, (*dims(ctx, x)[:2], 1, 1)), ctx.out.dtype)


def _means(ctx, x):
    """A reduce layer for each axis."""
    x = cast(ctx, x, torch.float32)
    for axis in (3, 2):
        sizes = [1 if d == axis else size for d, size in enumerate(dims(ctx, x))]
        x = ctx.track(ctx.network.add_reduce(x, AVG, 1 << axis, True).get_output(0), sizes)
    return cast(ctx, x, ctx.out.dtype)


def _pool(ctx, x):
    y = ctx.network.add_pooling_nd(x, trt.PoolingType.AVERAGE, tuple(dims(ctx, x)[2:])).get_output(0)
    return ctx.track(y, (*dims(ctx, x)[:2], 1, 1))


def plane_mean(x, *_):
    return x.mean((2, 3), keepdim=True)


mean, means, pool = (layer(lowering, plane_mean) for lowering in (_mean, _means, _pool))


def adaptive(x):
    return F.adaptive_avg_pool2d(x, 1)


POOLS = {
    "mean as two float32 reductions": {"pool": means},
    "mean as one float32 reduction": {"pool": lambda x: mean(x, torch.float32)},
    "mean as one half reduction": {"pool": lambda x: mean(x, torch.float16)},
    "mean as pooling": {"pool": pool},
}


def _clip_swish(ctx, x):
    """x * clip(x + 3, 0, 6) / 6"""
    shifted = elementwise(ctx, EW.SUM, x, 3.0, ctx.out.dtype)
    y = ctx.network.add_activation(shifted, trt.ActivationType.CLIP)
    y.alpha, y.beta = 0.0, 6.0
    gate = ctx.track(y.get_output(0), dims(ctx, x))
    return elementwise(ctx, EW.PROD, x, elementwise(ctx, EW.PROD, gate, 1 / 6, ctx.out.dtype))


clip_swish = layer(_clip_swish, F.hardswish)


class Inverted(Block):
    """A block with squeeze and excitation, of mobilenet_v3_large or efficientnet_b0."""

    def __init__(self, maps: int, mid: int, squeezed: int, kernel: int, swish: Any, relu: Any, gate: Any) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(maps, mid, 1), ConvNorm(mid, mid, kernel, groups=mid)
        self.c = ConvNorm(mid, maps, 1)
        self.down, self.up = nn.Conv2d(mid, squeezed, 1), nn.Conv2d(squeezed, mid, 1)
        self.swish, self.relu, self.gate, self.pool, self.convolve = swish, relu, gate, adaptive, as_module

    def forward(self, x):
        y = self.swish(self.b(self.swish(self.a(x))))
        gate = self.relu(self.convolve(self.pool(y), self.down))
        return self.c(self.gate(self.convolve(gate, self.up)) * y) + x


class Head(Block):
    """A mean and a classifier."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.fc, self.pool, self.classify = nn.Linear(maps, 1000), adaptive, as_linear

    def forward(self, x):
        return self.classify(self.pool(x), self.fc)


def as_linear(x, fc):
    return fc(x.flatten(1))


def as_convolution(x, fc):
    return convolution(x, fc.weight[:, :, None, None], fc.bias, (1, 1), (0, 0)).flatten(1)


# Patches -------------------------------------------------------------------------------------------------------------


def product_of_patches(x, conv):
    """A convolution whose windows do not overlap, as a matrix product; (batch, height, width, features)."""
    (batch, maps, high, wide), size = x.shape, conv.stride[0]
    x = x.reshape(batch, maps, high // size, size, wide // size, size).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, high // size, wide // size, -1)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Patches(Block):
    """The patches of vit_b_16, with the class token and the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.convolve = nn.Conv2d(3, 768, 16, 16), nn.LayerNorm(768), as_module
        self.patches: Any = None
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 768)), nn.Parameter(torch.randn(1, 197, 768))

    def forward(self, x):
        if self.patches:
            y = self.patches(x, self.conv).flatten(1, 2)
        else:
            y = self.convolve(x, self.conv).reshape(x.shape[0], 768, 196).permute(0, 2, 1)  # as torchvision has it
        return self.norm(torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.positions)


class Downsampling(Block):
    """A convolution of patches that do not overlap, and a normalization of each: convnext's and swin's."""

    def __init__(self, maps: int, out: int, size: int) -> None:
        super().__init__()
        self.conv, self.norm, self.convolve = nn.Conv2d(maps, out, size, size), nn.LayerNorm(out), as_module
        self.patches: Any = None

    def forward(self, x):
        y = self.patches(x, self.conv) if self.patches else self.convolve(x, self.conv).permute(0, 2, 3, 1)
        return self.norm(y).permute(0, 3, 1, 2)


# The patterns --------------------------------------------------------------------------------------------------------

APART = {"normalization apart": {"conv_norm": apart}}
STEM = {**APART, "convolution layer": {"conv_norm": folded_layer}}
GATE = {**APART, **POOLS, "gate by convolution layers": {"convolve": as_layer}}
MOBILE = {**GATE, "hard-swish by clip": {"swish": clip_swish}}
HEAD = {**POOLS, "1x1 convolution layer": {"classify": as_convolution}}
PATCHES = {"convolution layer": {"convolve": as_layer}, "matrix product": {"patches": product_of_patches}}

HS = (F.hardswish, F.relu, F.hardsigmoid)
SILU = (F.silu, F.silu, torch.sigmoid)

PATTERNS = {
    "resnet50 bottleneck 256x56": Pattern(lambda: Bottleneck(256, 64), image(256, 56, 56), APART, 3),
    "resnet50 bottleneck 1024x14": Pattern(lambda: Bottleneck(1024, 256), image(1024, 14, 14), APART, 3),
    "resnet50 stem": Pattern(Stem, image(3, 224, 224), STEM),
    "resnet50 head": Pattern(lambda: Head(2048), image(2048, 7, 7), HEAD),
    "mean 96x112": Pattern(lambda: Head(96), image(96, 112, 112), HEAD),
    "mean 240x28": Pattern(lambda: Head(240), image(240, 28, 28), HEAD),
    "mobilenet_v3 block 112x14": Pattern(lambda: Inverted(112, 672, 168, 3, *HS), image(112, 14, 14), MOBILE, 2),
    "mobilenet_v3 block 160x7": Pattern(lambda: Inverted(160, 960, 240, 5, *HS), image(160, 7, 7), MOBILE, 2),
    "efficientnet_b0 block 112x14": Pattern(lambda: Inverted(112, 672, 28, 5, *SILU), image(112, 14, 14), GATE, 2),
    "vit patches": Pattern(Patches, image(3, 224, 224), PATCHES),
    "convnext stem": Pattern(lambda: Downsampling(3, 96, 4), image(3, 224, 224), PATCHES),
    "convnext downsampling 96x56": Pattern(lambda: Downsampling(96, 192, 2), image(96, 56, 56), PATCHES),
    "convnext downsampling 384x14": Pattern(lambda: Downsampling(384, 768, 2), image(384, 14, 14), PATCHES),
}
