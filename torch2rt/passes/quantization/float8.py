"""Casts to fp8 (E4M3) and back, as `fake_quantize_fp8`: torchao computes them for products of fp8."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from torch2rt.passes.precision_rules import CONVERSIONS, name_of
from torch2rt.passes.quantization.quantized import FP8, fake_quantize_fp8

_VIEWS = frozenset(
    "view reshape flatten unflatten unsqueeze squeeze transpose t T mT permute contiguous clone expand movedim".split()
)


def is_cast_to_fp8(node: Node) -> bool:
    """Whether a call casts floating-point numbers to E4M3."""
    if node.op != "call_function" or name_of(node.target) not in CONVERSIONS or not isinstance(node.args[0], Node):
        return False
    source, result = (n.meta.get("val") for n in (node.args[0], node))
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return result.dtype is torch.float8_e4m3fn and source.dtype in (torch.float32, torch.float16, torch.bfloat16)


def round_to_fp8(graph: torch.fx.GraphModule, cast: Node, bound: float | None) -> bool:
    """Replace a cast to fp8 of numbers up to a bound, where only views of it are read, and cast back.

    torch makes a NaN of a number beyond 448, and TensorRT 448, so that without a bound the cast stays.
    """
    if bound is None or bound > FP8:
        return False
    views, back, open = [], [], [cast]
    while open:
        node = open.pop()
        for user in node.users:
            value = user.meta.get("val")
            if not isinstance(value, torch.Tensor) or user.op != "call_function":
                return False
            if name_of(user.target) in CONVERSIONS and value.dtype.is_floating_point and value.dtype.itemsize > 1:
                back.append(user)
            elif name_of(user.target) in _VIEWS and value.dtype is torch.float8_e4m3fn:
                views.append(user)
                open.append(user)
            else:
                return False
    source = cast.args[0]
    assert isinstance(source, Node)
    dtype = source.meta["val"].dtype
    for view in views:
        with view.meta["val"].fake_mode:
            view.meta["val"] = view.meta["val"].to(dtype)
    for last in dict.fromkeys(back):
        value = last.args[0] if last.args[0] is not cast else source
        with graph.graph.inserting_before(last):
            call = graph.graph.call_function(fake_quantize_fp8, (value, 1.0))
        call.meta = {**last.meta, "val": value.meta["val"]}
        if last.meta["val"].dtype is dtype:
            last.replace_all_uses_with(call)
            graph.graph.erase_node(last)
        else:
            last.args = (call, *last.args[1:])
    cast.replace_all_uses_with(source)
    graph.graph.erase_node(cast)
    return True
