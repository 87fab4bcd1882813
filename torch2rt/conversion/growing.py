"""Engines of segments for larger sizes than they were first built for, where sizes depend on values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from torch2rt.engine.engine import Engine
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.interface import Shape
from torch2rt.lowering import lower
from torch2rt.network import Network
from torch2rt.passes.copies import to_be_kept
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.partition import Segment
from torch2rt.passes.partitioning.split import split
from torch2rt.runtime.partitioned.growth import first_beyond


@dataclasses.dataclass(frozen=True)
class Larger:
    """Makes the engine of a segment of a graph for twice the sizes, or as many times twice as shapes need.

    - `first`: the sizes that all were built for; `most`: the largest that the user allows, `None` for any.
    """

    graph: torch.fx.GraphModule
    segments: Sequence[Segment]
    passes: Sequence[Pass]
    nan: str
    first: int
    most: int | None
    build: Callable[[Network], Engine]

    def __call__(self, index: int, shapes: Sequence[Shape]) -> tuple[Engine, Network]:
        """The engine and its network; raises `InputError` for shapes beyond what the user allows."""
        bound = self.first
        while True:
            bound = 2 * bound if self.most is None else min(2 * bound, self.most)
            piece = split(self.graph, self.segments, bound).pieces[index]
            interface = graph_meta(piece.graph).interface
            if (beyond := first_beyond(interface, shapes)) is None:
                break
            if bound == self.most:
                spec, axis, size = beyond
                raise InputError(
                    f"Input '{spec.name}' has size {size} in dimension {axis}, which depends on values, and "
                    f"max_sizes=({self.first}, {self.most}) allows no more."
                )
        ready = run(piece.graph, self.passes)
        network = lower(ready, nan=self.nan, passes=[])
        network.keep_graphs(*to_be_kept(piece.graph, ready))
        return self.build(network), network
