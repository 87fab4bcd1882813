"""float64 in the middle of a module, which TensorRT does not have: computed in float32 where nobody can ask for more.

A float64 value that reaches the outputs only through casts to float32 or less, as a rotary table does, is worth no more
than float32 in the end. A comparison, an index or an integer that is made of it may come out another one, so that is
refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.node import Node, map_aggregate

from torch2rt.callables import qualified_name
from torch2rt.graph import graph_meta, place_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.value_numbers import value_sources
from torch2rt.registry import load
from torch2rt.sizes import is_symbolic

NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_NARROW_CALLS: dict[Any, Any] = {torch.Tensor.double: torch.Tensor.float}  # so that the graph runs as it says
_FLOAT32 = torch.finfo(torch.float32)


@torch.inference_mode(False)
@torch.no_grad()
def narrow_float64(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that lets a graph compute in float32 (and complex64) what it computes in float64.

    It changes dtypes and constants. The graph's metadata gets an assumption for each line of the user's where that is
    so, and a refusal for each call that stands against it.
    """
    if not any(map(_is_wide_call, graph.graph.nodes)):
        return graph
    graph = copy_graph(graph)
    wide = [node for node in graph.graph.nodes if _is_wide_call(node)]
    reasons = [f"{place_of(node)}\n    {reason}" for node in wide for reason in _reasons(graph, node)]
    places = dict.fromkeys(place_of(node).strip() for node in wide)
    narrowed: dict[Node, Node] = {}
    for node in wide:
        node.target = _NARROW_CALLS.get(node.target, node.target)
        node.args, node.kwargs = (_narrowed(graph, a, node, narrowed) for a in (node.args, node.kwargs))
    for node in wide:
        node.meta["val"] = map_aggregate(node.meta["val"], _cast)
    meta = graph_meta(graph)
    graph.meta["torch2rt"] = dataclasses.replace(
        meta,
        assumptions=(*meta.assumptions, *(f"{place}: float64 is computed in float32" for place in places)),
        refusals=(*meta.refusals, *reasons),
    )
    return finish(graph)


def as_recorded(value: Any, recorded: Any) -> Any:
    """A constant result in the recorded dtype where that was narrowed."""
    if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) and _is_wide(v) for v in value):
        return [as_recorded(ours, theirs) for ours, theirs in zip(value, recorded, strict=True)]
    return value.to(recorded.dtype) if isinstance(value, torch.Tensor) and _is_wide(value) else value


def _reasons(graph: torch.fx.GraphModule, node: Node) -> Iterator[str]:
    """Why a value must stay float64."""
    name = qualified_name(node.target)  # type: ignore[arg-type]
    for number in _numbers(graph, node):
        yield f"{name}: TensorRT has no float64, and {number} is no number of float32."
    for user in node.users:
        if user.op == "output":
            yield f"{name}: an output is float64, which TensorRT does not have. Return x.float()."
        elif any(isinstance(n.meta.get("val"), torch.fx.GraphModule) for n in user.all_input_nodes):
            yield f"{name}: a branch or a loop takes a float64 value, which TensorRT does not have. Pass x.float()."
        elif _decides(user, node):
            yield (
                f"{qualified_name(user.target)}: it makes {_dtypes(user)} of a float64 value, which may be other ones "  # type: ignore[arg-type]
                "in float32, and TensorRT has no float64. Compare x.float()."
            )


def _decides(user: Node, node: Node) -> bool:
    """Whether a call makes of a value what is no floating point number."""
    value = user.meta.get("val")
    if isinstance(value, torch.Tensor):
        discrete = not (value.is_floating_point() or value.is_complex())
        return discrete and bool(user.users) and node in value_sources(user, load())
    return False


def _numbers(graph: torch.fx.GraphModule, node: Node) -> list[str]:
    """A call's numbers that float32 has not: too large, or so small that they would be 0."""
    found: list[str] = []

    def look(item: Any) -> Any:
        if isinstance(item, float) and math.isfinite(item) and item and not is_symbolic(item):
            if not _FLOAT32.smallest_normal / 2**23 <= abs(item) <= _FLOAT32.max:
                found.append(repr(item))
        elif isinstance(item, Node) and (constant := constant_of(graph, item)) is not None and _is_wide(constant):
            if bool((constant.isfinite() & ~_cast(constant).isfinite()).any()):
                found.append("a constant beyond 3.4e38")
        return item

    map_aggregate((node.args, node.kwargs), look)
    return found


def _narrowed(graph: torch.fx.GraphModule, argument: Any, call: Node, narrowed: dict[Node, Node]) -> Any:
    """A call's argument with float32 in the place of float64; `narrowed` holds the constants that were cast."""

    def narrow(item: Any) -> Any:
        if isinstance(item, Node) and (constant := constant_of(graph, item)) is not None and _is_wide(constant):
            if item not in narrowed:
                name = f"{item.target}_{str(NARROW[constant.dtype]).removeprefix('torch.')}"
                narrowed[item] = add_constant(graph, name, _cast(constant.detach()), call)
            return narrowed[item]
        if item in ("torch.DoubleTensor", "torch.cuda.DoubleTensor"):
            return item.replace("Double", "Float")
        return NARROW.get(item, item) if isinstance(item, torch.dtype) else item

    return map_aggregate(argument, narrow)


def _cast(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not _is_wide(value):
        return value
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value.to(NARROW[value.dtype])
    with mode:
        return torch.empty(value.shape, dtype=NARROW[value.dtype], device=value.device)


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]


def _is_wide_call(node: Node) -> bool:
    return node.op == "call_function" and any(map(_is_wide, _tensors(node)))


def _is_wide(tensor: torch.Tensor) -> bool:
    return tensor.dtype in NARROW


def _dtypes(node: Node) -> str:
    return ", ".join(str(t.dtype).removeprefix("torch.") for t in _tensors(node))
