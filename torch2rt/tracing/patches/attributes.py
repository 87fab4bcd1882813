"""The real tensors and subgraphs that a traced graph refers to: weights, and what a trace has computed for real."""

from __future__ import annotations

from typing import Any

import torch


class Attributes:
    """What `get_attr` nodes of a graph stand for, by name; `owned` are the module's own parameters and buffers."""

    def __init__(self, graph: torch.fx.Graph, module: torch.nn.Module) -> None:
        self.graph = graph
        self.owned = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._names = {id(tensor): name for name, tensor in self.owned.items()}
        self.held: dict[str, torch.Tensor | torch.fx.GraphModule] = {}
        self._nodes: dict[int, torch.fx.Node] = {}
        self._kept: list[Any] = []

    def node(self, value: torch.Tensor | torch.fx.GraphModule) -> torch.fx.Node:
        """The node of a tensor or a subgraph, one for all uses."""
        if (node := self._nodes.get(id(value))) is None:
            name = self._names.get(id(value), f"_constant_{len(self.held)}")
            self.held[name] = value
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.get_attr(name)
            node.meta.update(val=value, module="", source="")
            self._nodes[id(value)] = node
        return node

    def keep(self, value: Any) -> None:
        """Hold something until the trace ends, so that neither its id nor its memory is given to another tensor."""
        self._kept.append(value)

    def before_write(self, tensor: torch.Tensor) -> str | None:
        """Save the value that the graph has recorded of a real tensor's memory, which is about to be written to.

        Returns the name of the parameter or buffer that the memory is, if it is one.
        """
        storage = tensor.untyped_storage()._cdata
        for name, held in self.held.items():
            if isinstance(held, torch.Tensor) and held.untyped_storage()._cdata == storage:
                self.held[name] = held.detach().clone()
                self._nodes.pop(id(held), None)
                self.keep(held)
        return next((n for n, owned in self.owned.items() if owned.untyped_storage()._cdata == storage), None)

    def module(self) -> torch.nn.Module:
        """A module that holds all of them under their dotted names."""
        root = torch.nn.Module()
        for name, value in self.held.items():
            *path, leaf = name.split(".")
            owner = root
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            if isinstance(value, torch.nn.Module):
                owner.add_module(leaf, value)
            elif isinstance(value, torch.nn.Parameter):
                owner.register_parameter(leaf, value)
            else:
                owner.register_buffer(leaf, value)
        return root
