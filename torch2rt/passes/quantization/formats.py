"""What products are quantised to, by the names that users give."""

from __future__ import annotations

import dataclasses

import torch

from torch2rt.backend.quirks import builds_fp8_convolutions, builds_int8_convolutions
from torch2rt.passes.quantization.quantized import LARGEST

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})  # transposed ones are only simulated by TensorRT


@dataclasses.dataclass(frozen=True)
class Format:
    """How the numbers of a quantised product are stored.

    - `weights`: their type in the graph, a key of `quantized.LARGEST`.
    - `is_whole`: whether the values that weights are multiplied by are of that type too, so that TensorRT computes the
      product in it; else only the memory of weights is less.
    - `blocks`: how many numbers of a weight have a scale of their own, of which the first that divides their count is
      taken; without blocks each output has a scale.
    """

    name: str
    weights: torch.dtype
    is_whole: bool = True
    blocks: tuple[int, ...] = ()

    @property
    def largest(self) -> float:
        """The largest number of the type, which the largest value of a range becomes."""
        return LARGEST[self.weights]

    def obstacle(self, function: str) -> str | None:
        """Why products of a kind cannot be of this format with this TensorRT, if they cannot be."""
        if function not in CONVOLUTIONS:
            return None
        if not self.is_whole:
            return "only the weights of products of matrices are quantised alone"
        if self.name == "fp8":
            return None if builds_fp8_convolutions() else "this TensorRT has no fp8 convolutions that are right"
        return None if builds_int8_convolutions() else "this TensorRT has no int8 convolutions"


FORMATS = {
    format.name: format
    for format in (
        Format("int8", torch.int8),
        Format("fp8", torch.float8_e4m3fn),
        Format("int8_weights", torch.int8, is_whole=False),
        Format("int4_weights", torch.uint8, is_whole=False, blocks=(128, 64)),
    )
}
