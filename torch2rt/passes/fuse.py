"""Fuse: calls of a traced graph that are one call with other constants, before it is lowered.

A fusion is registered beside the converter of the call that it does away with (`registry.fusion`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate

from torch2rt.callables import Target
from torch2rt.network import COMPUTED, Origin, origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.registry import Registry, load


@torch.inference_mode(False)
@torch.no_grad()  # autograd would keep what constants are computed from
def fuse(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that applies every registered fusion once, in the order of the calls.

    New constants are computed from the graph's own ones. They are on the CPU, where TensorRT wants them, so that a GPU
    need not hold them beside the module's own. To run the fused graph on a GPU, call `.cuda()` on it first.
    """
    registry = load()
    if not any(node.target in registry.fusions for node in graph.graph.nodes if node.op == "call_function"):
        return graph
    fuser = Fuser(graph, registry)
    fuser.run()
    return finish(fuser.module) if fuser.changed else graph


class UnknownForm(Exception):
    """A call has no converter, or arguments that its converter does not know."""


class Fuser:
    """A copy of a traced graph under change: what a fusion is given.

    `arguments(node)` are a call's by the names of its converter's parameters, `constant(value)` is the tensor that an
    argument stands for; `call`, `replace` and `substitute` change the graph.
    """

    def __init__(self, module: torch.fx.GraphModule, registry: Registry) -> None:
        self.module = copy_graph(module)
        self.registry = registry
        self.graph = self.module.graph
        self.changed = False
        self.erased: set[torch.fx.Node] = set()
        self.made: list[tuple[torch.Tensor, Origin]] = []  # constants that fusions have computed

    def run(self) -> None:
        """Apply every fusion once, in the order of the calls."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.erased:
                if (fusion := self.registry.fusions.get(node.target)) is not None:
                    with contextlib.suppress(UnknownForm):  # lowering will say so
                        fusion(self, node)

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
        return constant_of(self.module, value) if isinstance(value, torch.fx.Node) else None

    def note(self, made: torch.Tensor, argument: Any, change: str) -> None:
        """Remember which parameter a new constant was made of, the one that an argument stands for, and how."""
        is_constant = isinstance(argument, torch.fx.Node) and argument.op == "get_attr"
        self.made.append((made, (origin_of(argument) if is_constant else Origin()).then(change)))

    def call(
        self, before: torch.fx.Node, like: torch.fx.Node, shape: Sequence[Any], target: Target, *args: Any
    ) -> torch.fx.Node:
        """A new call in front of a node, of this shape, with the dtype, module and source of another call.

        A tensor among the arguments becomes a constant of the graph.
        """
        converter = self.registry.find(target)
        names = [p.name for p in converter.parameters] if converter is not None else []
        args = tuple(
            self._with_constants(value, f"{like.meta['module']}.{name}", before)
            for name, value in zip([*names, *["constant"] * len(args)], args, strict=False)
        )
        with self.graph.inserting_before(before):
            call = self.graph.call_function(target, args)
        recorded = like.meta["val"]
        with recorded.fake_mode:
            value = torch.empty(tuple(shape), dtype=recorded.dtype, device=recorded.device)
        call.meta = _described(like, value)
        self.changed = True
        return call

    def replace(self, node: torch.fx.Node, by: torch.fx.Node, **changes: Any) -> None:
        """Let the call `by`, with some of its arguments changed, take the place of `node`.

        A tensor among the arguments becomes a constant of the graph.
        """
        arguments = {
            name: self._with_constants(value, f"{by.meta['module']}.{name}", node)
            for name, value in {**self.arguments(by), **changes}.items()
        }
        with self.graph.inserting_before(node):
            call = self.graph.call_function(by.target, (), arguments)  # type: ignore[arg-type]
        call.meta = _described(by, node.meta["val"])
        self.substitute(node, call)

    def substitute(self, node: torch.fx.Node, other: torch.fx.Node) -> None:
        """Use another call's result for a call's, and let go of it and of what was only for it."""
        self.changed = True
        node.replace_all_uses_with(other)
        if "origin" in node.meta:
            other.meta.setdefault("origin", node.meta["origin"])
        unused = [node]
        while unused:
            old = unused.pop()
            if not old.users and old.op == "call_function" and old not in self.erased:
                unused += old.all_input_nodes
                self.graph.erase_node(old)
                self.erased.add(old)

    def _with_constants(self, argument: Any, name: str, before: torch.fx.Node) -> Any:
        """An argument with `get_attr` nodes in the place of tensors; `name` says which argument of which module."""

        def as_node(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            node = add_constant(self.module, f"{name}_fused".lstrip("."), item.cpu(), before)
            node.meta["made_of"] = next((origin for made, origin in self.made if made is item), COMPUTED)
            return node

        return map_aggregate(argument, as_node)


def _described(like: torch.fx.Node, value: Any) -> dict[str, Any]:
    """The metadata of a new call that another call is the reason for."""
    return {**{name: kept for name, kept in like.meta.items() if name != "origin"}, "val": value}
