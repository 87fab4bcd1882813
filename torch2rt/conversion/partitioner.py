"""The segments of a graph whose engines can be built, found by lowering and building them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from torch2rt.conversion import measuring
from torch2rt.conversion.earlier import Refused
from torch2rt.engine import engine_cache
from torch2rt.engine.engine import Engine
from torch2rt.errors import BuildError, ConversionError, Torch2RTError, UnsupportedError
from torch2rt.graph import graph_meta
from torch2rt.lowering import lower
from torch2rt.network import Network
from torch2rt.passes.copies import to_be_kept
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.effects import draws
from torch2rt.passes.partitioning.partition import partition
from torch2rt.passes.partitioning.split import MAX_SIZE, Piece, Program, split
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.torch_segment import TorchSegment
from torch2rt.sizes import is_symbolic


@dataclasses.dataclass
class Partitioner:
    """Finds segments of a graph whose engines can be built.

    `find` gives the file of the engine of a segment's graph after the passes: where it is kept, nothing is lowered or
    built. `files` are those of all, `late` lowers a segment whose engine was kept.
    """

    graph: torch.fx.GraphModule
    refused: Refused
    passes: Sequence[Pass]
    nan: str
    min_segment_calls: int
    max_size: int = MAX_SIZE
    find: Callable[[torch.fx.GraphModule], Path | None] = lambda graph: None

    def __post_init__(self) -> None:
        self.measured: dict[tuple[str, ...], measuring.Measured] = {}
        self.compiled: set[torch.fx.Node] = set()
        self.networks: dict[tuple[str, ...], Network] = {}
        self.engines: dict[tuple[str, ...], Engine] = {}
        self.files: dict[tuple[str, ...], Path | None] = {}
        self.late: dict[tuple[str, ...], Callable[[], list[Network]]] = {}

    def lowered(self) -> Program:
        """The segments, once each of TensorRT's can be lowered."""
        while True:
            segments = partition(self.graph, self.refused, self.min_segment_calls)
            program = split(self.graph, segments, self.max_size)
            found: Refused = {}
            for piece in program.pieces:
                if not piece.segment.is_torch:
                    found.update(self._lower(piece))
            if not found:
                return program
            self.refused.update(found)

    def _lower(self, piece: Piece) -> Refused:
        """Lower a piece, once; returns the calls that cannot be."""
        key, nodes = key_of(piece), piece.segment.nodes
        if key in self.networks or key in self.late:
            return {}
        if not piece.inputs:
            return dict.fromkeys(nodes, "it depends on no input")
        try:
            ready = run(piece.graph, self.passes)
            self.files[key] = file = self.find(ready)
            if (kept := engine_cache.read(file)) is not None:
                self.engines[key], self.late[key] = kept, functools.partial(self._lowered_late, piece, ready, file)
                return {}
            self.networks[key] = network_of_piece(piece, ready, self.nan)
        except UnsupportedError as error:
            named = {node: error.calls[node.name] for node in nodes if node.name in error.calls}
            return named or dict.fromkeys(nodes, str(error))
        except ConversionError as error:
            return dict.fromkeys(nodes, str(error))
        return {}

    def _lowered_late(self, piece: Piece, ready: torch.fx.GraphModule, file: Path | None) -> list[Network]:
        if self.find(ready) != file:
            raise Torch2RTError(f"The module is not as it was when it was converted. {engine_cache.AGAIN}")
        return [network_of_piece(piece, ready, self.nan)]

    def network(self, piece: Piece) -> Network:
        """What a piece is lowered to."""
        key = key_of(piece)
        if key not in self.networks:
            (self.networks[key],) = self.late[key]()
        return self.networks[key]

    def segment(self, piece: Piece) -> TRTModule:
        """The engine of a piece as a module."""
        key = key_of(piece)
        network = self.networks.get(key)
        model_trt = TRTModule(self.engines[key], network)
        if network is None:
            model_trt.lower_later(self.late[key])
        return model_trt

    def keep(self) -> None:
        """Keep the engines for later conversions."""
        for key, engine in self.engines.items():
            if key not in self.late:
                engine_cache.write(self.files.get(key), engine)

    def build(self, program: Program, build: Callable[[Network], Engine]) -> Program:
        """Build the engines; a segment that TensorRT cannot build becomes torch calls, whence the other program."""
        while True:
            for piece in program.pieces:
                if piece.segment.is_torch or (key := key_of(piece)) in self.engines:
                    continue
                try:
                    self.engines[key] = build(self.networks[key])
                except BuildError as error:
                    self.refused.update(dict.fromkeys(piece.segment.nodes, f"its segment could not be built: {error}"))
                    program = self.lowered()
                    break
            else:
                return program

    def without_slow(
        self, program: Program, build: Callable[[Network], Engine], device: Any, ways: Sequence[bool], graphs: bool
    ) -> Program:
        """The program in which torch makes the calls of engines that were measured to be slower.

        `ways`: with kernels of torch's compiler, without, or both are tried; `compiled` are the calls for which these
        were the fastest. `graphs`: as for `measuring.measured`.
        """
        while True:
            slow: Refused = {}
            for piece in program.pieces:
                if piece.segment.is_torch or (key := key_of(piece)) in self.measured:
                    continue
                tensors = measuring.examples(graph_meta(piece.graph).interface, device)
                made = {way: functools.partial(torch_segment, piece, device, way) for way in ways}
                self.measured[key] = found = measuring.measured(TRTModule(self.engines[key]), made, tensors, graphs)
                if found.is_faster_in_torch:
                    slow.update(dict.fromkeys(piece.segment.nodes, found.reason))
                    if found.compiled:
                        self.compiled.update(piece.segment.nodes)
            if not slow:
                return program
            self.refused.update(slow)
            program = self.build(self.lowered(), build)


def key_of(piece: Piece) -> tuple[str, ...]:
    """What tells one TensorRT segment of a graph from another."""
    segment = piece.segment
    return tuple(node.name for node in (*segment.nodes, *segment.outputs))


def network_of_piece(piece: Piece, ready: torch.fx.GraphModule, nan: str) -> Network:
    """The network of a TensorRT segment, whose graph after the passes is `ready`."""
    network = lower(ready, nan=nan, passes=[])
    network.keep_graphs(*to_be_kept(piece.graph, ready))
    return network


def torch_segment(piece: Piece, device: torch.device, compiles: bool = False) -> TorchSegment:
    """The calls of a piece as a module; torch's compiler is not asked for what draws or has sizes of values."""
    draws_numbers = any(map(draws, piece.segment.nodes))
    waits = any("unbacked" in node.meta for node in piece.segment.nodes)
    compiles = compiles and not (draws_numbers or waits or has_unbacked(piece))
    return TorchSegment(piece.graph, device, draws_numbers, compiles, waits)


def has_unbacked(piece: Piece) -> bool:
    """Whether sizes of what a piece takes depend on values."""
    inputs = [node.meta["val"] for node in piece.graph.graph.find_nodes(op="placeholder")]
    sizes = [size for value in inputs for size in value.shape if is_symbolic(size)]
    return any(free_unbacked_symbols(size) for size in sizes)
