"""The real tensors and subgraphs that a traced graph refers to: weights, and what a trace has computed for real."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.tracing.memory.tensors import memory_of, tensors_in


class Constants:
    """What `get_attr` nodes of a graph stand for, by name; `owned` are the module's own parameters and buffers."""

    def __init__(self, graph: torch.fx.Graph, module: torch.nn.Module) -> None:
        self.graph = graph
        self.owned = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = [(f"{path}.{key}".lstrip("."), x) for path, m in module.named_modules() for key, x in vars(m).items()]
        self._attributes = {name: x for name, x in tensors if isinstance(x, torch.Tensor)}
        self._names = {id(tensor): name for name, tensor in self.owned.items()}
        self.held: dict[str, torch.Tensor | torch.fx.GraphModule] = {}
        self._nodes: dict[int, torch.fx.Node] = {}
        self._kept: list[Any] = []
        self._forbidden: dict[int, tuple[torch.Tensor, str]] = {}  # by memory, with the reason

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

    def owned_name(self, tensor: torch.Tensor) -> str | None:
        """The name of the module's parameter or buffer that has a tensor's memory, if there is one."""
        memory = memory_of(tensor)
        return next((name for name, owned in self.owned.items() if memory_of(owned) == memory), None)

    def kept_name(self, tensor: torch.Tensor) -> str | None:
        """The name of a tensor that the module keeps between calls, as a buffer or as an attribute, by its memory."""
        memory = memory_of(tensor)
        kept = next((name for name, x in self._attributes.items() if memory_of(x) == memory), None)
        return self.owned_name(tensor) or kept

    def save_before_write(self, tensor: torch.Tensor) -> None:
        """Save the value that the graph has recorded of a real tensor's memory, which is about to be written to."""
        memory = memory_of(tensor)
        for name, held in self.held.items():
            if isinstance(held, torch.Tensor) and memory_of(held) == memory:
                self.held[name] = held.detach().clone()
                self._nodes.pop(id(held), None)
                self.keep(held)

    def forbid(self, value: Any, reason: str) -> None:
        """Keep these tensors, and all that share their memory, out of the graph; `reason` is an error's message."""
        self._forbidden.update((memory_of(tensor), (tensor, reason)) for tensor in tensors_in(value))

    def why_forbidden(self, value: Any) -> str:
        """The reason against the first forbidden tensor in a value; `""` if there is none."""
        if not self._forbidden:
            return ""
        tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
        return next((self._forbidden[key][1] for key in map(memory_of, tensors) if key in self._forbidden), "")

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
