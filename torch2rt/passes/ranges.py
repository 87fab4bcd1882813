"""How large the values of a graph are on samples, which says what a narrow type can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.passes.precision_rules import name_of
from torch2rt.recipes.tape import unrecorded


@dataclasses.dataclass
class Range:
    """The largest finite absolute value of a tensor, and whether it had a NaN."""

    largest: float = 0.0
    has_nan: bool = False

    def add(self, x: torch.Tensor) -> None:
        """Include a tensor's values."""
        if not x.numel():
            return
        low, high = torch.aminmax(x.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.has_nan |= bool(x.isnan().any())
            low, high = torch.aminmax(torch.where(x.isfinite(), x, 0.0))
        self.largest = max(self.largest, -float(low), float(high))


Ranges = dict[str, Range]  # by the names of nodes


class Running(torch.fx.Interpreter):
    """A traced graph on real tensors, on their device, with each node's value handed to `seen`."""

    def __init__(self, graph: torch.fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        self.device = device

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.seen(n, value)
        return value

    def seen(self, node: Node, value: Any) -> None:
        raise NotImplementedError

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the graph on one sample."""
        with torch.no_grad(), unrecorded():
            return self.run(*tensors)


class Measuring(Running):
    """Keeps the range of every float32 value, and of the scores within an attention."""

    def __init__(self, graph: torch.fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph, device)
        self.ranges: Ranges = {}

    def seen(self, node: Node, value: Any) -> None:
        if node.op == "output":
            return
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(x, torch.Tensor) and x.dtype is torch.float32:
                self.ranges.setdefault(node.name, Range()).add(x)
        if name_of(node.target) == "scaled_dot_product_attention":
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            self.ranges.setdefault(f"{node.name}:scores", Range()).add(_scores(*args, **kwargs))


def _scores(query: torch.Tensor, key: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
    """The products of queries and keys, which an attention computes within."""
    if query.dim() > 3 and query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = options.get("scale")
    return (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT


def measure(
    graph: torch.fx.GraphModule, samples: Iterable[Sequence[torch.Tensor]], known: Ranges | None = None
) -> Ranges:
    """The range of every float32 value of a graph on samples, which are the tensors of its inputs, and what is known.

    Raises `InputError` for a sample on which the graph does not run.

    >>> from torch2rt import trace
    >>> graph = trace(torch.nn.Sigmoid(), [torch.randn(2, 3)])
    >>> measure(graph, [[torch.tensor([[-7.0, 3.0, 0.5]])]])["sigmoid"].largest < 1
    True
    """
    ranges = {name: dataclasses.replace(found) for name, found in (known or {}).items()}
    for number, tensors in enumerate(samples):
        running = Measuring(graph, next((x.device for x in tensors), torch.device("cpu")))
        running.ranges = ranges
        try:
            running.call(tensors)
        except Exception as error:
            raise InputError(
                f"The ranges of values cannot be measured: sample {number} fails with {type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}. Pass samples= that the module takes, or samples=[] to go "
                "without."
            ) from error
    return ranges


def as_samples(graph: torch.fx.GraphModule, samples: Iterable[Any], others: bool = False) -> list[list[torch.Tensor]]:
    """Samples as users give them, as the tensors of the graph's inputs.

    Each is the positional arguments of a call, in a list or tuple, one tensor, or a dict of keyword arguments. Raises
    `InputError` for one that the engine would not take; with `others`, those of sizes that it does not serve are left
    out, as another engine of the module serves them.
    """
    interface, found = graph_meta(graph).interface, []
    devices = [node.meta["val"].device for node in graph.graph.find_nodes(op="placeholder")]
    for sample in samples:
        args = tuple(sample) if isinstance(sample, (tuple, list)) else () if isinstance(sample, Mapping) else (sample,)
        tensors = interface.tensors(args, sample if isinstance(sample, Mapping) else {})
        try:
            interface.check([tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
        except InputError:
            if others:
                continue
            raise
        found.append([x.to(device) for x, device in zip(tensors, devices, strict=True)])
    return found
