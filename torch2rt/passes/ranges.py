"""How large the values of a graph are on samples, which says what a narrow type can hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.interface import Interface
from torch2rt.passes.precision_rules import name_of
from torch2rt.passes.wide_products import WideProducts
from torch2rt.recipes.tape import unrecorded


@dataclasses.dataclass
class Range:
    """The largest finite absolute value of a tensor, and whether it had a NaN."""

    largest: float = 0.0
    has_nan: bool = False

    def add(self, x: torch.Tensor) -> tuple[float, float]:
        """Include a tensor's values, and return the least and the largest."""
        if not x.numel():
            return 0.0, 0.0
        low, high = extent = torch.aminmax(x.detach())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.has_nan |= bool(x.isnan().any())
            low, high = torch.aminmax(torch.where(x.isfinite(), x, 0.0))
        self.largest = max(self.largest, -float(low), float(high))
        return float(extent.min), float(extent.max)


Ranges = dict[str, Range]  # by the names of nodes


@dataclasses.dataclass(frozen=True)
class WithKeywords:
    """A list of samples, each with further keyword arguments, such as the state that a module begins with."""

    samples: Iterable[Any]
    keywords: Mapping[str, Any]

    def __iter__(self) -> Iterator[Call]:
        for sample in self.samples:
            args, keywords = arguments_of(sample)
            yield Call(args, {**self.keywords, **keywords})


class Call(NamedTuple):
    """A sample as the arguments of a call."""

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]


def arguments_of(sample: Any) -> Call:
    """A sample as users give it: positional arguments in a list or tuple, one tensor, or keywords in a dict."""
    if isinstance(sample, Call):
        return sample
    if isinstance(sample, Mapping):
        return Call((), sample)
    return Call(tuple(sample) if isinstance(sample, (tuple, list)) else (sample,), {})


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors that a node's recorded value has."""
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]


class Running(torch.fx.Interpreter):
    """A traced graph on real tensors, on their device, with each node's value handed to `seen`."""

    def __init__(self, graph: torch.fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        self.device = device
        values = (t for node in graph.graph.nodes for t in tensors_of(node))
        is_slow = device.type == "cpu" and any(t.dtype is torch.float16 for t in values)
        self.within: AbstractContextManager[Any] = WideProducts() if is_slow else nullcontext()

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
        with torch.no_grad(), unrecorded(), self.within:
            return self.run(*tensors)


class Measuring(Running):
    """Keeps the range of every float32 value, and of the scores within an attention."""

    def __init__(self, graph: torch.fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph, device)
        self.ranges: Ranges = {}
        self.extent: tuple[float, float] | None = None  # of the value that was seen last, where it was looked at

    def seen(self, node: Node, value: Any) -> None:
        self.extent = None
        if node.op in ("output", "get_attr"):
            return
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(x, torch.Tensor) and x.dtype is torch.float32:
                self.extent = self.ranges.setdefault(node.name, Range()).add(x)
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

    Each is what `calls_of` takes. Raises `InputError` for one that the engine would not take.
    """
    return [tensors for sample in samples for tensors in calls_of(graph, sample, others)]


def calls_of(graph: torch.fx.GraphModule, sample: Any, others: bool = False) -> list[list[torch.Tensor]]:
    """A sample as calls that the graph takes, each the tensors of its inputs.

    A sample is the positional arguments of a call, in a list or tuple, one tensor, or a dict of keyword arguments. One
    with a larger batch than the graph takes is split along the first dimension. Raises `InputError` for one that the
    engine would not take; with `others`, those of sizes that it does not serve are left out, as another engine of the
    module serves them.
    """
    interface = graph_meta(graph).interface
    tensors = interface.tensors(*arguments_of(sample))
    devices = [node.meta["val"].device for node in graph.graph.find_nodes(op="placeholder")]
    tensors = [x.to(device) for x, device in zip(tensors, devices, strict=True)]
    try:
        interface.check([tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
        return [tensors]
    except InputError:
        if (parts := _parts(interface, tensors)) is None and not others:
            raise
        return parts or []


def _parts(interface: Interface, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]] | None:
    """A batch in parts of sizes that are served; the last begins anew with the first samples where it is too small."""
    if any(not x.dim() for x in tensors) or len({x.shape[0] for x in tensors}) != 1 or not len(tensors[0]):
        return None
    count, most = len(tensors[0]), min(spec.max[0] for spec in interface.inputs)
    least = max(spec.min[0] for spec in interface.inputs)
    if most < 1 or least > most:
        return None
    parts = []
    for start in range(0, count, most):
        size = max(min(most, count - start), least)
        places = torch.tensor([*itertools.islice(itertools.cycle(range(count)), start, start + size)])
        parts.append([x.index_select(0, places.to(x.device)) for x in tensors])
    try:
        for part in parts:
            interface.check([tuple(x.shape) for x in part], [x.dtype for x in part])
    except InputError:
        return None
    return parts
