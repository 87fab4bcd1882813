"""Which products are faster in int8 or fp8: a narrow product costs more steps around it than a product in float16.

TensorRT's kernels read int8 and fp8 in vectors of 16 numbers, so that a convolution of 3 channels is padded to 16. A
single row is multiplied without tensor cores in any type. And a small product takes the time of starting its kernel,
while TensorRT for RTX scales the sums of a narrow product in a kernel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx.node import Node

from torch2rt.graph import sizes_at_opt
from torch2rt.passes.quantization.formats import Format
from torch2rt.passes.quantization.products import Quantizable, arguments, quantizable

WIDTH = 16  # numbers of one byte in a vector that a kernel reads
# Numbers in a weight. On an H200 with TensorRT for RTX 1.6, over 16 to 8,192 rows, int8 takes 1.15 times as long as
# float16 for 128 x 512, as long for 256 x 256, 0.88 times as long for 384 x 1536, and 0.62 times for 4096 x 4096.
SMALL = 2**18


def slower(graph: torch.fx.GraphModule, format: Format, low: torch.dtype) -> dict[Node, str]:
    """The products of a graph that are no faster in a format than in the type of the rest, each with the reason.

    Dynamic sizes are taken at the shapes that the engine is tuned for.

    >>> from torch2rt import trace
    >>> from torch2rt.passes.quantization.formats import FORMATS
    >>> graph = trace(torch.nn.Conv2d(3, 64, 3), [torch.randn(2, 3, 32, 32)])
    >>> list(slower(graph, FORMATS["int8"], torch.float16).values())
    ['its 3 input channels are fewer than the 16 that int8 kernels read at once']
    """
    if not format.is_whole:
        return {}
    at_opt = sizes_at_opt(graph)
    found = {}
    for product in quantizable(graph):
        if format.obstacle(product.function) is None:
            results = math.prod(map(at_opt, product.node.meta["val"].shape))
            if (why := _slower(product, results, format, low)) is not None:
                found[product.node] = why
    return found


def _slower(product: Quantizable, results: int, format: Format, low: torch.dtype) -> str | None:
    """Why a product with so many results is no faster in a format, if it is not."""
    shape = product.weight.meta["val"].shape
    outputs, inputs = shape[product.axis], shape[1 - product.axis]
    groups = arguments(product.node).get("groups", 1) if product.is_convolution else 1
    parts = ("input channels", "output channels") if product.is_convolution else ("inputs", "outputs")
    for count, part in zip((inputs, outputs), parts, strict=True):
        # a kernel of convolutions in groups computes without tensor cores, and is as fast as it reads its input
        if count < WIDTH and (groups == 1 or part == parts[1]):
            return f"its {count} {part} are fewer than the {WIDTH} that {format.name} kernels read at once"
    if results <= outputs:
        return f"one {'place' if product.is_convolution else 'row'} is multiplied without tensor cores"
    own = product.node.meta["val"].dtype
    is_small = inputs * outputs < SMALL and not product.is_convolution
    if is_small and (low if own is torch.float32 else own).itemsize == 2:
        return f"a weight of {inputs} x {outputs} is too small for {format.name} to save time"
    return None


def in_words(slow: Mapping[Node, str], format: Format) -> list[str]:
    """A sentence for each reason, for the report."""
    modules: dict[str, list[str]] = {}
    for node, why in slow.items():
        modules.setdefault(why, []).append(node.meta["module"] or "the module itself")
    return [
        f"{', '.join(dict.fromkeys(paths))}: no faster in {format.name}, and not quantised: {why}; "
        "quantize_all=True asks for it"
        for why, paths in modules.items()
    ]
