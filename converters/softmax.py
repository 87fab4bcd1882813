from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    converter,
    dims,
    equal,
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

Reduce, Unary = trt.ReduceOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten


def normalized(ctx: Context, x, dim):
    """One softmax layer, which takes two dimensions or more."""
    sizes = dims(ctx, x)
    at_least_2d = (1,) * (2 - len(sizes)) + sizes
    layer = ctx.network.add_softmax(reshape(ctx, x, at_least_2d))
    layer.axes = 1 << (wrap_dim(dim, len(sizes)) + len(at_least_2d) - max(len(sizes), 1))
    return reshape(ctx, ctx.track(layer.get_output(0), at_least_2d), sizes)


@converter(torch.softmax, Tensor.softmax, torch.special.softmax)
def softmax(ctx: Context, input, dim, dtype=None):
    return normalized(ctx, cast(ctx, input, ctx.out.dtype), dim)


@converter(aten._softmax)
def aten_softmax(ctx: Context, input, dim, half_to_float):
    return normalized(ctx, cast(ctx, input, ctx.out.dtype), dim)


@converter(aten._safe_softmax)
def safe_softmax(ctx: Context, input, dim, dtype=None):
    """A row of -inf gives zeros."""
    x = cast(ctx, input, ctx.out.dtype)
    empty = equal(ctx, reduce(ctx, Reduce.MAX, x, dim, keepdim=True), float("-inf"))
    return select(ctx, empty, 0.0, normalized(ctx, x, dim))


@converter(torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
def log_softmax(ctx: Context, input, dim, dtype=None):
    """The logarithm of a softmax layer would be -inf where float underflows, so the logarithm is taken of the sum."""
    x = cast(ctx, cast(ctx, input, ctx.out.dtype), wide(ctx.out.dtype))
    x = sub(ctx, x, reduce(ctx, Reduce.MAX, x, dim, keepdim=True, keep_nan=False))  # the sum keeps it
    total = reduce(ctx, Reduce.SUM, unary(ctx, Unary.EXP, x), dim, keepdim=True)
    return cast(ctx, sub(ctx, x, unary(ctx, Unary.LOG, total)), ctx.out.dtype)


@converter(aten._log_softmax)
def aten_log_softmax(ctx: Context, input, dim, half_to_float):
    return log_softmax(ctx, input, dim)


@converter(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
def logsumexp(ctx: Context, input, dim, keepdim=False):
    """Less the largest value, unless that is infinite."""
    x = cast(ctx, input, wide(ctx.out.dtype))
    largest = reduce(ctx, Reduce.MAX, x, dim, keepdim=True, keep_nan=False)  # the sum keeps it
    shift = select(ctx, unary(ctx, Unary.ISINF, largest), 0.0, largest)
    exponentials = unary(ctx, Unary.EXP, sub(ctx, x, shift))
    total = unary(ctx, Unary.LOG, reduce(ctx, Reduce.SUM, exponentials, dim, keepdim=True))
    result = cast(ctx, add(ctx, total, shift), ctx.out.dtype)
    return reshape(ctx, result, ctx.out.shape)
