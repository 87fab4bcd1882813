import math

from torch2rt.vocabulary import (
    cast,
    check,
    composite,
    converter,
    dims,
    dtype_of,
    iota,
    is_symbolic,
    proven,
    reduce,
    reshape,
    select,
    shape_tensor,
    slice_nd,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

Op, Reduce, Unary = trt.TopKOperation, trt.ReduceOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten
LIMIT = 3840


def lifted(ctx, x, dim):
    """A value with two dimensions at least, and in a type that TensorRT can order; with the place of `dim`."""
    if not dtype_of(x).is_floating_point:
        x = cast(ctx, x, wide(dtype_of(x)))
    sizes = dims(ctx, x)
    unit = (1,) * (2 - len(sizes))
    return reshape(ctx, x, unit + sizes), wrap_dim(dim, len(sizes)) + (1 if unit else 0)


def top(ctx, x, k, dim, largest):
    """One TopK layer: `k` extremes, the furthest first, and their places.

    TensorRT leaves open where a NaN goes and which of equal elements comes first, as torch does.
    """
    check(proven(ctx, k <= LIMIT), f"TensorRT orders {LIMIT} elements at most, here up to {k} are asked for")
    layer = ctx.network.add_topk(x, Op.MAX if largest else Op.MIN, 1 if is_symbolic(k) else k, 1 << dim)
    if is_symbolic(k):
        layer.set_input(1, reshape(ctx, cast(ctx, shape_tensor(ctx, [k]), torch.int32), ()))
    sizes = tuple(k if d == dim else n for d, n in enumerate(dims(ctx, x)))
    return tuple(ctx.track(layer.get_output(i), sizes) for i in range(2))


def recorded(ctx, x, out):
    return cast(ctx, reshape(ctx, x, out.shape), out.dtype)


def both(ctx, pair):
    return tuple(recorded(ctx, x, out) for x, out in zip(pair, ctx.out, strict=True))


@converter(torch.topk, Tensor.topk, limits=f"k up to {LIMIT}")
def topk(ctx, input, k, dim=-1, largest=True, sorted=True):
    x, dim = lifted(ctx, input, dim)
    return both(ctx, top(ctx, x, k, dim, largest))


def ordered(ctx, input, dim, descending, stable):
    check(not stable, "stable=True: TensorRT leaves the order of equal elements open")
    x, dim = lifted(ctx, input, dim)
    return top(ctx, x, dims(ctx, x)[dim], dim, descending)


@converter(torch.sort, Tensor.sort, limits=f"{LIMIT} elements")
def sort(ctx, input, dim=-1, descending=False, stable=False):
    return both(ctx, ordered(ctx, input, dim, descending, stable))


@converter(torch.argsort, Tensor.argsort, limits=f"{LIMIT} elements")
def argsort(ctx, input, dim=-1, descending=False, stable=False):
    return recorded(ctx, ordered(ctx, input, dim, descending, stable)[1], ctx.out)


@converter(torch.msort, Tensor.msort, limits=f"{LIMIT} elements")
def msort(ctx, input):
    return recorded(ctx, ordered(ctx, input, 0, False, False)[0], ctx.out)


@composite(torch.sort, Tensor.sort, aten.sort.stable)
def sort_in_order(input, dim=-1, descending=False, *, stable=False):
    """Of equal elements, which a sort brings together, a second sort orders the places."""
    n = input.shape[dim] if input.dim() else 1
    if not stable or not is_symbolic(n) and n > LIMIT:
        return NotImplemented
    values, places = torch.sort(input, dim, descending)
    if not is_symbolic(n) and n <= 1:
        return torch.return_types.sort((values, places))
    run = torch.cumsum(values != values.roll(1, dim), dim, dtype=torch.int32) * n
    key = torch.sort(run + places.int(), dim)[0]
    return torch.return_types.sort((values, (key - run).long()))


@composite(torch.argsort, Tensor.argsort, aten.argsort.stable)
def argsort_in_order(input, dim=-1, descending=False, *, stable=False):
    if not stable:
        return NotImplemented
    return torch.sort(input, dim=dim, descending=descending, stable=stable)[1]


def smallest(ctx, x, k, dim):
    """The k-th smallest element, from whichever end is known to be nearer, and its place."""
    n = dims(ctx, x)[dim]
    from_above = not is_symbolic(n) and not is_symbolic(k) and n - k + 1 < k
    k = n - k + 1 if from_above else k
    start, size = [0] * len(dims(ctx, x)), list(dims(ctx, x))
    start[dim], size[dim] = k - 1, 1
    pair = top(ctx, x, k, dim, from_above)
    return tuple(slice_nd(ctx, side, start, size, [1] * len(size)) for side in pair)


@converter(torch.kthvalue, Tensor.kthvalue, limits=f"k up to {LIMIT} from either end")
def kthvalue(ctx, input, k, dim=-1, keepdim=False):
    x, dim = lifted(ctx, input, dim)
    return both(ctx, smallest(ctx, x, k, dim))


@converter(torch.median, Tensor.median, limits=f"{2 * LIMIT} elements")
def median(ctx, input, dim=None, keepdim=False):
    """The lower one of two; the first NaN, if there is one."""
    if dim is None:
        input, dim = reshape(ctx, input, [math.prod(dims(ctx, input))]), 0
    x, dim = lifted(ctx, input, dim)
    sizes = dims(ctx, x)
    value, place = smallest(ctx, x, (sizes[dim] - 1) // 2 + 1, dim)
    single = isinstance(ctx.out, Tensor)
    if dtype_of(x).is_floating_point:
        missing = unary(ctx, Unary.ISNAN, x)
        spoilt = cast(ctx, reduce(ctx, Reduce.MAX, cast(ctx, missing, torch.int32), dim, True), torch.bool)
        value = select(ctx, spoilt, math.nan, value, dtype_of(x))
        if not single:
            positions = reshape(ctx, iota(ctx, sizes[dim]), [n if d == dim else 1 for d, n in enumerate(sizes)])
            first = reduce(ctx, Reduce.MIN, select(ctx, missing, positions, sizes[dim], torch.int64), dim, True)
            place = select(ctx, spoilt, first, place, torch.int64)
    return recorded(ctx, value, ctx.out) if single else both(ctx, (value, place))
