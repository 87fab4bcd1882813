"""A key for networks that differ in nothing but their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch2rt.graph_key import Unkeyable, graph_key
from torch2rt.network import Network
from torch2rt.recipes.tape import Tape


def structure_key(graph: torch.fx.GraphModule, tape: Tape, network: Network) -> str | None:
    """What a network follows from beside its weights: its graph, and what was read of values while it was made.

    Lowering is a function of the graph, and of values only where it reads them. `None` for graphs without a key.
    """
    assert network.recipes is not None
    reads = [(read.what, str(read.value)) for read in network.recipes.reads]

    try:
        return graph_key(graph, of_module(tape), reads, network.nan, str(network.interface.to_json()))
    except Unkeyable:
        return None


def of_module(tape: Tape) -> Callable[[torch.Tensor], str | None]:
    """What a key has of constants: their contents, unless they are made of the module's tensors."""
    return lambda tensor: "of the module" if tape.is_of_module(tensor) else None
