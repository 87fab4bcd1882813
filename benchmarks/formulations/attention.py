"""Self-attention of vit_b_16, BERT and swin_t."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from parts import Block, Pattern, image, layer, times, times_transposed
from torch import nn
from torch2rt.converters import attention as converters

# Attention, of (batch, heads, tokens, size) --------------------------------------------------------------------------


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def _attend(ctx, query, key, value, mask):
    """TensorRT's attention layer on queries that are scaled already, whatever the mask."""
    return converters.fused(ctx, query, key, value, mask, False, False)


attend_scaled = layer(_attend, lambda *qkv_mask: F.scaled_dot_product_attention(*qkv_mask, scale=1.0))


def attention_layer(q, k, v, mask):
    return attend_scaled(times(q, q.shape[-1] ** -0.5), k, v, mask)


def products(q, k, v, mask, scaled=lambda x, factor: x * factor):
    """A product, a softmax and a product, the queries scaled in float32; NaN for a query that may see no key."""
    scores = times_transposed(scaled(q, q.shape[-1] ** -0.5), k)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


products_half = functools.partial(products, scaled=times)


def zeros_by_value(q, k, v, mask):
    """Where all queries see the same keys and these are none: the values may be zeros, and the mask finite."""
    seen = mask.any(-1, keepdim=True)
    return products(q, k, torch.where(seen, v, 0.0), torch.where(mask, 0.0, -3e4).to(q.dtype))


# From tokens to heads and back ---------------------------------------------------------------------------------------


def split_mha(x, fc, heads):
    """As `nn.MultiheadAttention` writes it: tokens first."""
    tokens, batch = x.shape[1], x.shape[0]
    qkv = fc(x.transpose(0, 1)).unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return tuple(
        part.view(tokens, batch * heads, -1).transpose(0, 1).view(batch, heads, tokens, -1) for part in qkv.unbind(0)
    )


def split_view(x, fc, heads):
    """One product, then (3, batch, heads, tokens, size), then parts."""
    return fc(x).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def split_chunk(x, fc, heads):
    """One product, parts along the features, then heads."""
    return tuple(p.reshape(*p.shape[:2], heads, -1).transpose(1, 2) for p in fc(x).chunk(3, -1))


def split_products(x, fc, heads):
    """Three products."""
    parts = (F.linear(x, w, b) for w, b in zip(fc.weight.chunk(3), fc.bias.chunk(3), strict=True))
    return tuple(p.reshape(*p.shape[:2], heads, -1).transpose(1, 2) for p in parts)


def join_mha(y, out):
    batch, heads, tokens, size = y.shape
    rows = out(y.permute(2, 0, 1, 3).reshape(tokens * batch, heads * size))
    return rows.view(tokens, batch, -1).transpose(0, 1)


def join(y, out):
    return out(y.transpose(1, 2).flatten(2))


class Attention(Block):
    """With its normalization, projections and residual."""

    def __init__(self, features: int, heads: int, split: Any, join: Any) -> None:
        super().__init__()
        self.heads, self.split, self.attend, self.join = heads, split, sdpa, join
        self.norm, self.out = nn.LayerNorm(features), nn.Linear(features, features)
        self.qkv = nn.Linear(features, 3 * features)
        nn.init.normal_(self.qkv.weight, std=0.06)
        nn.init.normal_(self.qkv.bias, std=0.1)

    def add(self, x, y, mask=None):
        """To x, the attention from and to y."""
        return x + self.join(self.attend(*self.split(y, self.qkv, self.heads), mask), self.out)

    def forward(self, x):
        return self.add(x, self.norm(x))


class Masked(Attention):
    """Told which tokens count by ones and zeros, and normalized at the end, as BERT is."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__(features, heads, split_products, join)
        self.mask = bool_mask

    def prepare(self, x, mask):
        return x, self.mask(mask, x)

    def forward(self, x, mask):
        return self.norm(self.add(x, x, mask))


def bool_mask(mask, x):
    """(batch, 1, tokens, tokens), as transformers makes it."""
    return mask.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1)


def bool_row(mask, x):
    return mask.bool()[:, None, None, :]


def added_row(mask, x):
    """(batch, 1, 1, tokens) of 0 and a number that is low enough."""
    return torch.where(mask.bool(), 0.0, -3e4).to(x.dtype)[:, None, None, :]


# swin_t --------------------------------------------------------------------------------------------------------------


class Window(Block):
    """Attention in windows of 7x7, with a bias for relative positions and a mask for the shift, and the residual."""

    def __init__(self, features: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.shift, self.norm = heads, 3, nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.register_buffer("bias", torch.randn(1, heads, 49, 49) * 0.5)
        regions = torch.zeros(size, size)
        edges = [slice(0, -7), slice(-7, -3), slice(-3, None)]
        for i, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
            regions[rows, columns] = i
        windows = regions.view(size // 7, 7, size // 7, 7).transpose(1, 2).reshape(-1, 49)
        self.register_buffer("mask", (windows[:, None] != windows[:, :, None]) * -100.0)
        self.roll, self.attend = roll, window_as_written

    def forward(self, x):
        batch, height, width, features = x.shape
        y = self.roll(self.norm(x), self.shift)
        y = y.view(batch, height // 7, 7, width // 7, 7, features).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, features)
        y = self.attend(*split_view(y, self.qkv, self.heads), self.bias, self.mask)
        y = self.out(y.transpose(1, 2).reshape(-1, 49, features))
        y = y.view(batch, height // 7, width // 7, 7, 7, features).permute(0, 1, 3, 2, 4, 5)
        return x + self.roll(y.reshape(batch, height, width, features), height - self.shift)


def roll(x, shift):
    return torch.roll(x, (-shift, -shift), (1, 2))


def roll_gather(x, shift):
    rows, columns = ((torch.arange(n) + shift) % n for n in x.shape[1:3])
    return x.index_select(1, rows).index_select(2, columns)


def window_as_written(q, k, v, bias, mask, scaled=lambda x, factor: x * factor):
    scores = scaled(q, q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    windows, (heads, n) = mask.shape[0], scores.shape[1:3]
    scores = scores.view(-1, windows, heads, n, n) + mask[:, None]
    return scores.view(-1, heads, n, n).softmax(-1) @ v


def one_bias(attend):
    """Bias and mask as one constant for all windows of the batch."""

    def attend_windows(q, k, v, bias, mask):
        return attend(q, k, v, (bias + mask[:, None]).repeat(q.shape[0] // mask.shape[0], 1, 1, 1))

    return attend_windows


# The patterns --------------------------------------------------------------------------------------------------------

VIEW = {"split": split_view, "join": join}
VIT = {
    "attention layer": {"attend": attention_layer},
    "scale in half": {"attend": products_half},
    "view": VIEW,
    "view, attention layer": {**VIEW, "attend": attention_layer},
    "view, scale in half": {**VIEW, "attend": products_half},
    "chunk": {"split": split_chunk, "join": join},
    "three products": {"split": split_products, "join": join},
}
BERT = {
    "no zeros": {"attend": products},
    "attention layer, no zeros": {"attend": attention_layer},
    "bool row": {"mask": bool_row},
    "bool row, zeros by value": {"mask": bool_row, "attend": zeros_by_value},
    "added row": {"mask": added_row},
    "added row, no zeros": {"mask": added_row, "attend": products},
    "added row, attention layer": {"mask": added_row, "attend": attention_layer},
    "one product": {"split": split_view},
    "one product, added row, no zeros": {"split": split_view, "mask": added_row, "attend": products},
    "one product, added row, attention layer": {"split": split_view, "mask": added_row, "attend": attention_layer},
}
SWIN = {
    "roll by gathers": {"roll": roll_gather},
    "scale in half": {"attend": functools.partial(window_as_written, scaled=times)},
    "bias and mask as one": {"attend": one_bias(products)},
    "bias and mask as one, attention layer": {"attend": one_bias(attention_layer)},
    "scaled_dot_product_attention": {"attend": one_bias(sdpa)},
}


def tokens_and_mask(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 128, 768), (torch.arange(128) < 96).long().expand(batch, -1).contiguous()


PATTERNS = {
    "vit attention 197x768": Pattern(lambda: Attention(768, 12, split_mha, join_mha), image(197, 768), VIT, 2),
    "bert attention 128x768": Pattern(lambda: Masked(768, 12), tokens_and_mask, BERT, 2),
    "swin window 96x56": Pattern(lambda: Window(96, 3, 56), image(56, 56, 96), SWIN, 2),
    "swin window 384x14": Pattern(lambda: Window(384, 12, 14), image(14, 14, 384), SWIN, 2),
}
