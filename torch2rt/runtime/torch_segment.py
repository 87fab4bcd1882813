"""Run: the calls of a segment that stay torch calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.node import map_aggregate

from torch2rt.interface import Interface
from torch2rt.passes.copies import copy_graph


class TorchSegment(torch.nn.Module):
    """Calls of a traced graph as a function of tensors, on the device of its inputs.

    - `graph`: a `torch.fx.GraphModule` of tensors in and a tuple of tensors out. Its parameters and buffers become
      buffers of the segment that share the memory of the module's own ones.
    - `draws`: whether it draws random numbers.
    """

    def __init__(self, graph: torch.fx.GraphModule, device: torch.device, draws: bool = False) -> None:
        super().__init__()
        self.graph = _prepared(graph) if isinstance(graph, torch.fx.GraphModule) else graph
        self.device, self.draws = device, draws

    @property
    def interface(self) -> Interface | None:
        """Names, dtypes and ranges of what it takes and gives."""
        meta = self.graph.meta.get("torch2rt")
        return None if meta is None else meta.interface

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The tuple of results; a first call on another device moves the constants there."""
        device = next((t.device for t in tensors if t.is_cuda), tensors[0].device if tensors else self.device)
        if device.type != self.device.type or (device.type == "cuda" and device != self.device):
            self.move(device)
        return self.graph(*tensors)

    def move(self, device: torch.device) -> None:
        """Run on another device from now on: constants are copied there, and calls that name the old one name it."""
        old, self.device = self.device, device
        self.graph.to(device)
        if isinstance(self.graph, torch.fx.GraphModule):
            for node in self.graph.graph.nodes:
                node.args, node.kwargs = (
                    map_aggregate(a, lambda v: device if isinstance(v, torch.device) and v.type == old.type else v)
                    for a in (node.args, node.kwargs)
                )
            self.graph.recompile()

    def copy(self) -> TorchSegment:
        """A segment of its own with the same tensors, which can be on another device."""
        return TorchSegment(self.graph, self.device, self.draws)

    def constants(self) -> Iterator[torch.Tensor]:
        """The tensors that it keeps between calls."""
        yield from self.graph.parameters()
        yield from self.graph.buffers()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        where = fn(torch.empty(0, device=self.device)).device
        if where != self.device:
            self.move(where)
        return self


def _prepared(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a graph module to run by itself.

    It has buffers in the place of parameters, so that moving it leaves the module's own alone. What engines return is
    contiguous whatever the module's own values are, so that a view may have to be a copy.
    """
    graph = copy_graph(graph)
    for name, parameter in list(graph.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(path)
        delattr(owner, leaf)
        owner.register_buffer(leaf, parameter.detach())
    for node in graph.graph.nodes:
        if node.target in _VIEWS and not isinstance(node.args[1], torch.dtype) and "dtype" not in node.kwargs:
            node.target = _VIEWS[node.target]
    graph.recompile()
    return graph


_VIEWS: dict[Any, Any] = {
    torch.Tensor.view: torch.Tensor.reshape,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}
