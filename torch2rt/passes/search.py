"""Find the fewest modules to keep in float32, so that a graph in a narrow type is as near to float32 as is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.passes.precision import dtype_of, mixed_precision
from torch2rt.passes.ranges import Ranges, Running

Tensors = list[torch.Tensor]
Metric = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found.

    - `keep`: the calls that stay in float32, with the reason.
    - `modules`: their modules, the most sensitive first, of `count` that could compute in the narrow type.
    - `curve`: the metric for each number of modules kept that was tried.
    """

    keep: Mapping[Node, str]
    modules: list[str]
    count: int
    curve: list[tuple[int, float]]

    def __str__(self) -> str:
        names = ", ".join(module or "(the module itself)" for module in self.modules)
        kept = f"{len(self.modules)} of {self.count} modules stay in float32" + (f": {names}" if names else "")
        points = ", ".join(f"{metric:.2g} with {count}" for count, metric in self.curve)
        return f"{kept}. The metric is {points} kept"


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
    graph: torch.fx.GraphModule,
    low: torch.dtype,
    samples: Iterable[Tensors],
    tolerance: float,
    metric: Metric | None = None,
    *,
    keep: Mapping[Node, str],
    force: Mapping[Node, str],
    ranges: Ranges,
) -> Found:
    """The fewest modules to keep in float32 so that `metric` is at most `tolerance` on the samples.

    Each module's sensitivity is the metric with all calls of that module alone in `low`. The most sensitive ones are
    kept, as many as bisection finds that it takes. Nothing is built for it: the graphs run in torch. `metric` is given
    the outputs of a graph and those in float32, of all samples one after the other, and is 0 where they are the same.
    """
    inputs = list(samples)
    if not inputs:
        raise InputError("precision='auto' needs samples to measure on.")
    measure = metric or largest_distance
    expected = _outputs(graph, inputs)

    def tried(kept: Mapping[Node, str], alone: Mapping[Node, str] = {}) -> tuple[float, torch.fx.GraphModule]:
        made = mixed_precision(graph, low, keep={**kept, **keep}, force={**force, **alone}, ranges=ranges)
        return float(measure(_outputs(made, inputs), expected)), made

    error, made = tried({})
    names = {node.name for node in made.graph.nodes if dtype_of(node) is low}
    narrow = [n for n in graph.graph.nodes if n.op == "call_function" and n.name in names and n not in force]
    modules = list(dict.fromkeys(node.meta["module"] for node in narrow))
    curve = {0: error}
    if error <= tolerance:
        return Found({}, [], len(modules), [(0, error)])

    def keeping(chosen: Iterable[str]) -> dict[Node, str]:
        wanted = set(chosen)
        return {node: "precision='auto'" for node in narrow if node.meta["module"] in wanted}

    sensitivity = {m: tried(keeping(o for o in modules if o != m), keeping([m]))[0] for m in modules}
    order = sorted(modules, key=lambda m: (sensitivity[m] != sensitivity[m], sensitivity[m]), reverse=True)
    low_count, high_count = 0, len(order)
    curve[high_count] = tried(keeping(order))[0]
    if not curve[high_count] <= tolerance:
        least = f"the metric is {curve[high_count]:.3g} with every module in float32"
        raise InputError(f"precision='auto': {least}, beyond the tolerance of {tolerance:g}.")
    while high_count - low_count > 1:
        middle = (low_count + high_count) // 2
        curve[middle] = tried(keeping(order[:middle]))[0]
        low_count, high_count = (low_count, middle) if curve[middle] <= tolerance else (middle, high_count)
    chosen = order[:high_count]
    return Found(keeping(chosen), chosen, len(modules), sorted(curve.items()))


class _Outputs(Running):
    def seen(self, node: Node, value: Any) -> None:
        pass


def _outputs(graph: torch.fx.GraphModule, samples: Sequence[Tensors]) -> Tensors:
    """The outputs of a graph on samples, one after the other."""
    found: Tensors = []
    for tensors in samples:
        found += _Outputs(graph, next((x.device for x in tensors), torch.device("cpu"))).call(tensors)
    return found
