"""Quantise the inputs and the weights of convolutions and products of matrices, where TensorRT computes them so.

An input is quantised and brought back by `fake_quantize` or `fake_quantize_fp8`, a weight is int8, fp8 or int4 and
brought back by `dequantize`. Nothing comes between a product and its bias, its folded normalization or its activation,
which TensorRT computes along with it. The other operand of a residual addition is quantised too: it is then read as
int8.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch.fx.node import Node

from torch2rt.backend.quirks import crashes_on_equal_weights, crashes_on_shared_weights
from torch2rt.callables import qualified_name
from torch2rt.graph import graph_meta, place_of
from torch2rt.network import origin_of
from torch2rt.passes.copies import add_constant, constant_of, copy_graph, finish
from torch2rt.passes.quantization.attention import attentions, obstacle, operands, rounding
from torch2rt.passes.quantization.formats import FORMATS, Format
from torch2rt.passes.quantization.outputs import scale_outputs
from torch2rt.passes.quantization.products import Quantizable, arguments, quantizable, skips
from torch2rt.passes.quantization.quantized import (
    attention_of_quantized,
    dequantize,
    fake_quantize,
    fake_quantize_fp8,
    quantized,
)


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    graph: torch.fx.GraphModule,
    ranges: Mapping[str, float],
    keep: Mapping[Node, str] | None = None,
    format: Format = FORMATS["int8"],
    means: Mapping[str, torch.Tensor] | None = None,
    attention: bool = False,
) -> torch.fx.GraphModule:
    """A graph with quantised products of values up to `ranges`, by the names of `observed` nodes; larger ones saturate.

    - `keep`: calls that stay in floating point, with the reason. What cannot be quantised is named in the report.
    - `means`: of a product's inputs by their names, the mean of each channel. Where they are given, biases are
      corrected by what the rounding of weights changes in the mean.
    - `attention`: whether the products of attentions are quantised too; `ranges` may have their largest probabilities,
      as `name:probabilities`.
    """
    kept, copy = {node.name: why for node, why in (keep or {}).items()}, copy_graph(graph)
    quantizer = _Quantizer(copy, ranges, format, means or {})
    done: set[Node] = set()
    reasons: list[str] = []
    products = quantizable(copy)

    def noted(node: Node, why: str | None) -> None:
        if why is None:
            node.meta["precision"] = format.name
            return
        node.meta["not_quantized"] = why
        if node.name not in kept:
            place, call = place_of(node).strip(), qualified_name(node.target)  # type: ignore[arg-type]
            reasons.append(f"{place}: is not quantised: {call}, {why}")

    for product in products:
        why = kept.get(product.node.name) or quantizer.obstacle(product)
        if why is None:
            quantizer.quantize(product)
            done.add(product.node)
        noted(product.node, why)
    if not products:
        reasons.append(f"nothing is quantised to {format.name}: no convolution or product has a constant weight")
    for addition, skip in skips(copy, done).items():
        if format.is_whole and addition.name not in kept and quantizer.usable(skip) is None:
            addition.replace_input_with(skip, quantizer.activation(skip))
    for node in attentions(copy):
        why = kept.get(node.name) or (obstacle(node, format) if attention else "quantize_attention is not asked for")
        why = why or next((why for x in operands(node) if (why := quantizer.usable(x)) is not None), None)
        if attention:
            noted(node, why)
        elif format.is_whole:
            node.meta["not_quantized"] = why
        if why is None:
            quantizer.attend(node)
    scale_outputs(copy)
    meta = graph_meta(copy)
    copy.meta["torch2rt"] = dataclasses.replace(meta, assumptions=(*meta.assumptions, *dict.fromkeys(reasons)))
    return finish(copy)


class _Quantizer:
    """A copy of a graph under change; each value and each weight is quantised once."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        ranges: Mapping[str, float],
        format: Format,
        means: Mapping[str, torch.Tensor],
    ) -> None:
        self.module, self.ranges, self.format, self.means = module, dict(ranges), format, means
        self.activations: dict[Node, Node] = {}
        self.weights: dict[tuple[Node, int, Node | None], Node] = {}
        self.constants: dict[tuple[Node, int], tuple[Node, Node]] = {}
        weights = [constant_of(module, product.weight) for product in quantizable(module)]
        self.uses = collections.Counter(weight.data_ptr() for weight in weights if weight is not None)

    def obstacle(self, product: Quantizable) -> str | None:
        """Why a product cannot be quantised, if it cannot be."""
        if (why := self.format.obstacle(product.function)) is not None:
            return why
        weight = constant_of(self.module, product.weight)
        if weight is None or not weight.isfinite().all():
            return "its weight has a NaN or an infinity"
        if self.format.name == "int8_weights" and self.uses[weight.data_ptr()] > 1 and crashes_on_equal_weights():
            return "this TensorRT cannot build several products of one int8 weight"
        if self.format.blocks:
            count, last = weight.shape[1 - product.axis], weight.shape[-1]
            if self.block(product) is None:
                return f"its {count} inputs are no multiple of {self.format.blocks[-1]}"
            if last % 2:
                return f"its weight has rows of {last} numbers, and two are stored together"
            if not torch.finfo(torch.float16).tiny * 2**4 <= weight.abs().max() / self.format.largest <= 2**15:
                return f"float16 has no scale for its weight of up to {float(weight.abs().max()):.3g}"
        return self.usable(product.input) if self.format.is_whole else None

    def block(self, product: Quantizable) -> int | None:
        """How many numbers of a weight have a scale of their own."""
        count = product.weight.meta["val"].shape[1 - product.axis]
        return next((size for size in self.format.blocks if count % size == 0), None)

    def usable(self, value: Node) -> str | None:
        """Why a value cannot be quantised, if it cannot be."""
        largest = self.ranges.get(value.name)
        if largest is None:
            return "the range of its input is not known"
        if largest == math.inf:
            return "beside its input's largest values on the calibration data, nearly all others would become 0"
        if not largest or not math.isfinite(largest) or largest / self.format.largest < torch.finfo(torch.float32).tiny:
            return f"the range of its input is {largest:g} on the calibration data"
        return None

    def quantize(self, product: Quantizable) -> None:
        if self.format.is_whole:
            product.node.replace_input_with(product.input, self.activation(product.input))
        weight = self.weight(product)
        if product.takes_bias and product.input.name in self.means:
            self.correct(product, weight)
        product.node.replace_input_with(product.weight, weight)

    def attend(self, node: Node) -> None:
        """Quantise the products of an attention.

        The queries are scaled before they are quantised: TensorRT has no kernel for a factor behind that.
        """
        given = dict(arguments(node))
        query, key, value = operands(node)
        scale = query.meta["val"].shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
        with self.module.graph.inserting_before(node):
            scaled = self.module.graph.call_function(torch.mul, (query, scale))
        scaled.meta = {name: kept for name, kept in query.meta.items() if name in ("val", "module", "source")}
        for name in ("module", "source"):
            scaled.meta.setdefault(name, node.meta[name])
        self.ranges[scaled.name] = self.ranges[query.name] * abs(scale)
        quantised = {name: self.activation(x) for name, x in (("query", scaled), ("key", key), ("value", value))}
        others = {name: given[name] for name in ("attn_mask", "is_causal") if name in given}
        most = self.ranges.get(f"{node.name}:probabilities", 1.0)
        node.target, node.args = attention_of_quantized, ()
        _, heads, tokens, _ = node.meta["val"].stride()
        more = {"tokens_first": True} if bool(tokens > heads) else {}  # calls behind it may rest on that
        node.kwargs = {**quantised, **others, "scale": 1.0, "format": self.format.name, "largest": most, **more}
        if (last := rounding(node)) is not None and torch.where in [user.target for user in node.users]:
            with self.module.graph.inserting_after(node):  # for a kernel that writes int8, the result is rounded first
                first = self.module.graph.call_function(fake_quantize, (node, *last.args[1:]))
            first.meta = {name: kept for name, kept in node.meta.items() if name in ("val", "module", "source")}
            node.replace_all_uses_with(first, lambda user: user is not first)

    def activation(self, value: Node) -> Node:
        """A value, quantised and brought back."""
        if value not in self.activations:
            call = fake_quantize_fp8 if self.format.name == "fp8" else fake_quantize
            scale = self.ranges[value.name] / self.format.largest
            with self.module.graph.inserting_after(value):
                made = self.module.graph.call_function(call, (value, scale))
            made.meta = {name: kept for name, kept in value.meta.items() if name in ("val", "module", "source")}
            made.meta["precision"] = self.format.name
            self.activations[value] = made
        return self.activations[value]

    def weight(self, product: Quantizable) -> Node:
        """A weight as quantised numbers, brought back for each output."""
        is_own = not self.format.is_whole and crashes_on_shared_weights()
        key = (product.weight, product.axis, product.node if is_own else None)
        if key not in self.weights:
            values, scale = self.parts(product)
            users = product.weight.users
            first = product.node if is_own else next(n for n in self.module.graph.nodes if n in users)
            constant = constant_of(self.module, product.weight)
            assert constant is not None
            with self.module.graph.inserting_before(first):
                call = self.module.graph.call_function(dequantize, (values, scale, product.axis, constant.dtype))
            call.meta = {name: product.node.meta[name] for name in ("module", "source")}
            with product.node.meta["val"].fake_mode:
                device = product.node.meta["val"].device
                call.meta["val"] = torch.empty(constant.shape, dtype=constant.dtype, device=device)
            self.weights[key] = call
        return self.weights[key]

    def parts(self, product: Quantizable) -> tuple[Node, Node]:
        """A weight as quantised numbers, and their scales."""
        node, key = product.weight, (product.weight, product.axis)
        if key not in self.constants:
            constant = constant_of(self.module, node)
            assert constant is not None
            tensors = quantized(constant, product.axis, self.format.weights, self.block(product))
            first = next(n for n in self.module.graph.nodes if n in node.users)
            name = self.format.name.removesuffix("_weights")
            made = [
                add_constant(self.module, f"{node.target}_{part}", tensor.cpu(), first)
                for tensor, part in zip(tensors, (name, "scale"), strict=True)
            ]
            for part, change in zip(made, (f"quantised to {name}", "its scale"), strict=True):
                part.meta["made_of"] = origin_of(node).then(change)
            self.constants[key] = made[0], made[1]
        return self.constants[key]

    def correct(self, product: Quantizable, weight: Node) -> None:
        """Subtract from a product's bias what its rounded weight adds to its outputs in the mean."""
        constant = constant_of(self.module, product.weight)
        values, scale = (constant_of(self.module, part) for part in weight.args[:2])  # type: ignore[arg-type]
        assert constant is not None and values is not None and scale is not None
        change = dequantize(values, scale, product.axis, torch.float32) - constant.float().cpu()
        rows = change.flatten(2).sum(2) if change.dim() > 2 else change
        means = self.means[product.input.name].float().cpu().reshape(-1, rows.shape[1])  # a row for each group
        shift = torch.einsum("goi,gi->go", rows.reshape(len(means), -1, rows.shape[1]), means).flatten()
        old = None if product.bias is None else constant_of(self.module, product.bias)
        corrected = -shift if old is None else old.float().cpu() - shift
        made = add_constant(self.module, f"{product.weight.target}_bias", corrected.to(constant.dtype), product.node)
        origin = origin_of(product.weight if product.bias is None else product.bias)
        made.meta["made_of"] = origin.then("corrected for the rounding of the weight")
        given = {**arguments(product.node), "bias": made}
        product.node.args, product.node.kwargs = (), given
