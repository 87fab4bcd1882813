"""SmoothQuant: move the scales of a value's channels into its weights, before both are quantised.

Some channels of a transformer's activations are much larger than the others, which then share few of the 256 numbers of
an int8. Each channel is divided by `largest ** strength / weight ** (1 - strength)`, of its largest value and that of
its weights, and the weights are multiplied by it: the products stay the same. The division is a call before the value
is quantised, which TensorRT computes in the kernel that quantises it. A value stays as it is where its products would
be further off: then the scales of its weights become more unequal than those of its channels were.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx.node import Node

from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.quantization.calibrate import Channels
from torch2rt.passes.quantization.products import Quantizable, quantizable

FLOOR = 8.0  # by which a channel's largest value may be less than the median of all
LEAST, MOST = 1e-3, 1e4  # of the divisors: one over them is a normal number of float16


def smoothable(graph: torch.fx.GraphModule) -> list[Quantizable]:
    """The products of matrices of a graph: what a convolution's window adds to is not one channel of its input."""
    return [product for product in quantizable(graph) if not product.is_convolution]


@torch.inference_mode(False)
@torch.no_grad()
def smooth(
    graph: torch.fx.GraphModule,
    channels: Mapping[str, Channels],
    strength: float,
    keep: Mapping[Node, str] | None = None,
) -> torch.fx.GraphModule:
    """A graph whose products have smoother inputs, by the largest values of channels, by the names of the inputs.

    `strength` is how much of a channel's scale is moved, from 0 to 1; products in `keep` stay as they are.
    """
    kept, copy = {node.name for node in keep or {}}, copy_graph(graph)
    by_input: dict[Node, list[Quantizable]] = {}
    for product in smoothable(copy):
        if product.node.name not in kept and product.input.name in channels:
            by_input.setdefault(product.input, []).append(product)
    for value, products in by_input.items():
        weights = [_rows(copy, product) for product in products]
        largest = torch.stack([rows.abs().amax(0) for rows in weights]).amax(0)
        divisors = _divisors(channels[value.name].largest, largest, strength)
        if not bool(_noise(channels[value.name], weights, divisors) < _noise(channels[value.name], weights)):
            continue  # one answer is read, and no number: other weights may take the place of these
        inverse = (1.0 / divisors).to(value.meta["val"].dtype)
        with copy.graph.inserting_after(value):
            divided = copy.graph.call_function(torch.mul, (value, None))
        constant = add_constant(copy, f"{products[0].weight.target}_smooth", inverse, divided)
        divided.args = (value, constant)
        divided.meta = {name: value.meta[name] for name in ("val", "module", "source") if name in value.meta}
        divided.meta.setdefault("module", products[0].node.meta["module"])
        divided.meta.setdefault("source", products[0].node.meta["source"])
        for product, rows in zip(products, weights, strict=True):
            scaled = (rows * divisors).to(product.weight.meta["val"].dtype)
            made = add_constant(
                copy, f"{product.weight.target}_smoothed", scaled.T if product.axis else scaled, product.node
            )
            made.meta["made_of"] = origin_of(product.weight).then("times the scales of its inputs' channels")
            product.node.replace_input_with(value, divided)
            product.node.replace_input_with(product.weight, made)
    return finish(copy)


def _rows(graph: torch.fx.GraphModule, product: Quantizable) -> torch.Tensor:
    """A weight with a row for each output."""
    weight = constant_of(graph, product.weight)
    assert weight is not None
    rows = weight.detach().float().cpu()
    return rows.T if product.axis else rows


def _noise(channels: Channels, weights: list[torch.Tensor], divisors: torch.Tensor | float = 1.0) -> torch.Tensor:
    """How much the rounding of a value and of its weights to int8 changes the products, up to a factor.

    Each rounding is off by a share of the largest number that has the same scale: of all values, or of a weight's row.
    """
    of_values = (channels.largest / divisors).max() ** 2
    squares = (channels.mean_square / divisors**2).sum()
    scaled = [rows * divisors for rows in weights]
    return torch.stack([of_values * w.square().sum() + squares * w.abs().amax(1).square().sum() for w in scaled]).sum()


def _divisors(values: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """What each channel is divided by; 1 for those of which all weights are 0.

    A channel that the data hardly uses, or never, may be larger at other inputs, and must not become the largest then.
    """
    values = values.clamp_min(values[values > 0].median() / FLOOR if (values > 0).any() else 0.0)
    divisors = values**strength / weights ** (1 - strength)
    is_used = (values > 0) & (weights > 0) & divisors.isfinite()
    return torch.where(is_used, divisors, 1.0).clamp(LEAST, MOST)
