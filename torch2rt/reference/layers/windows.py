"""The sliding window that convolution and pooling share: its size, stride, dilation and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch2rt.reference.layers.common import require


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution, deconvolution or pooling."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pre: tuple[int, ...]
    post: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, layer: Any, size: Any, dilation: Any = None) -> Window:
        size = tuple(size)
        return cls(
            size,
            tuple(layer.stride_nd),
            tuple(dilation or (1,) * len(size)),
            tuple(layer.pre_padding),
            tuple(layer.post_padding),
            layer.padding_mode.name,
        )

    @property
    def extent(self) -> list[int]:
        return [1 + d * (n - 1) for n, d in zip(self.size, self.dilation, strict=True)]

    def halves(self, total: int) -> tuple[int, int]:
        """SAME padding, split into before and after."""
        small, large = total // 2, total - total // 2
        return (small, large) if self.mode == "SAME_UPPER" else (large, small)

    def padding(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Per dimension the padding before and after, and how far the last window of ROUND_UP hangs over it."""
        pads = []
        for n, stride, extent, pre, post in zip(lengths, self.stride, self.extent, self.pre, self.post, strict=True):
            if self.mode.startswith("SAME"):
                total = (n - 1) // stride * stride + extent - n
                require(total >= 0, f"{self.mode} with a stride of {stride} over a window of {extent} is not supported")
                pads.append((*self.halves(total), 0))
                continue
            room = n + pre + post - extent
            require(room >= 0, f"a window of {extent} does not fit into {n} padded by {pre} and {post}")
            pads.append((pre, post, -room % stride if self.mode == "EXPLICIT_ROUND_UP" else 0))
        return pads

    def cropping(self) -> list[tuple[int, int]]:
        """What a deconvolution cuts off its full result, before and after."""
        if self.mode.startswith("SAME"):
            return [self.halves(max(e - s, 0)) for e, s in zip(self.extent, self.stride, strict=True)]
        return list(zip(self.pre, self.post, strict=True))
