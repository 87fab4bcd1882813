"""Attention and the rotary embedding of its queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, accumulator, floats, require, same_type


def _attends(kind: str, queries: int, keys: int, device: torch.device) -> Tensor:
    shift = {"UPPER_LEFT": 0, "LOWER_RIGHT": keys - queries}[kind]
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[:, None] + shift


def attention(layer: Any, stored: Stored) -> Run:
    what = layer.attention
    causal = getattr(what, "causal_kind", None)
    kind = causal.name if causal is not None else "UPPER_LEFT" if what.causal else "NONE"
    norm = what.norm_op.name
    require(norm == "SOFTMAX", f"{norm=} is not supported")  # RTX 1.6 does not compute the plain product of NONE
    for name in ("normalization_quantize_scale", "query_lengths", "key_value_lengths"):
        require(getattr(what, name, None) is None, f"attention with {name} is not supported")
    for name in ("query_form", "key_value_form"):
        form = getattr(what, name, None)
        require(form is None or form.name == "PADDED_BHND", f"attention with {name} {form} is not supported")
    require(getattr(what, "num_ranks", 1) == 1, "attention over several devices is not supported")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dtype = same_type(q, k, v)
        require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
        key, value = (accumulator(t).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = accumulator(q) @ key.mT
        allowed = _attends(kind, q.shape[2], k.shape[2], q.device) if kind != "NONE" else None
        require(mask is None or allowed is None, "a mask and causality exclude each other")
        if mask is not None and mask.dtype == torch.bool:
            allowed = mask
        elif mask is not None:
            same_type(q, mask)
            scores = scores + mask.to(scores.dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return (scores.softmax(-1) @ value).to(dtype)

    return run


def rotary_embedding(layer: Any, stored: Stored) -> Run:
    interleaved, rotary = layer.interleaved, layer.rotary_embedding_dim

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        dtype = same_type(x, cos, sin)
        size = rotary or x.shape[-1]
        cos, sin = ((t if positions is None else t[positions.long()]).float().unsqueeze(1) for t in (cos, sin))
        turned, rest = floats(x).split([size, x.shape[-1] - size], -1)
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1).to(dtype)

    return run
