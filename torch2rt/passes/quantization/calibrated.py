"""A graph that is to be quantised, and what was found out about it: before it is decided which calls are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.passes.quantization import calibration_file
from torch2rt.passes.quantization.attention import attentions, obstacle, operands
from torch2rt.passes.quantization.calibrate import Calibration, calibrate
from torch2rt.passes.quantization.formats import FORMATS, Format
from torch2rt.passes.quantization.histogram import FP8_NUMBER, INT8_NUMBER
from torch2rt.passes.quantization.products import observed, quantizable
from torch2rt.passes.quantization.quantize import quantize
from torch2rt.passes.quantization.quantized import LARGEST, dequantize, fake_quantize, fake_quantize_fp8
from torch2rt.passes.quantization.smooth import smooth, smoothable
from torch2rt.passes.ranges import Range, Ranges


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A graph whose values have been looked at; `format` is `None` for one that is not quantised.

    `corrects`: whether biases are corrected for the rounding of weights. `attention`: whether attentions are quantised.
    """

    graph: torch.fx.GraphModule
    format: Format | None = None
    calibration: Calibration = dataclasses.field(default_factory=lambda: Calibration({}))
    corrects: bool = False
    attention: bool = False

    def quantized(self, keep: Mapping[Node, str]) -> torch.fx.GraphModule:
        """The graph with quantised products, but for the calls in `keep` and those of the same names."""
        if self.format is None:
            return self.graph
        means = {n: found.mean for n, found in self.calibration.channels.items()} if self.corrects else None
        largest, kept = self.calibration.largest, in_graph(self.graph, keep)
        return quantize(self.graph, largest, kept, self.format, means, self.attention)

    def names(self) -> dict[str, list[str]]:
        """The names of the calls that are quantised, by the paths of their modules."""
        found: dict[str, list[str]] = {}
        for product in quantizable(self.graph) if self.format is not None else []:
            if self.format is not None and self.format.obstacle(product.function) is None:
                found.setdefault(product.node.meta["module"], []).append(product.node.name)
        for node in attentions(self.graph) if self.attention else []:
            found.setdefault(node.meta["module"], []).append(node.name)
        return found


def look_at(
    graph: torch.fx.GraphModule,
    format: Format,
    batches: Iterable[Any] | None,
    *,
    method: str | None = None,
    cache: Any = None,
    reads_cache: bool = False,
    strength: float | None = None,
    corrects: bool = False,
    attention: bool = False,
    keep: Mapping[Node, str],
    examples: Callable[[torch.fx.GraphModule], Sequence[Sequence[torch.Tensor]]],
    progress: bool | None = None,
    others: bool = False,
) -> Calibrated:
    """Calibrate a graph on batches, or read its cache; with `strength`, its channels are made smoother before."""
    if not format.is_whole:
        return Calibrated(graph, format)
    method = method or ("minmax" if format is FORMATS["fp8"] else "entropy")
    number = FP8_NUMBER if format is FORMATS["fp8"] else INT8_NUMBER
    if reads_cache:
        largest = calibration_file.load(cache, graph, _observed(graph, format, attention))
        return Calibrated(graph, format, Calibration(largest), attention=attention)
    assert batches is not None  # `Precision` has looked
    if strength is not None:
        batches = list(batches)
        channels = {product.input: product.channels for product in smoothable(graph)}
        if not channels:
            raise InputError("smooth_quant is for linear layers and products of matrices, and the module has none.")
        first = calibrate(graph, batches, [], "minmax", progress, others, channels=channels)
        graph = smooth(graph, first.channels, strength, keep)
    nodes = _observed(graph, format, attention)
    channels = {p.input: p.channels for p in quantizable(graph) if p.takes_bias} if corrects else {}
    looked_at = [n for n in attentions(graph) if obstacle(n, format, is_alone=True) is None] if attention else []
    wanted = observed(graph, format, in_graph(graph, keep))
    wanted += [x for node in looked_at if node not in in_graph(graph, keep) for x in operands(node)]
    found = calibrate(
        graph,
        batches,
        nodes,
        method,
        progress,
        others,
        number,
        {*nodes} - {*wanted},
        examples(graph),
        channels,
        looked_at,
    )
    if cache is not None:
        calibration_file.save(cache, graph, nodes, found.largest, method)
    return Calibrated(graph, format, found, corrects, attention)


def _observed(graph: torch.fx.GraphModule, format: Format, attention: bool) -> list[Node]:
    """The values whose ranges it takes."""
    within = [x for node in attentions(graph) for x in operands(node)] if attention else []
    return list(dict.fromkeys([*observed(graph, format), *(x for x in within if isinstance(x, Node))]))


def ranges_of(graph: torch.fx.GraphModule, ranges: Ranges) -> Ranges:
    """Ranges with those of a graph's quantised values and weights, which are no larger than what they are made of."""
    more = {}
    for node in graph.graph.nodes:
        if node.target in (fake_quantize, fake_quantize_fp8) and (source := ranges.get(node.args[0].name)) is not None:
            more[node.name] = source
        elif node.target is dequantize:
            values, scale = (getattr(graph, part.target, None) for part in node.args[:2])
            if values is not None and scale is not None:
                largest: Any = scale.max() * LARGEST[values.dtype]  # compared, not read: a refit may bring another
                more[node.name] = Range(largest)
    return {**ranges, **more}


def in_graph(graph: torch.fx.GraphModule, chosen: Mapping[Node, str]) -> dict[Node, str]:
    """Chosen calls by those of the same names in a graph."""
    names = {node.name: why for node, why in chosen.items()}
    return {node: names[node.name] for node in graph.graph.nodes if node.name in names}
