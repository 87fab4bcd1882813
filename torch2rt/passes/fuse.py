"""Fuse: calls of a traced graph that are one call with other constants, before it is lowered.

A fusion is registered beside the converter of the call that it does away with (`registry.fusion`), and works on a copy:
the user's graph stays as it was traced.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate

from torch2rt.registry import Registry, Target


class UnknownForm(Exception):
    """A call has no converter, or arguments that its converter does not know."""


class Fuser:
    """A copy of a traced graph under change: what a fusion is given.

    `arguments(node)` are a call's by the names of its converter's parameters, `constant(value)` is the tensor that an
    argument stands for; `call`, `replace` and `substitute` change the graph.
    """

    def __init__(self, module: torch.fx.GraphModule, registry: Registry) -> None:
        self.module = module
        self.registry = registry
        self.graph = torch.fx.Graph()
        self.erased: set[torch.fx.Node] = set()
        self.made: list[tuple[torch.Tensor, str | None, str]] = []  # constants: of which parameter, and how
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in module.graph.nodes:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
        self.origins = {copy: node.name for node, copy in copies.items()}  # which node's value each one has

    def run(self) -> torch.fx.Graph:
        """Apply every fusion once, in the order of the calls."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.erased:
                if (fusion := self.registry.fusions.get(node.target)) is not None:
                    with contextlib.suppress(UnknownForm):  # lowering will say so
                        fusion(self, node)
        return self.graph

    def arguments(self, node: torch.fx.Node) -> dict[str, Any]:
        """A call's arguments, defaults included, by the names of its converter's parameters."""
        converter = self.registry.find(node.target)  # type: ignore[arg-type]
        if converter is None:
            raise UnknownForm
        args, kwargs = converter.bind(node.args, dict(node.kwargs), node.target)  # type: ignore[arg-type]
        try:
            bound = inspect.Signature(converter.parameters).bind(*args, **kwargs)
        except TypeError as error:
            raise UnknownForm from error
        bound.apply_defaults()
        return bound.arguments

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor that an argument stands for; `None` if it is computed or no tensor."""
        if isinstance(value, torch.fx.Node) and value.op == "get_attr":
            value = operator.attrgetter(str(value.target))(self.module)
        return value if isinstance(value, torch.Tensor) else None

    def note(self, made: torch.Tensor, argument: Any, change: str) -> None:
        """Remember which parameter a new constant was made of, the one that an argument stands for, and how."""
        name = str(argument.target) if isinstance(argument, torch.fx.Node) and argument.op == "get_attr" else None
        self.made.append((made, name, change))

    def _on_cpu(self, argument: Any) -> Any:
        """A constant, where TensorRT wants it, so that the GPU need not hold it beside the module's own."""
        if not isinstance(argument, torch.Tensor):
            return argument
        here = argument.cpu()
        self.made = [(here if made is argument else made, name, change) for made, name, change in self.made]
        return here

    def call(
        self, before: torch.fx.Node, like: torch.fx.Node, shape: Sequence[Any], target: Target, *args: Any
    ) -> torch.fx.Node:  # fmt: skip
        """A new call in front of a node, of this shape, with the dtype, module and source of another call."""
        with self.graph.inserting_before(before):
            call = self.graph.call_function(target, map_aggregate(args, self._on_cpu))
        recorded = like.meta["val"]
        with recorded.fake_mode:
            value = torch.empty(tuple(shape), dtype=recorded.dtype, device=recorded.device)
        call.meta = {**like.meta, "val": value}
        return call

    def replace(self, node: torch.fx.Node, by: torch.fx.Node, **changes: Any) -> None:
        """Let the call `by`, with some of its arguments changed, take the place of `node`; a tensor is a constant."""
        with self.graph.inserting_before(node):
            arguments = map_aggregate({**self.arguments(by), **changes}, self._on_cpu)
            call = self.graph.call_function(by.target, (), arguments)  # type: ignore[arg-type]
        call.meta = {**by.meta, "val": node.meta["val"]}
        self.substitute(node, call)

    def substitute(self, node: torch.fx.Node, other: torch.fx.Node) -> None:
        """Use another call's result for a call's, and let go of it and of what was only for it."""
        node.replace_all_uses_with(other)
        if node in self.origins:
            self.origins.setdefault(other, self.origins[node])
        unused = [node]
        while unused:
            old = unused.pop()
            if not old.users and old.op == "call_function" and old not in self.erased:
                unused += old.all_input_nodes
                self.graph.erase_node(old)
                self.erased.add(old)


