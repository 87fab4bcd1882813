import math

from torch2rt.vocabulary import (
    cast,
    check,
    converter,
    dims,
    dtype_of,
    is_symbolic,
    proven,
    reshape,
    shape_tensor,
    slice_nd,
    torch,
    trt,
    wide,
    wrap_dim,
)

Op = trt.TopKOperation
Tensor = torch.Tensor
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


@converter(torch.sort, Tensor.sort, limits=f"{LIMIT} elements, not stable")
def sort(ctx, input, dim=-1, descending=False, stable=False):
    return both(ctx, ordered(ctx, input, dim, descending, stable))


@converter(torch.argsort, Tensor.argsort, limits=f"{LIMIT} elements, not stable")
def argsort(ctx, input, dim=-1, descending=False, stable=False):
    return recorded(ctx, ordered(ctx, input, dim, descending, stable)[1], ctx.out)


@converter(torch.msort, Tensor.msort, limits=f"{LIMIT} elements")
def msort(ctx, input):
    return recorded(ctx, ordered(ctx, input, 0, False, False)[0], ctx.out)


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
    """The lower one of two. A NaN does not take over the result."""
    if dim is None:
        input, dim = reshape(ctx, input, [math.prod(dims(ctx, input))]), 0
    x, dim = lifted(ctx, input, dim)
    pair = smallest(ctx, x, (dims(ctx, x)[dim] - 1) // 2 + 1, dim)
    return recorded(ctx, pair[0], ctx.out) if isinstance(ctx.out, Tensor) else both(ctx, pair)
