"""Constants that repeat along dynamic dimensions: what is computed from them alone is computed now.

A position table that a module expands to the batch is a constant that repeats along it. Element-wise calls, slices,
comparisons, and reductions over other dimensions give such a constant again. It is kept once, with size 1 where it
repeats, and expanded where another value needs it, if that does not broadcast by itself. So the mask of a decoder does
not depend on whether its batch is dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import Node, map_aggregate

from torch2rt.network import COMPUTED
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.sizes import expression, is_symbolic

MOST = 1 << 26  # elements of a new constant
CASTS = frozenset("to type type_as float half bfloat16 double int long bool contiguous clone detach".split())
MOVES = frozenset("unsqueeze transpose permute mT t swapaxes swapdims movedim".split())
_ALONG = frozenset("any all sum mean amax amin prod cumsum cumprod softmax log_softmax flip".split())
FILLS = {"zeros": 0, "new_zeros": 0, "zeros_like": 0, "ones": 1, "new_ones": 1, "ones_like": 1}
_DUNDERS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "invert": "bitwise_not"}
_DUNDERS |= {name: f"bitwise_{name}" for name in ("and", "or", "xor")}


@torch.inference_mode(False)
@torch.no_grad()
def fold_repeated(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that computes what depends on constants and dynamic sizes alone, where it repeats along these sizes."""
    found = _repeated(graph)
    worth = _worth_it(found)
    if not worth:
        return graph
    copied = copy_graph(graph)
    copies = dict(zip(graph.graph.nodes, copied.graph.nodes, strict=True))
    once = {copies[node]: tensor for node, tensor in found.items()}
    graph = copied
    sizes = {expression(n.meta["val"]): n for n in graph.graph.nodes if is_symbolic(n.meta.get("val"))}
    for node in worth:
        _replace(graph, copies[node], once, sizes)
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.graph.erase_node(node)
    return finish(graph)


def _worth_it(found: dict[Node, torch.Tensor]) -> list[Node]:
    """Calls that compute something from dynamic sizes; lowering itself folds what has none."""
    of_sizes: set[Node] = set()
    for node in found:
        if any(map(is_symbolic, node.meta["val"].shape)) or of_sizes.intersection(node.all_input_nodes):
            of_sizes.add(node)
    return [node for node in found if node in of_sizes and not _is_repetition(node)]


def _is_repetition(node: Node) -> bool:
    """Whether a call only repeats a constant or a number."""
    return name_of(node) in FILLS or name_of(node) in ("expand", "expand_as") and _is_attribute(node.args[0])


def _is_attribute(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


def name_of(node: Node) -> str:
    """A call's name without the marks of its spelling: `triu` for `Tensor.triu_` and for `aten.triu.default`."""
    return getattr(node.target, "__name__", "").split(".")[0].strip("_")


def _shape_once(value: torch.Tensor) -> tuple[int, ...]:
    """The shape of a value, with size 1 along dynamic dimensions."""
    return tuple(1 if is_symbolic(size) else size for size in value.shape)


# What repeats ---------------------------------------------------------------------------------------------------------


def _repeated(graph: torch.fx.GraphModule) -> dict[Node, torch.Tensor]:
    """The values that repeat along all of their dynamic dimensions, with size 1 there."""
    once: dict[Node, torch.Tensor] = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            constant = constant_of(graph, node)
            if constant is not None and constant.layout is torch.strided:
                once[node] = constant.detach()
        elif node.op == "call_function" and isinstance(value, torch.Tensor):
            try:
                result = _call_once(node, value, once)
            except (RuntimeError, TypeError, IndexError, ValueError):  # a form that is not known here
                result = None
            if result is None or result.shape != _shape_once(value) or result.dtype != value.dtype:
                continue
            if result.numel() <= MOST:
                once[node] = result
    return once


def _call_once(node: Node, value: torch.Tensor, once: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The result of a call on values that repeat, with size 1 where it repeats; `None` if it is not known to."""
    name = name_of(node)
    if name in FILLS:
        return torch.full(_shape_once(value), FILLS[name], dtype=value.dtype, device=value.device)
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not operands or operands[0] not in once or operands[0] is not node.all_input_nodes[0]:
        return None
    first = operands[0].meta["val"]
    if name in ("expand", "expand_as", "broadcast_to"):
        return once[operands[0]].expand(_shape_once(value)).clone()
    if name in ("getitem", "index"):
        return _indexed(node, first, once)
    if len(operands) < len(node.all_input_nodes) or not all(operand in once for operand in operands):
        return None  # it computes with a size, or with an input
    is_known = name in CASTS or name in MOVES or is_pointwise(node, name)
    if name in _ALONG or name in ("slice", "cat", "concat", "tril", "triu"):
        is_known = _is_along_static(node, name, [operand.meta["val"] for operand in operands])
    if not is_known:
        return None
    args, kwargs = (map_aggregate(a, lambda x: once[x] if isinstance(x, Node) else x) for a in (node.args, node.kwargs))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result if isinstance(result, torch.Tensor) else None


def _is_along_static(node: Node, name: str, values: Sequence[torch.Tensor]) -> bool:
    """Whether the dimensions that a call works along are static."""
    if name in ("tril", "triu"):
        dims: Any = (-2, -1)
    elif name == "flip":
        dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    else:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0 if "cat" in name else None)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return False
    return not any(is_symbolic(value.shape[dim]) for value in values for dim in dims)


def is_pointwise(node: Node, name: str) -> bool:
    """Whether torch says that a call works element by element, and draws nothing."""
    if isinstance(node.target, torch._ops.OpOverload):
        overloads = [node.target]
    else:
        for spelling in (name, *([name[1:]] if name[:1] in "ri" else [])):
            packet = getattr(torch.ops.aten, _DUNDERS.get(spelling, spelling), None)
            if packet is not None:
                break
        else:
            return False
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
    is_random = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
    return not is_random and any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _indexed(node: Node, value: torch.Tensor, once: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """`x[...]` where x repeats: along a dynamic dimension, any index gives the same."""
    given: Any = node.args[1]
    items = list(given) if isinstance(given, (tuple, list)) else [given]
    if any(isinstance(item, Node) and item.meta["val"].dtype in (torch.bool, torch.uint8) for item in items):
        return None
    if Ellipsis in [item for item in items if not isinstance(item, Node)]:
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        taken = sum(item is not None for item in items) - 1
        items[place : place + 1] = [slice(None)] * (value.dim() - taken)
    if name_of(node) == "index":
        items = [slice(None) if item is None else item for item in items]
    axis = 0
    found: list[Any] = []
    for item in items:
        if item is None:
            found.append(None)
            continue
        repeats = is_symbolic(value.shape[axis])
        if isinstance(item, Node):
            if repeats:
                item = torch.zeros(_shape_once(item.meta["val"]), dtype=torch.int64, device=value.device)
            else:
                item = once.get(item)
        elif isinstance(item, slice):
            bounds = (item.start, item.stop, item.step)
            if any(isinstance(bound, Node) for bound in bounds) or repeats and bounds != (None, None, None):
                return None
        elif isinstance(item, int) and repeats:
            item = 0
        if item is None:
            return None
        found.append(item)
        axis += 1
    return once[node.args[0]][tuple(found)]  # type: ignore[index]


# The graph ------------------------------------------------------------------------------------------------------------


def _replace(graph: torch.fx.GraphModule, node: Node, once: dict[Node, torch.Tensor], sizes: dict[Any, Node]) -> None:
    """Put the constant in a node's place, for the calls that do not repeat themselves."""
    users = [user for user in node.users if user not in once]
    if not users:
        return
    value = node.meta["val"]
    dims = [sizes.get(expression(size)) if is_symbolic(size) else size for size in value.shape]
    plain = [user for user in users if _broadcasts(user, node)]
    if None in dims and len(plain) < len(users):
        return
    tensor = once[node].contiguous()
    constant = add_constant(graph, f"{node.name}_once", tensor, node)
    constant.meta.update(made_of=COMPUTED, source=node.meta["source"], module=node.meta["module"])
    expanded = constant
    if any(map(is_symbolic, value.shape)) and len(plain) < len(users):
        with graph.graph.inserting_before(node):
            expanded = graph.graph.call_function(torch.Tensor.expand, (constant, *dims))
        expanded.meta.update(node.meta)
    for user in users:
        user.replace_input_with(node, constant if user in plain else expanded)


def _broadcasts(user: Node, node: Node) -> bool:
    """Whether a call gives the same result for a value of which it is given one repetition."""
    value, result = node.meta["val"], user.meta.get("val")
    if not any(map(is_symbolic, value.shape)):
        return True
    if name_of(user) == "scaled_dot_product_attention":
        mask = user.kwargs.get("attn_mask", user.args[3] if len(user.args) > 3 else None)
        return mask is node and node not in user.args[:3] and value.dim() == user.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if user.op != "call_function" or not isinstance(result, torch.Tensor) or not is_pointwise(user, name_of(user)):
        return False
    others = [n.meta["val"] for n in user.all_input_nodes if n is not node and "val" in n.meta]
    return any(isinstance(other, torch.Tensor) and _is_same_shape(other, result) for other in others)


def _is_same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return list(map(expression, a.shape)) == list(map(expression, b.shape))
