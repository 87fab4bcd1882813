"""Blocks of products with constant weights: of vit_b_16, swin_t and convnext_tiny."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from parts import Block, Pattern, image
from torch import nn

# Products with constant weights, of (batch, tokens, features) --------------------------------------------------------


def plain(x, module):
    return module(x)


def transposed_before(x, linear):
    return x @ linear.weight.T.contiguous() + linear.bias


def flat(x, linear):
    return linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], linear.out_features)


def as_plane(x, linear):
    """A 1x1 convolution of one plane of all tokens."""
    plane = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(plane, linear.weight[:, :, None, None], linear.bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], linear.out_features)


def as_planes(x, linear):
    """A 1x1 convolution of (batch, height, width, features)."""
    y = F.conv2d(x.permute(0, 3, 1, 2), linear.weight[:, :, None, None], linear.bias)
    return y.permute(0, 2, 3, 1)


class Linear(Block):
    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.fc, self.linear = nn.Linear(features, out), plain

    def forward(self, x):
        return self.linear(x, self.fc)


class MLP(Block):
    """With its normalization and its residual."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(features), nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.linear, self.gelu, self.normalize = plain, F.gelu, plain

    def forward(self, x):
        y = self.normalize(x, self.norm)
        return x + self.linear(self.gelu(self.linear(y, self.up)), self.down)


def norm_composed(x, norm):
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * ((y * y).mean(-1, keepdim=True) + norm.eps).rsqrt()
    return y.to(x.dtype) * norm.weight + norm.bias


class ConvNeXt(Block):
    """A block of convnext_tiny."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(maps, maps, 7, padding=3, groups=maps)
        self.norm, self.up, self.down = nn.LayerNorm(maps), nn.Linear(maps, 4 * maps), nn.Linear(4 * maps, maps)
        self.scale = nn.Parameter(torch.randn(maps, 1, 1))
        self.depthwise, self.linear, self.last = plain, plain, scaled

    def forward(self, x):
        y = self.depthwise(x, self.conv).permute(0, 2, 3, 1)
        y = F.gelu(self.linear(self.norm(y), self.up))
        return x + self.last(y, self)


def in_groups(maps):
    """A depthwise convolution as one of groups of so many maps, with weights of zero between them."""

    def depthwise(x, conv):
        groups = conv.groups // maps
        weight = conv.weight * torch.eye(maps).to(conv.weight).repeat(groups, 1)[:, :, None, None]
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, groups=groups)

    return depthwise


def in_parts(x, conv):
    """A 7x7 convolution as the sum of one of 5x5, one of 5x2 and one of 2x7."""
    x, weight, groups = F.pad(x, (3, 3, 3, 3)), conv.weight, conv.groups
    rows, columns = x.shape[2] - 2, x.shape[3] - 2
    first = F.conv2d(x[:, :, :rows, :columns], weight[:, :, :5, :5], conv.bias, groups=groups)
    right = F.conv2d(x[:, :, :rows, 5:], weight[:, :, :5, 5:], groups=groups)
    return first + right + F.conv2d(x[:, :, 5:], weight[:, :, 5:], groups=groups)


def scaled(y, block):
    return block.scale * block.linear(y, block.down).permute(0, 3, 1, 2)


def scale_folded(y, block):
    """The layer scale as part of the last product."""
    scale = block.scale[:, 0, 0]
    return F.linear(y, block.down.weight * scale[:, None], block.down.bias * scale).permute(0, 3, 1, 2)


# The patterns --------------------------------------------------------------------------------------------------------

LINEARS = {
    "weight transposed before": {"linear": transposed_before},
    "rows flat": {"linear": flat},
    "1x1 convolution of a plane": {"linear": as_plane},
}
MLPS = {
    **LINEARS,
    "gelu by tanh (not the same)": {"gelu": functools.partial(F.gelu, approximate="tanh")},
    "normalization composed": {"normalize": norm_composed},
}
CONVNEXT = {
    "scale folded": {"last": scale_folded},
    "weight transposed before": {"linear": transposed_before},
    "rows flat": {"linear": flat},
    "1x1 convolutions": {"linear": as_planes},
    "depthwise in groups of 8": {"depthwise": in_groups(8)},
    "depthwise in groups of 16": {"depthwise": in_groups(16)},
    "depthwise in parts": {"depthwise": in_parts},
}

PATTERNS = {
    "linear 197x768 to 2304": Pattern(lambda: Linear(768, 2304), image(197, 768), LINEARS),
    "vit mlp 197x768": Pattern(lambda: MLP(768, 3072), image(197, 768), MLPS),
    "swin mlp 56x56x96": Pattern(lambda: MLP(96, 384), image(56, 56, 96), MLPS),
    "convnext block 96x56": Pattern(lambda: ConvNeXt(96), image(96, 56, 56), CONVNEXT, 2),
    "convnext block 384x14": Pattern(lambda: ConvNeXt(384), image(384, 14, 14), CONVNEXT, 2),
}
