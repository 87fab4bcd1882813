"""What an engine in other types than the module's is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from torch2rt.debug.disturbance import Disturbed
from torch2rt.graph import graph_meta


class Retyped(torch.nn.Module):
    """A float32 module that takes and returns another floating-point type, as with `io_precision`.

    >>> Retyped(torch.nn.Linear(3, 5), torch.float16)(torch.ones(2, 3).half()).dtype
    torch.float16
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self.wide, (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: retyped(x, self.dtype), self.module(*args, **kwargs))

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype is self.dtype else x


class AsModule(torch.nn.Module):
    """A graph under its module's calling convention: of int8, an engine is right that computes what the graph does."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        interface = graph_meta(self.graph).interface
        tensors = interface.tensors(args, kwargs)
        return interface.wrap(Disturbed(self.graph, 0.0)(tensors), [tuple(x.shape) for x in tensors])


def distance(graph: torch.fx.GraphModule, traced: torch.fx.GraphModule, tensors: list[torch.Tensor]) -> list[str]:
    """A sentence for each output of a quantised graph: how far it is from the traced one's on a sample of that."""
    outputs, inputs = graph_meta(graph).interface.outputs, graph_meta(graph).interface.inputs
    own = [x.to(spec.dtype) for x, spec in zip(tensors, inputs, strict=True)]
    results = [Disturbed(graph, 0.0)(own), Disturbed(traced, 0.0)(tensors)]
    texts = []
    for name, ours, theirs in zip(outputs, *results, strict=True):
        if ours.is_floating_point() and theirs.numel():
            ours, theirs = ours.double(), theirs.double()
            difference = torch.where(ours == theirs, 0.0, ours - theirs)  # also of infinities
            scale = torch.where(theirs.isfinite(), theirs, 0.0).norm().clamp_min(1e-300)
            error = float(difference.norm() / scale)
            texts.append(f"{name} is quantised: on the example it is off by {error:.1e} of its norm")
    return texts


def retyped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor in another type; one of any other type as it is."""
    return x.to(dtype) if x.dtype is torch.float32 else x
