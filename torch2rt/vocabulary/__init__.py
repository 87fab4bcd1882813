"""The verbs that converters are written in: one meaning each, types and broadcasting and dynamic sizes handled inside.

A *value* is a TensorRT tensor, a torch tensor (a weight), a number or a symbolic size; every verb takes any of them.
Sizes are ints, or `SymInt`s where dynamic, and plain Python arithmetic works on both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import sympy
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv, ToFloat
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torch2rt.backend.tensorrt import DTYPES, TORCH_DTYPES, can_slice_axes, relu_keeps_nan, trt
from torch2rt.errors import ConversionError
from torch2rt.registry import complex_converter, composite, converter, factory, fusion, rewrite
from torch2rt.sizes import counterexample, evaluate, expression, is_symbolic
from torch2rt.tracing.subgraphs import run, scope, subgraph
from torch2rt.vocabulary.context import Complex, Context

__all__ = [
    "Complex", "Context", "activation", "axes", "broadcast", "cast", "check", "clamp", "complex_converter", "composite",
    "concat", "constant", "converter", "dims", "dtype_of", "elementwise", "expand", "factory", "fusion", "gather",
    "iota", "is_negative", "is_symbolic", "is_traced", "largest", "lift", "materialize", "matmul", "maximum", "minimum",
    "narrow", "ntuple", "operands", "permute", "proven", "reduce", "refuse", "require", "reshape", "rewrite", "run",
    "same_size", "scope", "select", "shape_tensor", "slice_nd", "subgraph", "torch", "trt", "unary", "unlift",
    "weighted_gather", "wide", "wrap_dim",
]  # fmt: skip

Value = Any
EW = trt.ElementWiseOperation


# Refusing ------------------------------------------------------------------------------------------------------------


def refuse(reason: str) -> NoReturn:
    """Say why this call cannot be converted; the call, its arguments and its place are added by the caller."""
    raise ConversionError(reason)


def check(condition: bool, reason: str) -> None:
    """`refuse` unless the condition holds."""
    if not condition:
        refuse(reason)


# Plain Python --------------------------------------------------------------------------------------------------------


def wrap_dim(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + max(ndim, 1) if dim < 0 else dim


def axes(dim: int | Sequence[int] | None, ndim: int) -> int:
    """TensorRT's bitmask for one, several or (with `None` or an empty list) all dimensions."""
    if dim is None or dim == [] or dim == ():
        return (1 << ndim) - 1
    return sum({1 << wrap_dim(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)})


def ntuple(value: Any, n: int) -> tuple[Any, ...]:
    """A number, or a sequence of one, repeated to `n`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * n if len(values) == 1 else values


def is_traced(value: Any) -> bool:
    """In a composite: whether a value is computed from the module's inputs, or a dynamic size."""
    return isinstance(value, FakeTensor) or is_symbolic(value)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every size of the inputs."""
    return expression(a) == expression(b) if is_symbolic(a) or is_symbolic(b) else a == b


def proven(ctx: Context, claim: Any) -> bool:
    """Whether a claim about sizes, such as `size > 1`, holds for every size that the engine serves."""
    return counterexample(expression(claim), ctx.symbols) is None


def largest(ctx: Context, size: Any) -> int:
    """The largest value of a size over the sizes that the engine serves, or a bound above it."""
    if not is_symbolic(size):
        return int(size)
    upper = bound_sympy(expression(size), {s: ValueRanges(dim.min, dim.max) for s, dim in ctx.symbols.items()}).upper
    check(upper.is_Integer, f"{size} has no bound")
    return int(upper)


def require(ctx: Context, claim: Any, reason: str) -> None:
    """Refuse if a claim about sizes fails for one that is served.

    What cannot be decided, and how the sizes of several dimensions must relate, is checked at every call.
    """
    expr = expression(claim)
    wrong = counterexample(expr, ctx.symbols)
    if isinstance(wrong, dict) and not ctx.lowered.interface.is_relation(expr, ctx.symbols):
        refuse(f"{reason}, for {', '.join(f'{dim} = {size}' for dim, size in wrong.items())}")
    check(wrong is None or bool(expr.free_symbols), reason)
    if wrong:
        ctx.constrain(expr)


def tie(ctx: Context, a: Any, b: Any) -> None:
    """Check at every call that two sizes are equal."""
    claim = sympy.Eq(expression(a), expression(b))
    check(bool(claim.free_symbols), f"a size of {a} meets one of {b}")
    if counterexample(claim, ctx.symbols) is None:
        return
    ctx.constrain(claim)


def dtype_of(x: Value) -> torch.dtype:
    """The torch dtype of a value."""
    if isinstance(x, trt.ITensor):
        return TORCH_DTYPES[x.dtype]
    if isinstance(x, torch.Tensor):
        return x.dtype
    if isinstance(x, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(x, (int, torch.SymInt)) else torch.get_default_dtype()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What torch sums and composes values of a type in: float32 for half precision, int32 for bytes and bools."""
    return _WIDE.get(dtype, dtype)


_WIDE = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32,
    torch.int8: torch.int32, torch.uint8: torch.int32, torch.bool: torch.int32,
}  # fmt: skip


def is_integral(dtype: torch.dtype) -> bool:
    """Whether a dtype is of whole numbers, bool among them."""
    return not dtype.is_floating_point and not dtype.is_complex


def dims(ctx: Context, x: Value) -> tuple[Any, ...]:
    """The sizes of a value: ints, and `SymInt`s where dynamic."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    if not isinstance(x, trt.ITensor):
        return ()
    if id(x) in ctx.sizes:
        return ctx.sizes[id(x)][1]
    shape = tuple(x.shape)
    if -1 in shape:
        refuse(f"torch2rt does not know the dynamic sizes of an intermediate tensor of shape {shape}")
    return shape


# Values to tensors ---------------------------------------------------------------------------------------------------


def constant(ctx: Context, value: Any, dtype: torch.dtype | None = None, ndim: int | None = None) -> Any:
    """A torch tensor, number or nested list as a constant, with leading unit axes up to `ndim` if given."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    key = ("constant", id(value) if isinstance(value, torch.Tensor) else repr(value), dtype or tensor.dtype, ndim)
    if key in ctx.memo:
        return ctx.memo[key][0]
    dtype = dtype or tensor.dtype
    if dtype is torch.float64:
        refuse("a float64 constant has no TensorRT type; make it float32")
    narrow = dtype in (torch.int8, torch.uint8)  # such constants may only feed a Dequantize
    shaped = tensor.detach().to(torch.int32 if narrow else dtype)
    if ndim is not None and ndim > shaped.dim():
        shaped = shaped.reshape((1,) * (ndim - shaped.dim()) + tuple(shaped.shape))
    shape = tuple(shaped.shape)
    if shaped.numel() == 0:
        result = ctx.network.add_constant(shape, trt.Weights(DTYPES[shaped.dtype])).get_output(0)
        ctx.lowered.weights[ctx.network.num_layers - 1, "weights"] = shaped.cpu()
    else:
        result = ctx.network.add_constant(shape, ctx.weights(shaped)).get_output(0)
    result = ctx.track(result, shape)
    if dtype is torch.int8:
        result = cast(ctx, result, dtype)
    elif dtype is torch.uint8:
        ctx.bytes.add(id(result))
    ctx.memo[key] = (result, value)  # the value stays alive, so its id stays its own
    return result


def materialize(ctx: Context, x: Value, dtype: torch.dtype | None = None, ndim: int | None = None) -> Any:
    """Any value as a TensorRT tensor of this dtype and at least this rank."""
    if is_symbolic(x):
        return materialize(ctx, reshape(ctx, shape_tensor(ctx, [x]), ()), dtype, ndim)
    if not isinstance(x, trt.ITensor):
        return constant(ctx, x, dtype, ndim)
    x = cast(ctx, x, dtype) if dtype is not None else _as_bytes(ctx, x) if dtype_of(x) is torch.uint8 else x
    sizes = dims(ctx, x)
    return x if ndim is None or len(sizes) >= ndim else reshape(ctx, x, (1,) * (ndim - len(sizes)) + sizes)


def cast(ctx: Context, x: Value, dtype: torch.dtype) -> Any:
    """A value in another dtype; free when it has it already.

    TensorRT takes uint8 only at the network's ends, so between them int32 stands for it, and `ctx.bytes` knows which.
    """
    if isinstance(x, torch.Tensor):
        return x.to(dtype)
    if not isinstance(x, trt.ITensor):
        return materialize(ctx, x, dtype)
    if dtype is torch.uint8:
        return _as_bytes(ctx, x)
    if dtype is torch.int32 and id(x) in ctx.bytes:  # not bytes any more, which an id of its own says
        return ctx.track(ctx.network.add_identity(x).get_output(0), dims(ctx, x))
    if dtype_of(x) is dtype:
        return x
    check(dtype in DTYPES, f"TensorRT has no {dtype}")
    return ctx.track(ctx.network.add_cast(x, DTYPES[dtype]).get_output(0), dims(ctx, x))


def _as_bytes(ctx: Context, x: Any) -> Any:
    if id(x) in ctx.bytes:
        return x
    if dtype_of(x) is torch.uint8:  # a network input
        if ("bytes", id(x)) not in ctx.memo:
            ctx.memo["bytes", id(x)] = _mark_bytes(ctx, cast(ctx, x, torch.int32))
        return ctx.memo["bytes", id(x)]
    wraps = not dtype_of(x).is_floating_point and dtype_of(x) is not torch.bool
    x = cast(ctx, x, torch.int32)
    if wraps:
        x = elementwise(ctx, EW.SUB, x, elementwise(ctx, EW.PROD, elementwise(ctx, EW.FLOOR_DIV, x, 256), 256))
    return _mark_bytes(ctx, x)


def _mark_bytes(ctx: Context, x: Any) -> Any:
    ctx.bytes.add(id(x))
    return x


def _moves(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that makes no new elements: of bytes it makes bytes."""

    @functools.wraps(verb)
    def wrapped(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
        x = materialize(ctx, x)
        result = verb(ctx, x, *args, **kwargs)
        return _mark_bytes(ctx, result) if id(x) in ctx.bytes else result

    return wrapped


def result_type(ctx: Context, *xs: Value, to_float: bool = False) -> torch.dtype:
    """The dtype in which torch computes an element-wise call on these values."""
    kinds = ELEMENTWISE_TYPE_PROMOTION_KIND
    stand_ins = [_stand_in(ctx, x) for x in xs]
    return elementwise_dtypes(*stand_ins, type_promotion_kind=kinds.INT_TO_FLOAT if to_float else kinds.DEFAULT)[1]


def _stand_in(ctx: Context, x: Value) -> Any:
    if isinstance(x, (trt.ITensor, torch.Tensor)):
        dtype = torch.uint8 if id(x) in ctx.bytes else dtype_of(x)
        return torch.empty((1,) * len(dims(ctx, x)), dtype=dtype, device="meta")
    if is_symbolic(x):
        return {torch.SymInt: 1, torch.SymFloat: 1.0, torch.SymBool: True}[type(x)]
    return x


def operands(ctx: Context, *xs: Value, dtype: torch.dtype | None = None, to_float: bool = False) -> list[Any]:
    """Values as tensors of one dtype (torch's promoted one unless given) and one rank, ready to broadcast."""
    dtype = dtype or result_type(ctx, *xs, to_float=to_float)
    ndim = max(len(dims(ctx, x)) for x in xs)
    return [materialize(ctx, x, dtype, ndim) for x in xs]


def broadcast(ctx: Context, *xs: Value) -> list[Any]:
    """Values as tensors of one rank, each in its own dtype."""
    ndim = max(len(dims(ctx, x)) for x in xs)
    return [materialize(ctx, x, None, ndim) for x in xs]


def _broadcast_sizes(*shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes of a broadcast result; a dynamic size gives way to a static one other than 1."""
    result = []
    for sizes in zip(*shapes, strict=True):
        static = [s for s in sizes if not is_symbolic(s) and s != 1]
        dynamic = [s for s in sizes if is_symbolic(s)]
        result.append((static or dynamic or [1])[0])
    return tuple(result)


# One layer each ------------------------------------------------------------------------------------------------------


def unary(ctx: Context, op: Any, x: Value) -> Any:
    """One unary layer."""
    x = materialize(ctx, x)
    return ctx.track(ctx.network.add_unary(x, op).get_output(0), dims(ctx, x))


def activation(
    ctx: Context, kind: Any, x: Value, alpha: float | None = None, beta: float | None = None, keep_nan: bool = True
) -> Any:
    """One activation layer, in which a NaN stays a NaN; `keep_nan=False` where it does not matter if it does."""
    x = materialize(ctx, x)
    if keep_nan and ctx.nan == "keep" and kind in _BOUNDED:
        y = activation(ctx, kind, x, alpha, beta, keep_nan=False)
        return elementwise(ctx, EW.SUM, y, _zero_or_nan(ctx, x)) if relu_keeps_nan() else _with_nans_of(ctx, x, y)
    layer = ctx.network.add_activation(x, kind)
    if alpha is not None:
        layer.alpha = alpha
    if beta is not None:
        layer.beta = beta
    return ctx.track(layer.get_output(0), dims(ctx, x))


_BOUNDED = (trt.ActivationType.CLIP, trt.ActivationType.HARD_SIGMOID, trt.ActivationType.THRESHOLDED_RELU)


_ON_BOOL = {EW.SUM: EW.OR, EW.PROD: EW.AND, EW.MAX: EW.OR, EW.MIN: EW.AND}
_COMPARISONS = (EW.EQUAL, EW.GREATER, EW.LESS)


def elementwise(ctx: Context, op: Any, a: Value, b: Value, dtype: torch.dtype | None = None) -> Any:
    """One element-wise layer on two values, promoted (to `dtype` if given) and broadcast as torch does.

    A MAX or a MIN is NaN where one of them is, as `maximum` and `minimum` make it.
    """
    if op in _BEYOND and (dtype or result_type(ctx, a, b)).is_floating_point:
        return _extreme(ctx, op, a, b, dtype)
    if (dtype or result_type(ctx, a, b)) is torch.bool:
        a, b = _dense(ctx, a, b), _dense(ctx, b, a)
    a, b = operands(ctx, a, b, dtype=dtype)
    if dtype_of(a) is torch.bool:
        op = _ON_BOOL.get(op, op)
    if op in (EW.GREATER, EW.LESS) and dtype_of(a) is torch.bool:
        a, b = cast(ctx, a, torch.int32), cast(ctx, b, torch.int32)
    return _add_elementwise(ctx, op, a, b)


def _add_elementwise(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    layer = ctx.network.add_elementwise(a, b, op)
    return ctx.track(layer.get_output(0), _broadcast_sizes(dims(ctx, a), dims(ctx, b)))


def _dense(ctx: Context, x: Value, other: Value) -> Value:
    """A bool constant in all of the sizes it is broadcast to, where they are static.

    TensorRT for RTX 1.6 folds `OR(x, true)` into the constant without broadcasting it.
    """
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
    sizes = _broadcast_sizes(dims(ctx, condition), dims(ctx, a), dims(ctx, b))
    result = ctx.track(ctx.network.add_select(condition, a, b).get_output(0), sizes)
    return _mark_bytes(ctx, result) if id(a) in ctx.bytes and id(b) in ctx.bytes else result


def reduce(
    ctx: Context, op: Any, x: Value, dim: int | Sequence[int] | None, keepdim: bool = False, keep_nan: bool = True
) -> Any:
    """Reduce over one, several or all dimensions; a 0-d value is its own reduction.

    A MAX or a MIN is NaN where an element is; `keep_nan=False` where it does not matter if it is.
    """
    x = materialize(ctx, x)
    best = _reduce(ctx, op, x, dim, keepdim)
    if op not in _EXTREMES or not keep_nan or ctx.nan != "keep" or not dtype_of(x).is_floating_point or best is x:
        return best
    nans = select(ctx, unary(ctx, trt.UnaryOperation.ISNAN, x), x, 0.0, dtype_of(x))
    return _with_nans_of(ctx, _reduce(ctx, trt.ReduceOperation.SUM, nans, dim, keepdim), best)


_EXTREMES = (trt.ReduceOperation.MAX, trt.ReduceOperation.MIN)


def _reduce(ctx: Context, op: Any, x: Any, dim: int | Sequence[int] | None, keepdim: bool) -> Any:
    """One layer a dimension, or for neighbours of static size that `reshape` makes one.

    A layer over several, fused with what was reduced or normalised over some of them before, gives wrong sums in
    TensorRT for RTX 1.6 (`softmax(x, 1).sum((1, 2))`).
    """
    sizes = dims(ctx, x)
    mask = axes(dim, len(sizes))
    reduced = [axis for axis in range(len(sizes)) if mask >> axis & 1]
    while reduced:
        first = last = reduced.pop()
        while reduced and reduced[-1] == first - 1 and not any(map(is_symbolic, sizes[first - 1 : last + 1])):
            first = reduced.pop()
        before, after = dims(ctx, x)[:first], dims(ctx, x)[last + 1 :]
        if last > first:
            x = reshape(ctx, x, (*before, math.prod(sizes[first : last + 1]), *after))
        kept = (*before, *[1] * keepdim, *after)
        x = ctx.track(ctx.network.add_reduce(x, op, 1 << first, keepdim).get_output(0), kept)
        if last > first and keepdim:
            x = reshape(ctx, x, (*before, *[1] * (last - first + 1), *after))
    return x


def matmul(ctx: Context, a: Value, b: Value, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    """One matrix-multiply layer on values of one dtype, batch dimensions broadcast."""
    a, b = broadcast(ctx, a, b)
    op = {False: trt.MatrixOperation.NONE, True: trt.MatrixOperation.TRANSPOSE}
    layer = ctx.network.add_matrix_multiply(a, op[transpose_a], b, op[transpose_b])
    rows, columns = dims(ctx, a)[-1 if transpose_a else -2], dims(ctx, b)[-2 if transpose_b else -1]
    batch = _broadcast_sizes(dims(ctx, a)[:-2], dims(ctx, b)[:-2])
    return ctx.track(layer.get_output(0), (*batch, rows, columns))


def concat(ctx: Context, xs: Sequence[Value], dim: int) -> Any:
    """Values of one dtype and rank, one after the other."""
    xs = [materialize(ctx, x) for x in xs]
    if len(xs) == 1:
        return xs[0]
    sizes = list(dims(ctx, xs[0]))
    dim = wrap_dim(dim, len(sizes))
    layer = ctx.network.add_concatenation(xs)
    layer.axis = dim
    total = sum((dims(ctx, x)[dim] for x in xs[1:]), sizes[dim])
    result = ctx.track(layer.get_output(0), (*sizes[:dim], total, *sizes[dim + 1 :]))
    return _mark_bytes(ctx, result) if all(id(x) in ctx.bytes for x in xs) else result


@_moves
def gather(ctx: Context, x: Value, index: Value, dim: int, each: bool = False) -> Any:
    """`x` at the positions in `index` (not negative) along one dimension, which the index's dimensions replace.

    With `each` the index has a position for each element of the result, as `torch.gather` wants it.
    """
    x, index = materialize(ctx, x), materialize(ctx, index)
    sizes = dims(ctx, x)
    dim = wrap_dim(dim, len(sizes))
    if each:
        layer = ctx.network.add_gather_v2(x, index, trt.GatherMode.ELEMENT)
        layer.axis = dim
        return ctx.track(layer.get_output(0), dims(ctx, index))
    layer = ctx.network.add_gather(x, index, dim)
    return ctx.track(layer.get_output(0), (*sizes[:dim], *dims(ctx, index), *sizes[dim + 1 :]))


def weighted_gather(ctx: Context, x: Value, places: Value, weights: Value, dim: int) -> Any:
    """Along one dimension, each element as a sum: of those at its row of `places`, times its row of `weights`."""
    x = gather(ctx, x, places, dim)
    shape = (*dims(ctx, weights), *[1] * (len(dims(ctx, x)) - dim - 2))
    weights = weights.reshape(shape) if isinstance(weights, torch.Tensor) else reshape(ctx, weights, shape)
    return reduce(ctx, trt.ReduceOperation.SUM, elementwise(ctx, EW.PROD, x, weights), dim + 1)


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
        return _add_elementwise(ctx, op, a, b)
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


def _with_nans_of(ctx: Context, x: Any, y: Any) -> Any:
    """`y`, and NaN where `x` of the same sizes is."""
    return select(ctx, unary(ctx, trt.UnaryOperation.ISNAN, x), x, y)


def is_negative(ctx: Context, x: Value) -> Any:
    """Whether floats are below zero or -0.0, whose reciprocal tells it from 0.0; a NaN is not."""
    below = elementwise(ctx, EW.LESS, x, 0)
    return elementwise(ctx, EW.OR, below, elementwise(ctx, EW.LESS, unary(ctx, trt.UnaryOperation.RECIP, x), 0))


@_moves
def permute(ctx: Context, x: Value, order: Sequence[int]) -> Any:
    """The dimensions in another order."""
    x = materialize(ctx, x)
    sizes = dims(ctx, x)
    order = [wrap_dim(d, len(sizes)) for d in order]
    if order == list(range(len(sizes))):
        return x
    layer = ctx.network.add_shuffle(x)
    layer.first_transpose = trt.Permutation(order)
    return ctx.track(layer.get_output(0), tuple(sizes[d] for d in order))


# Sizes ---------------------------------------------------------------------------------------------------------------


@_moves
def reshape(ctx: Context, x: Value, sizes: Sequence[Any]) -> Any:
    """The same elements in these sizes, with as little run-time arithmetic as the sizes allow."""
    x = materialize(ctx, x)
    old, sizes = dims(ctx, x), tuple(sizes)
    if len(old) == len(sizes) and all(map(same_size, old, sizes)):
        return x
    layer = ctx.network.add_shuffle(x)
    unknown = [
        i for i, size in enumerate(sizes) if is_symbolic(size) and not (i < len(old) and same_size(size, old[i]))
    ]
    zero = any(not is_symbolic(s) and s == 0 for s in (*sizes, *old))
    if (
        (zero and any(map(is_symbolic, sizes)))
        or len(unknown) > 1
        or (unknown and any(_may_be_zero(ctx, s) for s in sizes))
    ):
        layer.set_input(1, shape_tensor(ctx, sizes))
        layer.zero_is_placeholder = False
    else:
        layer.reshape_dims = tuple(-1 if i in unknown else 0 if is_symbolic(s) else s for i, s in enumerate(sizes))
        layer.zero_is_placeholder = not zero
    return ctx.track(layer.get_output(0), sizes)


def _may_be_zero(ctx: Context, size: Any) -> bool:
    return is_symbolic(size) and counterexample(expression(size) > 0, ctx.symbols) is not None


def lift(ctx: Context, x: Value, n: int) -> Any:
    """`x` as (batch, channels, *sizes): a unit batch where it has none, and a unit size before the one of `n` = 1."""
    x = materialize(ctx, x)
    return reshape(ctx, x, _lifted(dims(ctx, x), n))


def unlift(ctx: Context, y: Value, n: int, sizes: Sequence[Any] | None = None) -> Any:
    """What a layer makes of a lifted input, in the recorded sizes or in those given."""
    sizes = ctx.out.shape if sizes is None else sizes
    return reshape(ctx, ctx.track(y, _lifted(sizes, n)), sizes)


def _lifted(sizes: Sequence[Any], n: int) -> tuple[Any, ...]:
    return (*(sizes[: -n - 1] or [1]), sizes[-n - 1], *[1] * (2 - n), *sizes[-n:])


def expand(ctx: Context, x: Value, sizes: Sequence[Any]) -> Any:
    """Unit axes repeated to these sizes, leading axes added."""
    if not isinstance(x, trt.ITensor) and not any(map(is_symbolic, (x, *sizes))):
        # TensorRT for RTX 1.6 folds a slice that repeats a bool constant into a wrong constant.
        return constant(ctx, torch.as_tensor(x).expand(tuple(sizes)))
    x = materialize(ctx, x, None, len(sizes))
    old = dims(ctx, x)
    if all(map(same_size, old, sizes)):
        return x
    for a, b in zip(old, sizes, strict=True):
        if not same_size(a, 1) and not same_size(a, b):
            tie(ctx, a, b)
    return slice_nd(ctx, x, [0] * len(sizes), sizes, [0 if same_size(a, 1) else 1 for a in old])


@_moves
def slice_nd(
    ctx: Context, x: Value, start: Sequence[Any], size: Sequence[Any], stride: Sequence[Any], mode: Any = None,
    fill: Value | None = None,
) -> Any:  # fmt: skip
    """One slice layer: `size` elements from `start` in steps of `stride`, per dimension, ints or symbolic.

    A stride may be negative, or zero to repeat one element. With `mode` (a `trt.SampleMode`) the slice may reach over
    the edges; `fill` is what FILL puts there.
    """
    x = materialize(ctx, x)
    old = dims(ctx, x)
    changed = [
        i for i in range(len(old))
        if not (same_size(start[i], 0) and same_size(size[i], old[i]) and same_size(stride[i], 1))
    ]  # fmt: skip
    if not changed:
        return x
    used = (
        changed
        if can_slice_axes() and len(changed) < len(old) and any(map(is_symbolic, old))
        else list(range(len(old)))
    )
    lists = [[values[i] for i in used] for values in (start, size, stride)]
    static = [[0 if is_symbolic(v) else v for v in values] for values in lists]
    layer = ctx.network.add_slice(x, *static)
    if len(used) < len(old):
        layer.axes = used
    for position, values in enumerate(lists, 1):
        if any(map(is_symbolic, values)):
            layer.set_input(position, shape_tensor(ctx, values))
    if mode is not None:
        layer.mode = mode
    if fill is not None:
        layer.set_input(4, materialize(ctx, fill, dtype_of(x)))
    return ctx.track(layer.get_output(0), tuple(size))


def narrow(ctx: Context, x: Value, dim: int, start: Any, length: Any, step: Any = 1) -> Any:
    """`length` elements from `start` along one dimension."""
    x = materialize(ctx, x)
    sizes = dims(ctx, x)
    axis = wrap_dim(dim, len(sizes))
    pick = lambda value, others: [value if d == axis else o for d, o in enumerate(others)]  # noqa: E731
    return slice_nd(ctx, x, pick(start, [0] * len(sizes)), pick(length, sizes), pick(step, [1] * len(sizes)))


def iota(ctx: Context, size: Any) -> Any:
    """The integers from 0 up to a size, in order: a torch tensor where the size is static, else one fill layer."""
    if not is_symbolic(size):
        return torch.arange(size)
    layer = ctx.network.add_fill((0,), trt.FillOperation.LINSPACE, trt.DataType.INT64)
    layer.set_input(0, shape_tensor(ctx, [size]))
    layer.set_input(1, constant(ctx, 0))
    layer.set_input(2, constant(ctx, [1]))
    return ctx.track(layer.get_output(0), (size,))


def shape_tensor(ctx: Context, sizes: Sequence[Any]) -> Any:
    """Sizes as a 1-d int64 tensor (float32 for a symbolic float); each expression is computed once per network."""
    key = ("shape", tuple(map(expression, sizes)))
    if key in ctx.memo:
        return ctx.memo[key]
    if not any(map(is_symbolic, sizes)):
        result = constant(ctx, torch.tensor([int(s) for s in sizes], dtype=torch.int64))
    elif len(sizes) == 1 and (table := _table(ctx, expression(sizes[0]))) is not None:
        result = table
    elif len(sizes) == 1:
        result = sympy_interp(_ShapeLayers(ctx), _SymbolLayers(ctx), expression(sizes[0]))  # type: ignore[arg-type]
    else:
        parts: list[Any] = []
        for size in sizes:
            if parts and not is_symbolic(size) and not is_symbolic(parts[-1][0]):
                parts[-1].append(size)
            else:
                parts.append([size])
        result = concat(ctx, [shape_tensor(ctx, part) for part in parts], 0)
    ctx.memo[key] = result
    return result


_TABLE = 2**16  # sizes; TensorRT computes with the rest as it can


def _table(ctx: Context, expr: sympy.Basic) -> Any:
    """A whole number that Python rounds a float to, looked up for each size: TensorRT's floats are not Python's.

    `int(size / 6 * 6)` is the size, or in float32, as TensorRT computes, one less.
    """
    free = sorted(expr.free_symbols & set(ctx.symbols), key=str)
    if len(free) != 1 or not expr.is_integer or not expr.has(FloatTrueDiv, IntTrueDiv, ToFloat, sympy.Float):
        return None
    sizes = ctx.symbols[free[0]].sizes
    if len(sizes) > _TABLE or expr.free_symbols != {free[0]}:
        return None
    values = [int(evaluate(expr, {free[0]: size})) for size in sizes]
    place = elementwise(ctx, EW.SUB, _SymbolLayers(ctx).get(free[0]), sizes[0])
    return _looked_up(ctx, values, place)


_AT_ONCE = 64  # numbers in a tensor that TensorRT computes sizes with; of larger ones it knows nothing before a run
_BITS = 30  # of a number in such a table; TensorRT refuses to compute sizes with numbers above about 2 ** 53


def _looked_up(ctx: Context, values: Sequence[int], place: Any) -> Any:
    """The value at a place, which is a 1-element int64 tensor.

    Large tables are packed: what they differ by from a line takes few bits, so that many numbers fit into one.
    """
    if len(values) <= _AT_ONCE:
        return gather(ctx, torch.tensor(values), place, 0)
    whole = lambda op, a, b: elementwise(ctx, op, a, b)  # noqa: E731
    rise, sign = abs(values[-1] - values[0]), 1 if values[-1] >= values[0] else -1
    rest = [value - sign * (rise * i // (len(values) - 1)) for i, value in enumerate(values)]
    common = math.gcd(rise, len(values) - 1)
    line = whole(EW.FLOOR_DIV, whole(EW.PROD, place, rise // common), (len(values) - 1) // common)
    line = whole(EW.SUM, whole(EW.PROD, line, sign), min(rest))
    rest = [value - min(rest) for value in rest]
    if not (bits := max(rest).bit_length()):
        return line
    each = _BITS // bits
    words = [
        sum(value << (bits * i) for i, value in enumerate(rest[first : first + each]))
        for first in range(0, len(rest), each)
    ]
    index = whole(EW.FLOOR_DIV, place, each)
    word: Any = None
    for first in range(0, len(words), _AT_ONCE):
        some = words[first : first + _AT_ONCE]
        within = _add_elementwise(ctx, EW.MIN, *operands(ctx, whole(EW.SUB, index, first), len(some) - 1))
        within = _add_elementwise(ctx, EW.MAX, *operands(ctx, within, 0))
        found = gather(ctx, torch.tensor(some), within, 0)
        word = found if word is None else select(ctx, whole(EW.LESS, index, first), word, found, torch.int64)
    shift = whole(EW.SUB, place, whole(EW.PROD, index, each))
    above = whole(EW.FLOOR_DIV, word, gather(ctx, torch.tensor([1 << (bits * i) for i in range(each)]), shift, 0))
    higher = whole(EW.PROD, whole(EW.FLOOR_DIV, above, 1 << bits), 1 << bits)
    return whole(EW.SUM, line, whole(EW.SUB, above, higher))


class _SymbolLayers(dict):  # type: ignore[type-arg]
    """An environment for `sympy_interp` in which a symbol is the size it stands for, read off a network input."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx

    def get(self, symbol: sympy.Symbol, default: Any = None) -> Any:  # type: ignore[override]
        ctx = self.ctx
        if symbol not in ctx.symbols:
            return default
        if ("size", symbol) not in ctx.memo:
            dim = ctx.symbols[symbol]
            if ("shape of", dim.input) not in ctx.memo:
                shape = ctx.network.add_shape(ctx.inputs[dim.input]).get_output(0)
                ctx.memo["shape of", dim.input] = ctx.track(cast(ctx, shape, torch.int64), tuple(shape.shape))
            ctx.memo["size", symbol] = slice_nd(ctx, ctx.memo["shape of", dim.input], [dim.axis], [1], [1])
        return ctx.memo["size", symbol]


class _ShapeLayers:
    """The algebra of `sympy_interp` over 1-element TensorRT tensors: int64, float32 after a true division, bool."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def constant(self, value: Any, dtype: torch.dtype) -> Any:
        if dtype is torch.int64:
            return constant(self.ctx, torch.tensor([int(value)]))
        return constant(self.ctx, torch.tensor([bool(value) if dtype is torch.bool else float(value)]))

    def sym_sum(self, args: Sequence[Any]) -> Any:
        total = args[0]
        for arg in args[1:]:
            total = self.add(total, arg)
        return total

    def _binary(op: Any) -> Callable[..., Any]:  # type: ignore[misc]
        return lambda self, a, b: elementwise(self.ctx, op, a, b)

    def _extreme(op: Any) -> Callable[..., Any]:  # type: ignore[misc]
        return lambda self, a, b: _add_elementwise(self.ctx, op, *operands(self.ctx, a, b))  # a size is never NaN

    add, mul, floordiv = _binary(EW.SUM), _binary(EW.PROD), _binary(EW.FLOOR_DIV)
    minimum, maximum = _extreme(EW.MIN), _extreme(EW.MAX)
    eq, lt, gt = _binary(EW.EQUAL), _binary(EW.LESS), _binary(EW.GREATER)
    and_, or_, pow_by_natural = _binary(EW.AND), _binary(EW.OR), _binary(EW.POW)

    def mod(self, a: Any, b: Any) -> Any:
        return self.add(a, self.mul(self.mul(self.floordiv(a, b), b), self.constant(-1, torch.int64)))

    python_mod = mod

    def not_(self, a: Any) -> Any:
        return unary(self.ctx, trt.UnaryOperation.NOT, a)

    def ne(self, a: Any, b: Any) -> Any:
        return self.not_(self.eq(a, b))

    def le(self, a: Any, b: Any) -> Any:
        return self.not_(self.gt(a, b))

    def ge(self, a: Any, b: Any) -> Any:
        return self.not_(self.lt(a, b))

    def identity(self, a: Any) -> Any:
        return a

    def to_dtype(self, a: Any, dtype: torch.dtype) -> Any:
        return cast(self.ctx, a, torch.float32 if dtype.is_floating_point else torch.int64)

    def truediv(self, a: Any, b: Any) -> Any:
        a, b = (cast(self.ctx, x, torch.float32) for x in (a, b))
        return elementwise(self.ctx, EW.DIV, a, b)

    int_truediv = truediv

    def pow(self, a: Any, b: Any) -> Any:
        a, b = (cast(self.ctx, x, torch.float32) for x in (a, b))
        return elementwise(self.ctx, EW.POW, a, b)

    def sqrt(self, a: Any) -> Any:
        return unary(self.ctx, trt.UnaryOperation.SQRT, cast(self.ctx, a, torch.float32))

    def trunc_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return cast(self.ctx, a, torch.int64)

    def floor_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return cast(self.ctx, unary(self.ctx, trt.UnaryOperation.FLOOR, a), torch.int64)

    def ceil_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return cast(self.ctx, unary(self.ctx, trt.UnaryOperation.CEIL, a), torch.int64)

    def round_to_int(self, a: Any, dtype: torch.dtype) -> Any:
        return cast(self.ctx, unary(self.ctx, trt.UnaryOperation.ROUND, a), torch.int64)

    def expr_cond_pair(self, value: Any, condition: Any) -> Any:
        return value, condition

    def piecewise(self, *pairs: Any) -> Any:
        result = pairs[-1][0]
        for value, condition in reversed(pairs[:-1]):
            result = select(self.ctx, condition, value, result)
        return result

    def __getattr__(self, name: str) -> Any:
        refuse(f"the arithmetic '{name}' on a dynamic size has no TensorRT shape layers")
