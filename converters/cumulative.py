import math

from torch2rt.vocabulary import (
    Context,
    activation,
    add,
    cast,
    check,
    constant,
    converter,
    dims,
    elementwise,
    equal,
    has_cumulative,
    iota,
    logical_or,
    maximum,
    mul,
    proven,
    reshape,
    select,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

EW, Kind, Unary = trt.ElementWiseOperation, trt.ActivationType, trt.UnaryOperation
Tensor = torch.Tensor


def scan(ctx: Context, x, dim, combine, neutral):
    """Each element combined with all before it.

    In rounds: each meets the result 1, 2, 4 ... places before, or what changes nothing where there is none.
    """
    sizes = dims(ctx, x)
    step = 1
    while not proven(ctx, sizes[dim] <= step):
        start = [-step if d == dim else 0 for d in range(len(sizes))]
        before = slice_nd(ctx, x, start, sizes, [1] * len(sizes), trt.SampleMode.FILL, neutral)
        x = combine(before, x)
        step *= 2
    return x


def operand(ctx: Context, input, dtype, dim):
    """The input with a dimension at least, and which one is meant."""
    x = cast(ctx, input, dtype)
    x = x if dims(ctx, x) else reshape(ctx, x, (1,))
    return x, wrap_dim(dim, len(dims(ctx, x)))


def recorded(ctx: Context, x, out):
    return cast(ctx, reshape(ctx, x, out.shape), out.dtype)


@converter(torch.cumsum, Tensor.cumsum, limits="not in int8 and uint8")
def cumsum(ctx: Context, input, dim, *, dtype=None):
    """One layer where this TensorRT has it; half precision accumulates in float32, as in torch."""
    check(ctx.out.dtype not in (torch.int8, torch.uint8), f"TensorRT has no arithmetic on {ctx.out.dtype}")
    x, dim = operand(ctx, cast(ctx, input, ctx.out.dtype), wide(ctx.out.dtype), dim)
    return recorded(ctx, running_sum(ctx, x, dim), ctx.out)


def running_sum(ctx: Context, x, dim):
    if not has_cumulative():
        return scan(ctx, x, dim, lambda a, b: add(ctx, a, b), 0)
    layer = ctx.network.add_cumulative(x, constant(ctx, dim, torch.int32), trt.CumulativeOperation.SUM, False, False)
    return ctx.track(layer.get_output(0), dims(ctx, x))


@converter(torch.cumprod, Tensor.cumprod, limits="not in int8 and uint8")
def cumprod(ctx: Context, input, dim, *, dtype=None):
    check(ctx.out.dtype not in (torch.int8, torch.uint8), f"TensorRT has no arithmetic on {ctx.out.dtype}")
    x, dim = operand(ctx, cast(ctx, input, ctx.out.dtype), wide(ctx.out.dtype), dim)
    return recorded(ctx, scan(ctx, x, dim, lambda a, b: mul(ctx, a, b), 1), ctx.out)


def running_extreme(ctx: Context, op, input, dim):
    """The extreme so far, and its latest place: the largest position that has held it. A NaN stays the extreme."""
    dtype = ctx.out[0].dtype
    if dtype.is_floating_point:
        worst = -math.inf if op == EW.MAX else math.inf
    else:
        dtype = wide(dtype)
        worst = torch.iinfo(dtype).min if op == EW.MAX else torch.iinfo(dtype).max
    x, dim = operand(ctx, input, dtype, dim)
    best = scan(ctx, x, dim, lambda a, b: elementwise(ctx, op, a, b), worst)
    sizes = dims(ctx, x)
    positions = reshape(ctx, iota(ctx, sizes[dim]), [n if d == dim else 1 for d, n in enumerate(sizes)])
    holds = equal(ctx, x, best)
    if dtype.is_floating_point:
        holds = logical_or(ctx, holds, unary(ctx, Unary.ISNAN, x))
    held = select(ctx, holds, positions, 0, torch.int64)
    places = scan(ctx, held, dim, lambda a, b: maximum(ctx, a, b), 0)
    return recorded(ctx, best, ctx.out[0]), recorded(ctx, places, ctx.out[1])


@converter(torch.cummax, Tensor.cummax)
def cummax(ctx: Context, input, dim):
    return running_extreme(ctx, EW.MAX, input, dim)


@converter(torch.cummin, Tensor.cummin)
def cummin(ctx: Context, input, dim):
    return running_extreme(ctx, EW.MIN, input, dim)


# Logarithms of sums of exponentials ----------------------------------------------------------------------------------


def log_add_exp(ctx: Context, a, b):
    """max(a, b) + log(1 + exp(-|a - b|)); equal values are told apart, as infinities have no difference."""
    distance = unary(ctx, Unary.ABS, sub(ctx, a, b))
    tail = activation(ctx, Kind.SOFTPLUS, unary(ctx, Unary.NEG, distance), alpha=1.0, beta=1.0)
    x = add(ctx, maximum(ctx, a, b), tail)
    return select(ctx, equal(ctx, a, b), add(ctx, a, math.log(2)), x)


@converter(torch.logaddexp, Tensor.logaddexp)
def logaddexp(ctx: Context, input, other):
    a, b = (cast(ctx, x, wide(ctx.out.dtype)) for x in (input, other))
    return cast(ctx, log_add_exp(ctx, a, b), ctx.out.dtype)


@converter(torch.logcumsumexp, Tensor.logcumsumexp)
def logcumsumexp(ctx: Context, input, dim):
    x, dim = operand(ctx, input, wide(ctx.out.dtype), dim)
    return recorded(ctx, scan(ctx, x, dim, lambda a, b: log_add_exp(ctx, a, b), -math.inf), ctx.out)
