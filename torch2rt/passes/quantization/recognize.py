"""Find quantisation that others have written into a module, and say it as `fake_quantize` and `dequantize`.

Quantisers such as nvidia-modelopt's compute `clamp(round(x * scale)) / scale`, and fold what is done to a weight, whose
numbers are then whole multiples of a scale for each output. TensorRT computes a product in int8 where it sees both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch.fx.node import Node

from torch2rt.backend.quirks import builds_fp8_convolutions, builds_int8_convolutions
from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.precision_rules import CONVERSIONS, name_of
from torch2rt.passes.quantization.float8 import is_cast_to_fp8, round_to_fp8
from torch2rt.passes.quantization.formats import CONVOLUTIONS
from torch2rt.passes.quantization.outputs import scale_outputs
from torch2rt.passes.quantization.quantized import FP8, dequantize, fake_quantize, fake_quantize_fp8
from torch2rt.registry import load

_AWAY = 1e-4  # of a step, by which the multiples of a scale may be off


def _spellings(*names: str) -> frozenset[object]:
    owners = (torch, torch.Tensor, torch.ops.aten)
    found = {getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)}
    return frozenset(found | {getattr(operator, name) for name in names if hasattr(operator, name)})


_TIMES, _OVER = _spellings("mul", "multiply", "__mul__", "__rmul__"), _spellings("div", "true_divide", "__truediv__")
PRODUCTS = CONVOLUTIONS | {"linear"}
_ROUND, _BETWEEN = _spellings("round"), _spellings("clamp", "clip")


@torch.inference_mode(False)
@torch.no_grad()
def recognize_int8(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The pass that finds written-out quantisation to int8 without a zero point, and weights that are quantised.

    Weights are looked at in products of quantised values: as int8, or as fp8 where the values are that.
    """
    kinds = (fake_quantize, fake_quantize_fp8)
    if not any(_is(node, _ROUND) or node.target in kinds or is_cast_to_fp8(node) for node in graph.graph.nodes):
        return graph
    copy = copy_graph(graph)
    casts = [node for node in copy.graph.nodes if is_cast_to_fp8(node)]
    changed = [round_to_fp8(copy, node, _bound(copy, node.args[0])) for node in casts]
    changed += [_rounding(copy, node) for node in list(copy.graph.nodes) if _is(node, _TIMES | _OVER)]
    changed += [_weight(copy, node) for node in list(copy.graph.nodes) if node.op == "call_function"]
    if not any(changed):
        return graph
    scale_outputs(copy)
    return finish(copy)


def _is(node: object, targets: Iterable[object]) -> TypeGuard[Node]:
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return getattr(node.target, "overloadpacket", node.target) in targets


def _rounding(graph: torch.fx.GraphModule, last: Node) -> bool:
    """Replace `clamp(round(x * scale), low, high) / scale`, which ends in a call, if it is that."""
    bounded, inverse = _operands(graph, last)
    between = []  # to int8, and back
    while bounded is not None and name_of(bounded.target) in CONVERSIONS and isinstance(bounded.args[0], Node):
        between.append(bounded)
        bounded = bounded.args[0]
    if bounded is None or not _is(bounded, _BETWEEN) or inverse is None:
        return False
    rounded, low, high = _bounds(graph, bounded)
    if low is None or high is None or not _is(rounded, _ROUND) or len(rounded.args) + len(rounded.kwargs) > 1:
        return False
    x, factor = _operands(graph, rounded.args[0]) if _is(rounded.args[0], _TIMES | _OVER) else (None, None)
    if x is None or factor is None or inverse <= 0 or not (low == int(low) >= -128 and high == int(high) <= 127):
        return False
    value, result = x.meta["val"], last.meta["val"]
    if any(node.meta["val"].dtype in (torch.uint8, torch.bool) for node in between):
        return False
    if abs(factor * inverse - 1) > 1e-6 or not low < 0 < high or value.dtype is not result.dtype:
        return False
    steps = [*between, bounded, rounded, rounded.args[0]]
    if not value.dtype.is_floating_point or any(len(n.users) > 1 for n in steps):
        return False
    bounds = () if (low, high) == (-128, 127) else (int(low), int(high))
    with graph.graph.inserting_before(last):
        call = graph.graph.call_function(fake_quantize, (x, inverse, *bounds))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for old in (last, *steps):
        graph.graph.erase_node(old)
    return True


def _bounds(graph: torch.fx.GraphModule, call: Node) -> tuple[object, float | None, float | None]:
    """What a call bounds, and the numbers that it is between."""
    given = {**dict(zip(("input", "min", "max"), call.args, strict=False)), **call.kwargs}
    low, high = (_number(graph, given.get(name)) for name in ("min", "max"))
    return given.get("input", given.get("self")), low, high


def _bound(graph: torch.fx.GraphModule, node: object) -> float | None:
    """The largest number that a call leaves of others, if that is what it does."""
    if not _is(node, _BETWEEN):
        return None
    _, low, high = _bounds(graph, node)
    return None if low is None or high is None else max(abs(low), abs(high))


def _operands(graph: torch.fx.GraphModule, node: Node) -> tuple[Node | None, float | None]:
    """What a call multiplies by a number, and the number; of a division, one over it."""
    if len(node.args) != 2 or node.kwargs:
        return None, None
    first, second = node.args
    if _is(node, _TIMES) and _number(graph, first) is not None:
        first, second = second, first
    number = _number(graph, second)
    if number is None or not number or not isinstance(first, Node) or first.op == "get_attr":
        return None, None
    return first, 1 / number if _is(node, _OVER) else number


def _number(graph: torch.fx.GraphModule, value: object) -> float | None:
    """A number, or a constant with one element."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    constant = constant_of(graph, value) if isinstance(value, Node) else None
    return float(constant) if constant is not None and constant.numel() == 1 else None


def _weight(graph: torch.fx.GraphModule, product: Node) -> bool:
    """Say a weight as int8, of a product of a quantised value, if it has such numbers."""
    name = name_of(product.target)
    if name not in PRODUCTS:
        return False
    converter = load().find(product.target)  # type: ignore[arg-type]
    assert converter is not None  # of torch's own functions
    args, kwargs = converter.bind(product.args, dict(product.kwargs), product.target)  # type: ignore[arg-type]
    given = {**dict(zip((p.name for p in converter.parameters), args, strict=False)), **kwargs}
    x, node = given["input"], given["weight"]
    constant = constant_of(graph, node) if isinstance(node, Node) else None
    if not isinstance(x, Node) or x.target not in (fake_quantize, fake_quantize_fp8):
        return False
    if constant is None or constant.dim() < 2 or not constant.dtype.is_floating_point:
        return False
    if x.target is fake_quantize and name in CONVOLUTIONS and not builds_int8_convolutions():
        return False
    if x.target is fake_quantize_fp8 and name in CONVOLUTIONS and not builds_fp8_convolutions():
        return False
    if (found := on_grid(constant) if x.target is fake_quantize else on_fp8_grid(constant)) is None:
        return False
    values, scale = found
    parts = []
    kind = "int8" if x.target is fake_quantize else "fp8"
    for tensor, change in ((values, f"quantised to {kind}"), (scale, "its scale")):
        parts.append(add_constant(graph, f"{node.target}_{change.split()[-1]}", tensor.cpu(), product))
        parts[-1].meta["made_of"] = origin_of(node).then(change)
    with graph.graph.inserting_before(product):
        call = graph.graph.call_function(dequantize, (*parts, 0, constant.dtype))
    call.meta = {name: product.meta[name] for name in ("module", "source")}
    with product.meta["val"].fake_mode:
        call.meta["val"] = torch.empty(constant.shape, dtype=constant.dtype, device=product.meta["val"].device)
    product.replace_input_with(node, call)
    return True


def on_grid(weight: torch.Tensor, least: int = 128) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A weight as int8 and a scale for each index of its first dimension, where that says it exactly; else `None`.

    The integers are from `-least` to `least - 1`. A number may be off by its own rounding.

    >>> values, scale = on_grid(torch.tensor([[0.5, -1.0, 63.5], [0.25, 0.5, 31.75]]))
    >>> values.tolist(), scale.tolist()
    ([[1, -2, 127], [1, 2, 127]], [0.5, 0.25])
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1)
    if not rows.isfinite().all():
        return None
    scale = torch.where(largest > 0, torch.zeros_like(largest), 1.0)
    rounding = 0.0 if weight.dtype is torch.float32 else torch.finfo(weight.dtype).eps
    for steps in range(least - 1, 0, -1):
        missing = (scale == 0).nonzero()[:, 0]
        if not len(missing):
            break
        for most in (steps, steps + 1) if steps == least - 1 else (steps,):  # the smallest integer may be the largest
            tried = largest[missing] / most
            whole = rows[missing] / tried[:, None]
            is_near = (whole - whole.round()).abs() <= _AWAY + rounding * whole.abs()
            fits = (is_near & (whole < least - 0.5)).all(1) & (scale[missing] == 0)
            scale[missing[fits]] = tried[fits]
    if (scale == 0).any():
        return None
    values = (rows / scale[:, None]).round().clamp(-least, least - 1).to(torch.int8).reshape(weight.shape)
    return values, scale


def on_fp8_grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A weight as fp8 (E4M3) and a scale for each index of its first dimension, where that says it; else `None`.

    The largest number of the weight, or else of each row, is then the largest of fp8.

    >>> values, scale = on_fp8_grid(torch.tensor([[0.5, -1.0, 224.0], [0.25, 0.4375, 13.0]]))
    >>> values.float().tolist(), scale.tolist()
    ([[1.0, -2.0, 448.0], [0.5, 0.875, 26.0]], [0.5, 0.5])
    """
    rows = weight.detach().float().flatten(1)
    if not rows.isfinite().all() or not rows.any():
        return None
    for largest in (rows.abs().amax().expand(len(rows)), rows.abs().amax(1)):
        scale = torch.where(largest > 0, largest / FP8, 1.0)
        steps = (rows / scale[:, None]).clamp(-FP8, FP8)
        values = steps.to(torch.float8_e4m3fn)
        tolerance = 1e-4 if weight.dtype is torch.float32 else 2 * torch.finfo(weight.dtype).eps
        if ((values.float() - steps).abs() <= tolerance * steps.abs().clamp_min(2.0**-6)).all():
            return values.reshape(weight.shape), scale.contiguous()
    return None
