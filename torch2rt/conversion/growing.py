"""Engines of segments for larger sizes than they were first built for, where sizes depend on values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from torch2rt.conversion.partitioner import network_of_piece, torch_segment
from torch2rt.debug.verify import Verifying
from torch2rt.engine.engine import Engine
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.interface import Shape
from torch2rt.network import Network
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.partition import Segment
from torch2rt.passes.partitioning.split import Piece, split
from torch2rt.recipes.contents import Content, contents
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.growth import first_beyond
from torch2rt.sizes import evaluate, expression, is_symbolic


@dataclasses.dataclass(frozen=True)
class Larger:
    """Makes the engine of a segment of a graph for twice the sizes, or as many times twice as shapes need.

    - `first`: the sizes that all were built for; `most`: the largest that the user allows, `None` for any.
    - `verify`, `tf32`: as in `torch2rt.torch2rt`.

    The graph has the memory of the module's weights, which must be as they were when the other engines were built.
    """

    graph: torch.fx.GraphModule
    segments: Sequence[Segment]
    passes: Sequence[Pass]
    nan: str
    first: int
    most: int | None
    build: Callable[[Network], Engine]
    verify: bool | str = True
    tf32: bool | None = None
    weights: Mapping[str, Content] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _weights_of(self.graph))

    def __call__(self, index: int, tensors: Sequence[torch.Tensor]) -> TRTModule:
        """The engine for these tensors, compared with torch's calls on them as the first engines were.

        Raises `InputError` for sizes beyond what the user allows, `AccuracyError` where it computes something else, and
        what torch itself raises for these tensors.
        """
        if changed := [name for name, now in _weights_of(self.graph).items() if now != self.weights[name]]:
            raise InputError(
                f"Sizes that depend on values need another engine, and the module's {', '.join(changed[:5])} is not as "
                "it was when it was converted, with which the other engines were built: convert it again."
            )
        piece = self._piece(index, [tuple(tensor.shape) for tensor in tensors])
        network = network_of_piece(piece, run(piece.graph, self.passes), self.nan)
        model_trt = TRTModule(self.build(network), network)
        calls = torch_segment(piece, tensors[0].device)
        also = _ends(piece) if self.verify == "range" and all(tensor.numel() for tensor in tensors) else []
        try:
            verifying = Verifying(
                calls,
                piece.graph,
                network,
                tensors,
                bool(self.verify),
                tf32=self.tf32,
                build=self.build,
                passes=self.passes,
                also=also,
            )
            verifying.while_building()
            verifying.finish(model_trt)
        except InputError as error:
            raise error.__cause__ or error from None  # torch refuses these tensors
        if model_trt.report.verified is not None and self.verify == "range":
            model_trt.report.verified.mode = "range"
        return model_trt

    def _piece(self, index: int, shapes: Sequence[Shape]) -> Piece:
        bound = self.first
        while True:
            bound = 2 * bound if self.most is None else min(2 * bound, self.most)
            piece = split(self.graph, self.segments, bound).pieces[index]
            if (beyond := first_beyond(graph_meta(piece.graph).interface, shapes)) is None:
                return piece
            if bound == self.most:
                spec, axis, size = beyond
                raise InputError(
                    f"Input '{spec.name}' has size {size} in dimension {axis}, which depends on values, and "
                    f"max_sizes=({self.first}, {self.most}) allows no more."
                )


def _weights_of(graph: torch.fx.GraphModule) -> dict[str, Content]:
    """What tells the dense constants of a graph from others."""
    found = (*graph.named_parameters(), *graph.named_buffers())
    dense = {n: x for n, x in found if x.layout is torch.strided and not (x.is_quantized or x.is_meta)}
    return contents(dense)


def _ends(piece: Piece) -> list[list[Shape]]:
    """The smallest and the largest shapes of a segment's inputs, with sizes that fit each other."""
    values = [node.meta["val"] for node in piece.graph.graph.find_nodes(op="placeholder")]
    dims = graph_meta(piece.graph).symbols
    return [
        [tuple(evaluate(expression(n), sizes) if is_symbolic(n) else int(n) for n in x.shape) for x in values]
        for sizes in ({symbol: getattr(dim, end) for symbol, dim in dims.items()} for end in ("min", "max"))
    ]
