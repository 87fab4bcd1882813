"""Element by element: unary and element-wise layers, activations and selects, promoted and broadcast as torch does."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch2rt.backend.quirks import drops_bias_before_products, folds_or_without_broadcasting, relu_keeps_nan
from torch2rt.backend.tensorrt import trt
from torch2rt.sizes import is_symbolic
from torch2rt.vocabulary import layers
from torch2rt.vocabulary.context import Context
from torch2rt.vocabulary.layers import EW
from torch2rt.vocabulary.makers import is_biased_product, is_scaled
from torch2rt.vocabulary.plain import Value, dims, dtype_of
from torch2rt.vocabulary.tensors import cast, materialize, operands, result_type


def unary(ctx: Context, op: Any, x: Value) -> Any:
    """One unary layer."""
    x = materialize(ctx, x)
    return layers.unary(ctx, op, _apart_from_bias(ctx, x) if op == trt.UnaryOperation.ERF else x)


def activation(
    ctx: Context, kind: Any, x: Value, alpha: float | None = None, beta: float | None = None, keep_nan: bool = True
) -> Any:
    """One activation layer, in which a NaN stays a NaN; `keep_nan=False` where it does not matter if it does."""
    x = materialize(ctx, x)
    if keep_nan and ctx.nan == "keep" and kind in _BOUNDED:
        y = activation(ctx, kind, x, alpha, beta, keep_nan=False)
        return elementwise(ctx, EW.SUM, y, _zero_or_nan(ctx, x)) if relu_keeps_nan() else with_nans_of(ctx, x, y)
    layer = ctx.network.add_activation(_apart_from_bias(ctx, x) if _is_matched(ctx, kind, x) else x, kind)
    if alpha is not None:
        layer.alpha = alpha
    if beta is not None:
        layer.beta = beta
    return ctx.track(layer.get_output(0), dims(ctx, x))


def _apart_from_bias(ctx: Context, x: Any) -> Any:
    """A tensor as it is, but of a biased product less zero: TensorRT drops the bias of some that it recognises."""
    if not drops_bias_before_products() or not dtype_of(x).is_floating_point or not is_biased_product(ctx, x):
        return x
    return elementwise(ctx, EW.SUB, x, 0.0)


def _is_matched(ctx: Context, kind: Any, x: Any) -> bool:
    """Whether an activation is one that TensorRT recognises behind a product, or the end of one that is written out."""
    return is_scaled(ctx, x) if kind == trt.ActivationType.TANH else kind in _RECOGNISED and ctx.is_multiplied


_RECOGNISED = (trt.ActivationType.RELU, trt.ActivationType.GELU_ERF, trt.ActivationType.GELU_TANH)
_BOUNDED = (trt.ActivationType.CLIP, trt.ActivationType.HARD_SIGMOID, trt.ActivationType.THRESHOLDED_RELU)


def elementwise(ctx: Context, op: Any, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """One element-wise layer on two values, promoted (to `dtype` if given) and broadcast as torch does.

    A MAX or a MIN is NaN where one of them is, as `maximum` and `minimum` make it.
    """
    if op in _BEYOND and (dtype or result_type(ctx, a, b)).is_floating_point:
        return _extreme(ctx, op, a, b, dtype)
    if (dtype or result_type(ctx, a, b)) is torch.bool and folds_or_without_broadcasting():
        a, b = _dense(ctx, a, b), _dense(ctx, b, a)
    return layers.elementwise(ctx, op, *operands(ctx, a, b, dtype=dtype))


def _dense(ctx: Context, x: Value, other: Value) -> Value:
    """A bool constant in all of the sizes it is broadcast to, where they are static."""
    if isinstance(x, trt.ITensor) or any(map(is_symbolic, (x, *dims(ctx, other)))):
        return x
    tensor = torch.as_tensor(x)
    return tensor.expand(torch.broadcast_shapes(tensor.shape, dims(ctx, other))) if tensor.dtype is torch.bool else x


def select(ctx: Context, condition: Value, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`torch.where`: one select layer, with the two sides promoted and everything broadcast."""
    dtype = dtype or result_type(ctx, a, b)
    ndim = max(len(dims(ctx, x)) for x in (condition, a, b))
    condition = materialize(ctx, condition, torch.bool, ndim)
    a, b = (materialize(ctx, x, dtype, ndim) for x in (a, b))
    return layers.select(ctx, condition, a, b)


def is_negative(ctx: Context, x: Value) -> Any:
    """Whether floats are below zero or -0.0, whose reciprocal tells it from 0.0; a NaN is not."""
    below = elementwise(ctx, EW.LESS, x, 0)
    return elementwise(ctx, EW.OR, below, elementwise(ctx, EW.LESS, unary(ctx, trt.UnaryOperation.RECIP, x), 0))


# Arithmetic and comparisons ------------------------------------------------------------------------------------------


def add(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a + b`; of bools, their OR."""
    return elementwise(ctx, EW.SUM, a, b, dtype)


def sub(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a - b`."""
    return elementwise(ctx, EW.SUB, a, b, dtype)


def mul(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a * b`; of bools, their AND."""
    return elementwise(ctx, EW.PROD, a, b, dtype)


def div(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a / b` in the promoted dtype: integers are rounded towards zero."""
    return elementwise(ctx, EW.DIV, a, b, dtype)


def floor_div(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a / b`, rounded down."""
    return elementwise(ctx, EW.FLOOR_DIV, a, b, dtype)


def equal(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a == b`."""
    return elementwise(ctx, EW.EQUAL, a, b, dtype)


def greater(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a > b`."""
    return elementwise(ctx, EW.GREATER, a, b, dtype)


def less(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a < b`."""
    return elementwise(ctx, EW.LESS, a, b, dtype)


def logical_and(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a & b` of bools."""
    return elementwise(ctx, EW.AND, a, b, dtype)


def logical_or(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a | b` of bools."""
    return elementwise(ctx, EW.OR, a, b, dtype)


def logical_xor(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """`a ^ b` of bools."""
    return elementwise(ctx, EW.XOR, a, b, dtype)


# Extremes, in which a NaN stays a NaN --------------------------------------------------------------------------------
#
# TensorRT's layers for bounds, maxima and minima may give a number where one side is NaN. TensorRT for RTX 1.6 does in
# every dtype; a CLIP in half precision keeps a NaN in some kernels and loses it in those of matrix products. A
# comparison with a NaN is false, so the select after it can keep the NaN. Bounds add a zero that is NaN instead: sums
# and activations run as part of a convolution, where a select is a kernel of its own. In mobilenet_v2, half precision,
# that takes 1.08 (batch 1) to 1.14 times (batch 16) the time of the CLIP alone, and selects 1.21 times.


def maximum(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """The larger one of two values, NaN where one of them is; which of 0.0 and -0.0 it is stays open."""
    return elementwise(ctx, EW.MAX, a, b, dtype)


def minimum(ctx: Context, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """The smaller one of two values, NaN where one of them is; which of 0.0 and -0.0 it is stays open."""
    return elementwise(ctx, EW.MIN, a, b, dtype)


def clamp(ctx: Context, x: Value, low: Value | None, high: Value | None, dtype: torch.dtype | None = None) -> Any:
    """A value within bounds, of which the upper one wins where they cross; NaN stays NaN."""
    dtype = dtype or result_type(ctx, *(v for v in (x, low, high) if v is not None))
    bounds = [bound for bound in (low, high) if isinstance(bound, (int, float)) and math.isfinite(bound)]
    if len(bounds) == 2 and dtype.is_floating_point:
        return activation(ctx, trt.ActivationType.CLIP, cast(ctx, x, dtype), min(bounds), bounds[1])
    x = x if low is None else maximum(ctx, x, low, dtype)
    return x if high is None else minimum(ctx, x, high, dtype)


_BEYOND = {EW.MAX: EW.GREATER, EW.MIN: EW.LESS}


def _extreme(ctx: Context, op: Any, a: Value, b: Value, dtype: torch.dtype | None) -> Any:
    """The larger or the smaller one of two floats."""
    if _has_no_nan(a) and not _has_no_nan(b):
        a, b = b, a
    can_be_nan = not _has_no_nan(b)
    zero = op == EW.MAX and isinstance(b, (int, float)) and b == 0
    a, b = operands(ctx, a, b, dtype=dtype)
    if zero and (ctx.nan == "ignore" or relu_keeps_nan()):
        return activation(ctx, trt.ActivationType.RELU, a)
    if ctx.nan == "ignore":
        return layers.elementwise(ctx, op, a, b)
    other = elementwise(ctx, _BEYOND[op], b, a)
    if can_be_nan:
        other = elementwise(ctx, EW.OR, other, unary(ctx, trt.UnaryOperation.ISNAN, b))
    return select(ctx, other, b, a)


def _has_no_nan(x: Value) -> bool:
    """Whether a value is known to hold no NaN: a number, a size or a weight."""
    if isinstance(x, torch.Tensor):
        return not bool(x.isnan().any())
    return not isinstance(x, trt.ITensor) and (is_symbolic(x) or x == x)


def _zero_or_nan(ctx: Context, x: Any) -> Any:
    """A zero for each element, or NaN where it is NaN: RELU(-RELU(x))."""
    relu = trt.ActivationType.RELU
    return activation(ctx, relu, unary(ctx, trt.UnaryOperation.NEG, activation(ctx, relu, x)))


def with_nans_of(ctx: Context, x: Any, y: Any) -> Any:
    """`y`, and NaN where `x` of the same sizes is."""
    return select(ctx, unary(ctx, trt.UnaryOperation.ISNAN, x), x, y)
