"""Find the fewest modules to keep in a wider type, so that a graph is as near to float32 as is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.passes.copies import copy_graph, finish
from torch2rt.passes.precision import dtype_of, mixed_precision
from torch2rt.passes.quantization.calibrated import Calibrated, in_graph, ranges_of
from torch2rt.passes.ranges import Ranges, Running

Tensors = list[torch.Tensor]
Metric = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes in which type: a graph and the calls that are an exception.

    - `ranges`: of the graph's values. `low`: the type of what is not quantised.
    - `keep`, `force`: calls that compute in float32, or in `low`, with the reason; `floats`: those not quantised.
    """

    of: Calibrated
    low: torch.dtype
    ranges: Ranges
    keep: Mapping[Node, str] = dataclasses.field(default_factory=dict)
    force: Mapping[Node, str] = dataclasses.field(default_factory=dict)
    floats: Mapping[Node, str] = dataclasses.field(default_factory=dict)

    def made(self, io: torch.dtype | None = None) -> torch.fx.GraphModule:
        """The graph that computes so."""
        graph = self.of.quantized(self.floats)
        keep, force = (in_graph(graph, chosen) for chosen in (self.keep, self.force))
        ranges = ranges_of(graph, self.ranges)
        return mixed_precision(graph, self.low, keep=keep, force=force, ranges=ranges, io=io)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found.

    - `modules`: those that are kept in the type `wide`, the most sensitive first, of `count` that could be narrower.
    - `curve`: the metric for each number of modules kept that was tried. `tolerance`: what it was to be at most.
    """

    wide: str
    modules: list[str]
    count: int
    curve: list[tuple[int, float]]
    tolerance: float

    def __str__(self) -> str:
        names = ", ".join(module or "(the module itself)" for module in self.modules)
        kept = f"{len(self.modules)} of {self.count} modules stay in {self.wide}" + (f": {names}" if names else "")
        points = ", ".join(f"{metric:.2g} with {count}" for count, metric in self.curve)
        return f"{kept}. The metric is {points} kept, the tolerance {self.tolerance:g}"

    def table(self) -> str:
        """A row for each number of modules that was tried: how many stay in the wider type, and the metric."""
        rows = [("kept", "metric", ""), *((str(n), f"{x:.3g}", self._words(n)) for n, x in self.curve)]
        return "\n".join(f"{kept:>6}  {metric:>10}  {words}".rstrip() for kept, metric, words in rows)

    def _words(self, count: int) -> str:
        return "taken" if count == len(self.modules) else ""

    def picture(self, path: str | Path) -> None:
        """Draw the metric against the number of modules kept; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure((7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([n for n, _ in self.curve], [max(x, 1e-12) for _, x in self.curve], "o-")
        axes.axhline(self.tolerance, color="gray", linestyle="--", label="tolerance")
        axes.axvline(len(self.modules), color="gray", linestyle=":", label=f"{len(self.modules)} kept")
        axes.set(yscale="log", xlabel=f"modules kept in {self.wide}, of {self.count}", ylabel="metric")
        axes.legend()
        figure.savefig(path)


def largest_distance(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of the outputs with floating-point numbers, the largest distance from what is expected, in parts of its norm.

    >>> largest_distance([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])])
    0.1
    """
    found = [0.0]
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs.is_floating_point() and theirs.numel():
            scale = theirs.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
            found.append(float((ours.double() - theirs.double()).norm() / scale))
    return max(found, key=lambda x: (x != x, x))  # a NaN is the largest


def search(
    choice: Choice, samples: Iterable[Tensors], tolerance: float, metric: Metric | None = None
) -> tuple[Choice, list[Found]]:
    """A choice with the fewest modules in a wider type so that `metric` is at most `tolerance` on the samples.

    First modules are kept in float32 where they would be in the narrow type, then, of a graph that is quantised, in the
    narrow type. Each module's sensitivity is the metric with all calls of that module alone in the narrower type. The
    most sensitive ones are kept, as many as bisection finds that it takes. Nothing is built for it: the graphs run in
    torch. `metric` is given the outputs of a graph and those in float32, of all samples one after the other, and is 0
    where they are the same.
    """
    inputs = list(samples)
    if not inputs:
        raise InputError("precision='auto' needs samples to measure on.")
    expected = _outputs(choice.of.graph, inputs)

    def measured(made: torch.fx.GraphModule) -> float:
        return float((metric or largest_distance)(_outputs(made, inputs), expected))

    chosen, found = _in_float32(choice, measured, tolerance)
    if choice.of.format is None:
        return chosen, [found]
    chosen, more = _in_floats(chosen, measured, tolerance)
    return chosen, [found, more]


Measured = Callable[[torch.fx.GraphModule], float]


def _in_float32(choice: Choice, measured: Measured, tolerance: float) -> tuple[Choice, Found]:
    """The fewest modules in float32, of a graph that is not quantised."""
    plain = dataclasses.replace(choice, of=Calibrated(choice.of.graph))
    graph, low = choice.of.graph, choice.low
    names = {node.name for node in plain.made().graph.nodes if dtype_of(node) is low}
    forced = {node.name for node in choice.force}
    narrow = [n for n in graph.graph.nodes if n.op == "call_function" and n.name in names - forced]
    modules = list(dict.fromkeys(node.meta["module"] for node in narrow))

    def keeping(kept: Collection[str], alone: str | None = None) -> Choice:
        chosen = {node: "precision='auto'" for node in narrow if node.meta["module"] in kept}
        only = {node: "precision='auto'" for node in narrow if node.meta["module"] == alone}
        return dataclasses.replace(plain, keep={**chosen, **choice.keep}, force={**only, **choice.force})

    def tried(kept: Collection[str], alone: str | None = None) -> float:
        return measured(keeping(kept, alone).made())

    found = _fewest(modules, tried, tolerance, "float32")
    return dataclasses.replace(choice, keep=keeping(found.modules).keep), found


def _in_floats(choice: Choice, measured: Measured, tolerance: float) -> tuple[Choice, Found]:
    """The fewest modules that are not quantised."""
    kept_already = {node.name for node in choice.floats}
    modules = {
        module: calls
        for module, names in choice.of.names().items()
        if (calls := [name for name in names if name not in kept_already])
    }
    nodes = {node.name: node for node in choice.of.graph.graph.nodes}

    def keeping(kept: Collection[str]) -> dict[Node, str]:
        chosen = {nodes[name]: "precision='auto'" for module in kept for name in modules[module]}
        return {**chosen, **choice.floats}

    def tried(kept: Collection[str], alone: str | None = None) -> float:
        if alone is not None:  # what quantising it changes, without the roundings of all others
            return measured(choice.of.quantized(keeping(kept)))
        return measured(dataclasses.replace(choice, floats=keeping(kept)).made())

    found = _fewest(list(modules), tried, tolerance, str(choice.low).removeprefix("torch."))
    return dataclasses.replace(choice, floats=keeping(found.modules)), found


def _fewest(modules: list[str], tried: Callable[..., float], tolerance: float, wide: str) -> Found:
    """The fewest modules that `tried`, given what is kept and what alone is narrow, finds it takes."""
    curve = {0: tried(())}
    if curve[0] <= tolerance:
        return Found(wide, [], len(modules), [*curve.items()], tolerance)
    sensitivity = {m: tried([other for other in modules if other != m], m) for m in modules}
    order = sorted(modules, key=lambda m: (sensitivity[m] != sensitivity[m], sensitivity[m]), reverse=True)
    low_count, high_count = 0, len(order)
    curve[high_count] = tried(order)
    if not curve[high_count] <= tolerance:
        least = f"the metric is {curve[high_count]:.3g} with every module in {wide}"
        raise InputError(f"precision='auto': {least}, beyond the tolerance of {tolerance:g}.")
    while high_count - low_count > 1:
        middle = (low_count + high_count) // 2
        curve[middle] = tried(order[:middle])
        low_count, high_count = (low_count, middle) if curve[middle] <= tolerance else (middle, high_count)
    return Found(wide, order[:high_count], len(modules), sorted(curve.items()), tolerance)


def noted(graph: torch.fx.GraphModule, texts: Sequence[str], searches: Sequence[Found] = ()) -> torch.fx.GraphModule:
    """A graph with sentences, and what was searched for, in its report."""
    if not searches and not texts:
        return graph
    copy, meta = copy_graph(graph), graph_meta(graph)
    found = (*(f"precision='auto': {found}" for found in searches), *meta.assumptions, *texts)
    copy.meta["torch2rt"] = dataclasses.replace(meta, assumptions=found, searches=tuple(searches))
    return finish(copy)


class _Outputs(Running):
    def seen(self, node: Node, value: Any) -> None:
        pass


def _outputs(graph: torch.fx.GraphModule, samples: Sequence[Tensors]) -> Tensors:
    """The outputs of a graph on samples, one after the other."""
    found: Tensors = []
    for tensors in samples:
        found += _Outputs(graph, next((x.device for x in tensors), torch.device("cpu"))).call(tensors)
    return found
