import math

from torch2rt.vocabulary import (
    Context,
    add,
    axes,
    cast,
    check,
    composite,
    converter,
    dims,
    div,
    dtype_of,
    elementwise,
    equal,
    greater,
    iota,
    less,
    mul,
    proven,
    reduce,
    reshape,
    select,
    sub,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

EW, Reduce, Unary = trt.ElementWiseOperation, trt.ReduceOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten


# Sums and the like ---------------------------------------------------------------------------------------------------


def accumulated(ctx: Context, op, input, dim, keepdim):
    """One reduce layer in the recorded dtype; half precision accumulates in float32, as in torch."""
    dtype = ctx.out.dtype
    check(dtype not in (torch.int8, torch.uint8), f"TensorRT has no arithmetic on {dtype}; use dtype=torch.int32")
    x = cast(ctx, cast(ctx, input, dtype), wide(dtype))
    return cast(ctx, reduce(ctx, op, x, dim, keepdim), dtype)


@converter(torch.sum, Tensor.sum)
def sum_op(ctx: Context, input, dim=None, keepdim=False, *, dtype=None):
    return accumulated(ctx, Reduce.SUM, input, dim, keepdim)


@converter(torch.mean, Tensor.mean)
def mean(ctx: Context, input, dim=None, keepdim=False, *, dtype=None):
    return accumulated(ctx, Reduce.AVG, input, dim, keepdim)


@converter(torch.prod, Tensor.prod)
def prod(ctx: Context, input, dim=None, keepdim=False, *, dtype=None):
    return accumulated(ctx, Reduce.PROD, input, dim, keepdim)


@converter(torch.nansum, Tensor.nansum)
def nansum(ctx: Context, input, dim=None, keepdim=False, *, dtype=None):
    if ctx.out.dtype.is_floating_point:
        x = cast(ctx, input, ctx.out.dtype)
        input = select(ctx, unary(ctx, Unary.ISNAN, x), 0.0, x)
    return accumulated(ctx, Reduce.SUM, input, dim, keepdim)


@converter(torch.count_nonzero, Tensor.count_nonzero)
def count_nonzero(ctx: Context, input, dim=None):
    return reduce(ctx, Reduce.SUM, cast(ctx, cast(ctx, input, torch.bool), torch.int64), dim)


# Truth ---------------------------------------------------------------------------------------------------------------


@converter(torch.any, Tensor.any)
def any_op(ctx: Context, input, dim=None, keepdim=False):
    return agreed(ctx, Reduce.MAX, input, dim, keepdim)


@converter(torch.all, Tensor.all)
def all_op(ctx: Context, input, dim=None, keepdim=False):
    return agreed(ctx, Reduce.MIN, input, dim, keepdim)


def agreed(ctx: Context, op, input, dim, keepdim):
    """TensorRT reduces no bools: as integers, any is the largest and all the smallest. No dimensions mean none here.

    Of no elements, the largest is the lowest integer and the smallest the highest.
    """
    x = cast(ctx, input, torch.bool)
    if dim not in ((), []):
        x = greater(ctx, reduce(ctx, op, cast(ctx, x, torch.int32), dim, keepdim), 0)
    return cast(ctx, x, ctx.out.dtype)


# Extremes ------------------------------------------------------------------------------------------------------------


def comparable(ctx: Context, x):
    """Bytes and bools as integers, which TensorRT can order."""
    return x if dtype_of(x).is_floating_point else cast(ctx, x, wide(dtype_of(x)))


def extreme(ctx: Context, op, input, dim, keepdim):
    return cast(ctx, reduce(ctx, op, comparable(ctx, input), dim, keepdim), ctx.out.dtype)


def extreme_and_place(ctx: Context, op, input, dim):
    """The extreme along one dimension, which is kept, and where it stands first.

    TopK leaves open which of equal elements it takes; torch takes the first, and that of a NaN before all others, which
    TensorRT's reduce layer may pass over: its positions count from the end, so that they are negative.
    """
    x = comparable(ctx, input)
    x = x if dims(ctx, x) else reshape(ctx, x, (1,))
    sizes = dims(ctx, x)
    dim = wrap_dim(dim, len(sizes))
    best = reduce(ctx, op, x, dim, keepdim=True, keep_nan=False)
    count, along = iota(ctx, sizes[dim]), [n if d == dim else 1 for d, n in enumerate(sizes)]
    positions = reshape(ctx, count, along)
    candidates = select(ctx, equal(ctx, x, best), positions, sizes[dim] - 1, torch.int64)
    if not dtype_of(x).is_floating_point:
        return best, reduce(ctx, Reduce.MIN, candidates, dim, keepdim=True)
    static = isinstance(count, Tensor)
    from_end = reshape(ctx, count - sizes[dim] if static else sub(ctx, count, sizes[dim]), along)
    candidates = select(ctx, unary(ctx, Unary.ISNAN, x), from_end, candidates)
    place = reduce(ctx, Reduce.MIN, candidates, dim, keepdim=True)
    nan = less(ctx, place, 0)
    place = select(ctx, nan, add(ctx, place, sizes[dim]), place)
    return select(ctx, nan, math.nan, best), place


def extreme_call(ctx: Context, op, pairwise, input, dim, keepdim, other):
    """The three calls that `torch.max` and `torch.min` stand for."""
    other = dim if isinstance(dim, (Tensor, trt.ITensor)) else other
    if other is not None:
        dtype = ctx.out.dtype
        common = wide(dtype) if dtype in (torch.int8, torch.uint8) else dtype
        return cast(ctx, elementwise(ctx, pairwise, input, other, common), dtype)
    if dim is None:
        return extreme(ctx, op, input, None, False)
    value, place = extreme_and_place(ctx, op, input, dim)
    return recorded(ctx, value, ctx.out[0]), recorded(ctx, place, ctx.out[1])


@converter(torch.max, Tensor.max)
def max_op(ctx: Context, input, dim=None, keepdim=False, *, other=None):
    return extreme_call(ctx, Reduce.MAX, EW.MAX, input, dim, keepdim, other)


@converter(torch.min, Tensor.min)
def min_op(ctx: Context, input, dim=None, keepdim=False, *, other=None):
    return extreme_call(ctx, Reduce.MIN, EW.MIN, input, dim, keepdim, other)


@converter(torch.amax, Tensor.amax)
def amax(ctx: Context, input, dim=(), keepdim=False):
    return extreme(ctx, Reduce.MAX, input, dim, keepdim)


@converter(torch.amin, Tensor.amin)
def amin(ctx: Context, input, dim=(), keepdim=False):
    return extreme(ctx, Reduce.MIN, input, dim, keepdim)


@converter(torch.aminmax, Tensor.aminmax)
def aminmax(ctx: Context, input, *, dim=None, keepdim=False):
    x, dtype = comparable(ctx, input), ctx.out[0].dtype
    return tuple(cast(ctx, reduce(ctx, op, x, dim, keepdim), dtype) for op in (Reduce.MIN, Reduce.MAX))


@converter(torch.argmax, Tensor.argmax)
def argmax(ctx: Context, input, dim=None, keepdim=False):
    return place_call(ctx, Reduce.MAX, input, dim)


@converter(torch.argmin, Tensor.argmin)
def argmin(ctx: Context, input, dim=None, keepdim=False):
    return place_call(ctx, Reduce.MIN, input, dim)


def place_call(ctx: Context, op, input, dim):
    if dim is None:
        input, dim = reshape(ctx, input, [math.prod(dims(ctx, input))]), 0
    return reshape(ctx, extreme_and_place(ctx, op, input, dim)[1], ctx.out.shape)


# Spread --------------------------------------------------------------------------------------------------------------


def spread(ctx: Context, input, dim, unbiased, correction):
    """Variance and mean with all dimensions kept, from the deviations, in float32 for half precision."""
    if isinstance(dim, bool):  # var(unbiased) is a signature of its own
        dim, unbiased = None, dim
    if correction is None:
        correction = 0 if unbiased is False else 1
    x = cast(ctx, input, wide((ctx.out if isinstance(ctx.out, Tensor) else ctx.out[0]).dtype))
    mean = reduce(ctx, Reduce.AVG, x, dim, keepdim=True)
    deviation = sub(ctx, x, mean)
    squares = mul(ctx, deviation, deviation)
    if correction == 0:
        return reduce(ctx, Reduce.AVG, squares, dim, keepdim=True), mean
    sizes = dims(ctx, x)
    freedom = math.prod(n for d, n in enumerate(sizes) if axes(dim, len(sizes)) >> d & 1) - correction
    freedom = freedom if proven(ctx, freedom >= 0) else torch.sym_max(freedom, 0)
    return div(ctx, reduce(ctx, Reduce.SUM, squares, dim, keepdim=True), freedom), mean


def recorded(ctx: Context, x, out):
    return cast(ctx, reshape(ctx, x, out.shape), out.dtype)


@converter(torch.var, Tensor.var)
def var(ctx: Context, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    return recorded(ctx, spread(ctx, input, dim, unbiased, correction)[0], ctx.out)


@converter(torch.std, Tensor.std)
def std(ctx: Context, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    return recorded(ctx, unary(ctx, Unary.SQRT, spread(ctx, input, dim, unbiased, correction)[0]), ctx.out)


@converter(torch.var_mean)
def var_mean(ctx: Context, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    variance, mean = spread(ctx, input, dim, unbiased, correction)
    return recorded(ctx, variance, ctx.out[0]), recorded(ctx, mean, ctx.out[1])


@converter(torch.std_mean)
def std_mean(ctx: Context, input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    variance, mean = spread(ctx, input, dim, unbiased, correction)
    return recorded(ctx, unary(ctx, Unary.SQRT, variance), ctx.out[0]), recorded(ctx, mean, ctx.out[1])


# Norms ---------------------------------------------------------------------------------------------------------------


@converter(torch.linalg.vector_norm, aten.linalg_vector_norm)
def vector_norm(ctx: Context, input, ord=2, dim=None, keepdim=False, *, dtype=None):
    x = cast(ctx, input if dtype is None else cast(ctx, input, dtype), wide(ctx.out.dtype))
    return cast(ctx, norm_of(ctx, x, ord, dim, keepdim), ctx.out.dtype)


def norm_of(ctx: Context, x, ord, dim, keepdim):
    """Powers, their sum, its root."""
    size = unary(ctx, Unary.ABS, x)
    if abs(ord) == math.inf:
        return reduce(ctx, Reduce.MAX if ord > 0 else Reduce.MIN, size, dim, keepdim)
    if ord == 0:
        there = unary(ctx, Unary.NOT, equal(ctx, x, 0))
        return reduce(ctx, Reduce.SUM, cast(ctx, there, dtype_of(x)), dim, keepdim)
    if ord == 1:
        return reduce(ctx, Reduce.SUM, size, dim, keepdim)
    if ord == 2:
        return unary(ctx, Unary.SQRT, reduce(ctx, Reduce.SUM, mul(ctx, x, x), dim, keepdim))
    total = reduce(ctx, Reduce.SUM, elementwise(ctx, EW.POW, size, float(ord)), dim, keepdim)
    return elementwise(ctx, EW.POW, total, 1 / ord)


@composite(torch.linalg.norm)
def norm(input, ord=None, dim=None, keepdim=False, *, dtype=None):
    vector = ord is None or isinstance(dim, int) or len(range(input.dim()) if dim is None else dim) == 1
    if vector:
        return torch.linalg.vector_norm(input, 2 if ord is None else ord, dim, keepdim, dtype=dtype)
    return torch.linalg.matrix_norm(input, ord, (0, 1) if dim is None else dim, keepdim, dtype=dtype)


@composite(torch.linalg.matrix_norm)
def matrix_norm(input, ord="fro", dim=(-2, -1), keepdim=False, *, dtype=None):
    """The largest or smallest sum of a column (1) or a row (inf); torch's own body would make dynamic sizes static."""
    if ord == "fro":
        return torch.linalg.vector_norm(input, 2, dim, keepdim, dtype=dtype)
    check(ord in (1, -1, math.inf, -math.inf), f"{ord=} needs singular values, which TensorRT has no layer for")
    summed, chosen = dim if abs(ord) == 1 else reversed(dim)
    sums = torch.linalg.vector_norm(input, 1, summed, True, dtype=dtype)
    x = sums.amax(chosen, True) if ord > 0 else sums.amin(chosen, True)
    return x if keepdim else x.squeeze(tuple(dim))
