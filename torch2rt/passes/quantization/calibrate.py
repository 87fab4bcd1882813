"""Calibration: the values of a traced graph on real data, and the ranges that they are quantised to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.graph import graph_meta, place_of
from torch2rt.passes.quantization.histogram import INT8_NUMBER, METHODS, Histogram, Number
from torch2rt.passes.quantization.products import arguments
from torch2rt.passes.quantization.quantized import probabilities_of
from torch2rt.passes.ranges import Measuring, Ranges, calls_of
from torch2rt.progress import Spinner

LOST = 0.9  # of the values but 0, the share that becomes 0, from which on a range fits none
BEYOND = 100.0  # times as large as the data, an example's value says that the two are of different kinds


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration data has shown of a graph, by the names of its nodes.

    - `largest`: the absolute values to quantise to; infinity where no range fits. `ranges`: of all values.
    - `channels`: of those that were asked for, the largest absolute value and the mean of each channel.
    """

    largest: dict[str, float]
    ranges: Ranges = dataclasses.field(default_factory=dict)
    channels: dict[str, Channels] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Channels:
    """The largest absolute value of each channel of a value, along one of its dimensions, and its sum and squares."""

    dim: int
    largest: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    total: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    count: int = 0

    def add(self, x: torch.Tensor) -> None:
        rows = x.detach().float().movedim(self.dim, 0).flatten(1)
        if rows.numel():
            self.largest = torch.maximum(self.largest, rows.abs().amax(1).cpu())
            self.total = self.total + rows.sum(1, dtype=torch.float64).cpu()
            self.squares = self.squares + rows.square().sum(1, dtype=torch.float64).cpu()
            self.count += rows.shape[1]

    @property
    def mean(self) -> torch.Tensor:
        return (self.total / max(self.count, 1)).float()

    @property
    def mean_square(self) -> torch.Tensor:
        return (self.squares / max(self.count, 1)).float()


@torch.inference_mode(False)
def calibrate(
    graph: torch.fx.GraphModule,
    batches: Iterable[Any],
    nodes: Sequence[Node],
    method: str = "entropy",
    progress: bool | None = None,
    others: bool = False,
    number: Number = INT8_NUMBER,
    needless: Container[Node] = (),
    examples: Sequence[Sequence[torch.Tensor]] = (),
    channels: Mapping[Node, int] | None = None,
    attentions: Sequence[Node] = (),
) -> Calibration:
    """The largest absolute values to quantise nodes' values to, and the ranges of all values.

    - `batches`: each is the inputs of a call, in a list, a tuple, a dict by keyword, or one tensor; of any size, as one
      that is larger than the graph takes is split along the first dimension.
    - `others`: leave out batches of sizes that the graph does not serve, as another graph of the module does.
    - `method`: `"entropy"`, `"minmax"`, `"percentile"` or `"mse"`, as `histogram.py` defines them for a `number`.
    - `needless`: of the nodes, those that nothing is quantised of, whatever their values are.
    - `examples`: of inputs, in tensors, which the data should be like.
    - `channels`: the dimension of the channels of values that are looked at channel by channel.
    - `attentions`: those whose largest probability is looked for, too; it is found under `name:probabilities`.

    Where one range holds outliers and hardly any other value, as all but few of them would become 0, none fits.

    Raises `InputError` for batches that the module does not take, for none, for NaN and infinities in a value, and for
    data whose values are nothing like those of the examples.

    >>> from torch2rt import trace
    >>> graph = trace(torch.nn.Linear(1, 1), [torch.ones(2, 1)])
    >>> x = graph.graph.find_nodes(op="placeholder")
    >>> list(calibrate(graph, [torch.tensor([[-3.0], [2.0]])], x, "minmax").largest.values())
    [3.0]
    """
    if method not in METHODS:
        raise InputError(f"calibration_method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    running = _Calibrating(graph, nodes, {node.name: Channels(dim) for node, dim in (channels or {}).items()})
    running.probabilities = {f"{node.name}:probabilities": 0.0 for node in attentions}
    count = used = 0
    with Spinner("calibrate", progress).turning(lambda: f"batch {count}"):
        for batch in batches:
            for tensors in _calls(graph, batch, count, others):
                used += 1
                try:
                    running.call(tensors)
                except Exception as error:
                    raise InputError(
                        f"calibration: the module fails on batch {count} with {type(error).__name__}: "
                        f"{(str(error).splitlines() or [''])[0]}"
                    ) from error
            count += 1
    if count and not used:
        raise InputError("calibration= has no batch of sizes that each of the engines serves.")
    if not count:
        raise InputError("calibration= has no batch. Pass some inputs such as the engine will be given.")
    found = {}
    for node in nodes:
        histogram = running.histograms[node.name]
        if histogram.not_finite and node not in needless:
            raise InputError(f"calibration: {_where(graph, node)} has {histogram.not_finite} on the calibration data.")
        largest = METHODS[method](histogram, number) if histogram.largest else 0.0
        is_lost = bool(largest) and histogram.lost(largest, number) > LOST
        found[node.name] = math.inf if histogram.not_finite or is_lost else largest
    seen = {node: running.histograms[node.name].largest for node in nodes if node not in needless}
    _check_likeness(graph, seen, found, examples)
    return Calibration({**found, **running.probabilities}, running.ranges, running.channels)


def _check_likeness(
    graph: torch.fx.GraphModule,
    seen: Mapping[Node, float],
    found: Mapping[str, float],
    examples: Sequence[Sequence[torch.Tensor]],
) -> None:
    """Raise `InputError` where the largest values of the data are nothing like those of the examples.

    An example may be made up, so that its values are somewhat larger. A value that is 0 in the data is not quantised,
    and may be anything, unless it is an input.
    """
    running = _Calibrating(graph, list(seen), {})
    for tensors in examples:
        running.call(tensors)
    for node, largest in seen.items():
        there = running.histograms[node.name].largest
        is_far = there > BEYOND * largest if largest and math.isfinite(found[node.name]) else node.op == "placeholder"
        if there > largest and is_far:
            raise InputError(
                f"calibration: {_where(graph, node)} is up to {there:.3g} on the example, and up to {largest:.3g} on "
                "the calibration data. Pass calibration= such as the engine will be given, and an example such as that."
            )


def _where(graph: torch.fx.GraphModule, node: Node) -> str:
    inputs = graph_meta(graph).interface.inputs
    return f"the input '{inputs[node.meta['input']].name}'" if node.op == "placeholder" else place_of(node).strip()


class _Calibrating(Measuring):
    """Counts the values of some nodes, and keeps the ranges of all."""

    def __init__(self, graph: torch.fx.GraphModule, nodes: Sequence[Node], channels: dict[str, Channels]) -> None:
        super().__init__(graph, torch.device("cpu"))
        self.histograms = {node.name: Histogram() for node in nodes}
        self.channels = channels
        self.probabilities: dict[str, float] = {}

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        self.device = next((x.device for x in tensors), torch.device("cpu"))
        return super().call(tensors)

    def seen(self, node: Node, value: Any) -> None:
        super().seen(node, value)
        if node.name in self.histograms:
            self.histograms[node.name].add(value, self.extent)
        if node.name in self.channels:
            self.channels[node.name].add(value)
        if (name := f"{node.name}:probabilities") in self.probabilities:
            given = dict(zip(arguments(node), self.map_nodes_to_values(list(arguments(node).values()), node)))
            wanted = ("query", "key", "attn_mask", "is_causal", "scale")
            found = probabilities_of(**{name: given[name] for name in wanted if name in given})
            self.probabilities[name] = max(self.probabilities[name], float(found.max()))


def _calls(graph: torch.fx.GraphModule, batch: Any, number: int, others: bool) -> list[list[torch.Tensor]]:
    """A batch as calls that the graph takes."""
    try:
        return calls_of(graph, batch, others)
    except InputError as error:
        raise InputError(f"calibration: batch {number} is not what the module takes. {error}") from error
