"""What a pass needs to change a graph: a copy of it, new constants, and the end of the work."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Node


def copy_graph(
    graph: torch.fx.GraphModule, constant: Callable[[Any], Any] = lambda value: value
) -> torch.fx.GraphModule:
    """A graph module with nodes of its own, which have the names and the metadata of the given graph's nodes.

    The constants are the same tensors, or what `constant` makes of them: a pass replaces them, and never writes to
    them. The copy can be run after `finish`, which compiles its code.
    """
    copy = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph(), type(graph).__name__)
    copy.meta = dict(graph.meta)
    copies: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            assign(copy, str(node.target), constant(_attribute(graph, node)))
        copies[node] = copy.graph.node_copy(node, copies.__getitem__)
    return copy


def to_be_kept(*graphs: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """Graphs as they are, with constants on the CPU in the place of a GPU's, so that they keep no memory of the GPU."""
    moved: dict[int, tuple[Any, Any]] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_cuda:
            return value
        return moved.setdefault(id(value), (value, value.detach().cpu()))[1]

    def is_on_gpu(graph: torch.fx.GraphModule) -> bool:
        return any(x.is_cuda for x in (*graph.parameters(), *graph.buffers()))

    forget(*graphs)
    return [finish(copy_graph(graph, move)) if is_on_gpu(graph) else graph for graph in graphs]


def forget(*graphs: torch.fx.GraphModule) -> None:
    """Let go of what torch remembers of the traces of graphs.

    That is weak references to the module's tensors, with which `torch.utils.swap_tensors` refuses a tensor, results of
    calls on shapes, and answers about sizes, which keep those of every trace for the life of the process.
    """
    for graph in graphs:
        values = (node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder"))
        for mode in {value.fake_mode for value in values if isinstance(value, FakeTensor)}:
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()
            getattr(mode.shape_env, "fake_tensor_cache", {}).clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def add_constant(graph: torch.fx.GraphModule, name: str, value: torch.Tensor, before: Node) -> Node:
    """A new `get_attr` node in front of a node, for a tensor that becomes a buffer of the graph module.

    Its name follows from the given one: with `_` for characters that no identifier has, and a number if it is taken.
    """
    name = stem = re.sub(r"^(?=\d)|\W", "_", name)
    count = 0
    while hasattr(graph, name):
        count += 1
        name = f"{stem}_{count}"
    graph.register_buffer(name, value.detach())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    node.meta.update(val=value, module="", source="")
    return node


def constant_of(graph: torch.fx.GraphModule, node: Node) -> torch.Tensor | None:
    """The tensor that a node stands for; `None` if it is computed, an input or a subgraph."""
    value = _attribute(graph, node) if node.op == "get_attr" else None
    return value if isinstance(value, torch.Tensor) else None


def finish(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph module after a change: constants that no call uses any more are gone, and its code is up to date."""
    for node in graph.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.graph.erase_node(node)
    used = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in tensors if name not in used]:
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
    graph.recompile()
    return graph


def assign(graph: torch.fx.GraphModule, name: str, value: Any) -> None:
    """Give a graph module a parameter, a buffer or a subgraph under a dotted name."""
    *path, leaf = name.split(".")
    owner: torch.nn.Module = graph
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)


def _attribute(graph: torch.fx.GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(graph)
