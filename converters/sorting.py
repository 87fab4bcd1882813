import math

from torch2rt.converters.cumulative import running_sum

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    concat,
    converter,
    dims,
    dtype_of,
    equal,
    expand,
    floor_div,
    gather,
    greater,
    iota,
    is_symbolic,
    largest,
    less,
    logical_and,
    logical_or,
    minimum,
    mul,
    narrow,
    permute,
    proven,
    reduce,
    require,
    reshape,
    same_size,
    select,
    shape_tensor,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

Op, Reduce, Unary = trt.TopKOperation, trt.ReduceOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten
LIMIT = 3840  # elements that TensorRT's TopK orders
BLOCKS = 256
MOST = torch.finfo(torch.float32).max
ALL = f"{BLOCKS * LIMIT} elements in order"


def lifted(ctx: Context, x, dim):
    """A value with two dimensions at least, and in a type that TensorRT can order; with the place of `dim`."""
    if not dtype_of(x).is_floating_point:
        x = cast(ctx, x, wide(dtype_of(x)))
    sizes = dims(ctx, x)
    unit = (1,) * (2 - len(sizes))
    return reshape(ctx, x, unit + sizes), wrap_dim(dim, len(sizes)) + (1 if unit else 0)


def top(ctx: Context, x, k, dim, descending):
    """`k` extremes, the furthest first, and their places; a NaN is above everything, as torch has it.

    TensorRT leaves open where a NaN goes, so it becomes an infinity. Which of the infinities it was is told by the
    next larger finite number, where float32 has more numbers than the input's type; else by a second selection.
    """
    dtype = dtype_of(x)
    if not dtype.is_floating_point:
        return extremes(ctx, x, k, dim, descending)
    missing = unary(ctx, Unary.ISNAN, x)
    if dtype is not torch.float32:
        y = minimum(ctx, cast(ctx, x, torch.float32), MOST)
        value, place = extremes(ctx, select(ctx, missing, math.inf, y, torch.float32), k, dim, descending)
        known = select(ctx, equal(ctx, value, MOST), math.inf, value, torch.float32)
        return cast(ctx, select(ctx, is_infinite(ctx, value), math.nan, known, torch.float32), dtype), place
    x = select(ctx, missing, math.inf, x, dtype)
    value, place = extremes(ctx, x, k, dim, descending)
    kind = add(ctx, cast(ctx, is_infinite(ctx, x), dtype), cast(ctx, missing, dtype))
    kind, instead = extremes(ctx, kind, k, dim, descending)
    place = select(ctx, is_infinite(ctx, value), instead, place, dtype_of(place))
    return select(ctx, greater(ctx, kind, 1.5), math.nan, value, dtype), place


def is_infinite(ctx: Context, x):
    return equal(ctx, x, math.inf)


def extremes(ctx: Context, x, k, dim, descending):
    """One TopK layer, which leaves open where a NaN goes and which of equal elements comes first."""
    layer = ctx.network.add_topk(x, Op.MAX if descending else Op.MIN, 1 if is_symbolic(k) else k, 1 << dim)
    if is_symbolic(k):
        layer.set_input(1, reshape(ctx, cast(ctx, shape_tensor(ctx, [k]), torch.int32), ()))
    sizes = tuple(k if d == dim else n for d, n in enumerate(dims(ctx, x)))
    return tuple(ctx.track(layer.get_output(i), sizes) for i in range(2))


# In order, however many ----------------------------------------------------------------------------------------------


def arranged(ctx: Context, x, dim, descending):
    """All elements in order, equal ones as they came, and their places.

    One TopK layer orders `LIMIT` elements. More of them are ordered in blocks, and then by a sorting network whose
    elements are these blocks: where two meet, one keeps the lower half of both and the other the upper half. That takes
    no more memory than a few copies of the input.
    """
    n, size = dims(ctx, x)[dim], largest(ctx, dims(ctx, x)[dim])
    if size <= 1:
        return extremes(ctx, x, n, dim, descending)
    count = max(1, -(-size // LIMIT))
    check(count <= BLOCKS, f"{BLOCKS * LIMIT} elements at most are put in order, here up to {size}")
    length = -(-size // count)
    total = count * length
    order, back = [d for d in range(len(dims(ctx, x))) if d != dim], [*range(len(dims(ctx, x)) - 1)]
    x = permute(ctx, x, [*order, dim])
    rows = dims(ctx, x)[:-1]
    split = lambda v: reshape(ctx, v, (math.prod(rows), count, length))  # noqa: E731
    key, place = split(_keys(ctx, x, total, descending)), split(_tickets(ctx, x, total, descending))
    key, place = _in_block(ctx, key, place, total)
    for pairs in rounds(count):
        key, place = _meet(ctx, key, place, pairs, total)
    back.insert(dim, len(back))
    kept = lambda v: permute(ctx, narrow(ctx, reshape(ctx, v, (*rows, total)), -1, 0, n), back)  # noqa: E731
    key, place = kept(key), kept(place)
    turn = floor_div(ctx, place, total)
    place = sub(ctx, place, mul(ctx, turn, total))
    value = _reversed(ctx, key) if descending else key
    if dtype_of(x).is_floating_point:
        missing = equal(ctx, turn, 0 if descending else 2)
        value = select(ctx, missing, math.nan, value, dtype_of(value))
    return cast(ctx, value, dtype_of(x)), place


def _reversed(ctx: Context, x):
    """Numbers in the reversed order, without an overflow."""
    if dtype_of(x).is_floating_point:
        return unary(ctx, Unary.NEG, x)
    return sub(ctx, -1, x, dtype_of(x))


def _keys(ctx: Context, x, total, descending):
    """What to order by, from the lowest up, filled up to a length with the highest there is."""
    dtype = wide(dtype_of(x))
    key = cast(ctx, x, dtype)
    key = _reversed(ctx, key) if descending else key
    most = math.inf if dtype.is_floating_point else torch.iinfo(dtype).max
    if dtype.is_floating_point:
        key = select(ctx, unary(ctx, Unary.ISNAN, x), -most if descending else most, key, dtype)
    return _filled(ctx, key, total, most)


def _filled(ctx: Context, x, total, fill):
    sizes = dims(ctx, x)
    if same_size(sizes[-1], total):
        return x
    return slice_nd(ctx, x, [0] * len(sizes), (*sizes[:-1], total), [1] * len(sizes), trt.SampleMode.FILL, fill)


def _tickets(ctx: Context, x, total, descending):
    """What decides between equal keys: the place, after one turn of all places; a NaN's is a turn off, a filling's two.

    So a NaN comes after an infinity, or when descending before it, and a filling at the very end.
    """
    sizes = dims(ctx, x)
    dtype = torch.int32 if 4 * total * LIMIT < 2**31 else torch.int64
    place = torch.arange(total, dtype=dtype) + total
    if dtype_of(x).is_floating_point:
        turn = cast(ctx, unary(ctx, Unary.ISNAN, x), dtype)
        turn = _filled(ctx, mul(ctx, turn, -1 if descending else 1, dtype), total, 2)
        return add(ctx, mul(ctx, turn, total, dtype), place, dtype)
    beyond = less(ctx, torch.arange(total), sizes[-1])
    place = add(ctx, place, select(ctx, beyond, 0, 2 * total, dtype), dtype)
    return expand(ctx, place, (*sizes[:-1], total))


def _in_block(ctx: Context, key, place, total):
    """Each row of blocks in order, each block for itself: by its keys, then its runs of equal keys by their places."""
    size = dims(ctx, key)[-1]
    key, order = extremes(ctx, key, size, 2, False)
    place = gather(ctx, place, order, 2, each=True)
    later = greater(ctx, narrow(ctx, key, 2, 1, size - 1), narrow(ctx, key, 2, 0, size - 1))
    later = cast(ctx, later, torch.int32)
    later = slice_nd(ctx, later, [0, 0, -1], dims(ctx, key), [1, 1, 1], trt.SampleMode.FILL, 0)
    dtype = dtype_of(place)
    run = mul(ctx, cast(ctx, running_sum(ctx, later, 2), dtype), 4 * total, dtype)
    ticket, _ = extremes(ctx, add(ctx, run, place), size, 2, False)
    return key, sub(ctx, ticket, run)


def _meet(ctx: Context, key, place, pairs, total):
    """Blocks that meet in pairs: the one in front keeps the lower half of both."""
    low, high = torch.tensor(pairs).T
    others = [b for b in range(dims(ctx, key)[1]) if b not in {*low.tolist(), *high.tolist()}]
    size = dims(ctx, key)[-1]
    backwards = torch.arange(size - 1, -1, -1)
    (a, p), (b, q) = ([gather(ctx, v, side, 1) for v in (key, place)] for side in (low, high))
    b, q = (gather(ctx, v, backwards, 2) for v in (b, q))
    after = logical_or(ctx, greater(ctx, a, b), logical_and(ctx, equal(ctx, a, b), greater(ctx, p, q)))
    pick = lambda x, y: select(ctx, after, x, y, dtype_of(x))  # noqa: E731
    keys, places = (concat(ctx, [pick(y, x), pick(x, y)], 1) for x, y in ((a, b), (p, q)))
    met = _in_block(ctx, keys, places, total)
    if others:
        met = [concat(ctx, [v, gather(ctx, old, torch.tensor(others), 1)], 1) for v, old in zip(met, (key, place))]
    back = torch.tensor([*low.tolist(), *high.tolist(), *others]).argsort()
    return [gather(ctx, v, back, 1) for v in met]


def rounds(count):
    """Batcher's odd-even merge sort for so many elements: which of them meet in each round."""
    result, p = [], 1
    while p < count:
        k = p
        while k:
            met = [
                (i + j, i + j + k)
                for j in range(k % p, count - k, 2 * k)
                for i in range(min(k, count - j - k))
                if (i + j) // (2 * p) == (i + j + k) // (2 * p)
            ]
            result += [met] if met else []
            k //= 2
        p *= 2
    return result


def recorded(ctx: Context, x, out):
    return cast(ctx, reshape(ctx, x, out.shape), out.dtype)


def both(ctx: Context, pair):
    return tuple(recorded(ctx, x, out) for x, out in zip(pair, ctx.out, strict=True))


@converter(torch.topk, Tensor.topk, limits=ALL)
def topk(ctx: Context, input, k, dim=-1, largest=True, sorted=True):
    x, dim = lifted(ctx, input, dim)
    return both(ctx, first(ctx, x, k, dim, largest))


def first(ctx: Context, x, k, dim, descending, stable=False):
    """The first `k` elements in order, and their places."""
    if proven(ctx, k <= LIMIT) and not stable:
        return top(ctx, x, k, dim, descending)
    return tuple(narrow(ctx, side, dim, 0, k) for side in arranged(ctx, x, dim, descending))


def ordered(ctx: Context, input, dim, descending, stable):
    x, dim = lifted(ctx, input, dim)
    return first(ctx, x, dims(ctx, x)[dim], dim, descending, stable)


@converter(torch.sort, Tensor.sort, limits=ALL)
def sort(ctx: Context, input, dim=-1, descending=False, stable=False):
    return both(ctx, ordered(ctx, input, dim, descending, stable))


@converter(aten.sort.stable, limits=ALL)
def sort_stable(ctx: Context, input, *, stable=False, dim=-1, descending=False):
    return sort(ctx, input, dim, descending, stable)


@converter(torch.argsort, Tensor.argsort, limits=ALL)
def argsort(ctx: Context, input, dim=-1, descending=False, stable=False):
    return recorded(ctx, ordered(ctx, input, dim, descending, stable)[1], ctx.out)


@converter(aten.argsort.stable, limits=ALL)
def argsort_stable(ctx: Context, input, *, stable, dim=-1, descending=False):
    return argsort(ctx, input, dim, descending, stable)


@converter(torch.msort, Tensor.msort, limits=ALL)
def msort(ctx: Context, input):
    return recorded(ctx, ordered(ctx, input, 0, False, False)[0], ctx.out)


def smallest(ctx: Context, x, k, dim):
    """The k-th smallest element, from whichever end is known to be nearer, and its place."""
    n = dims(ctx, x)[dim]
    from_above = not is_symbolic(n) and not is_symbolic(k) and n - k + 1 < k <= n
    if from_above:
        k = n - k + 1
    return tuple(narrow(ctx, side, dim, k - 1, 1) for side in first(ctx, x, k, dim, from_above))


@converter(torch.kthvalue, Tensor.kthvalue, limits=ALL)
def kthvalue(ctx: Context, input, k, dim=-1, keepdim=False):
    x, dim = lifted(ctx, input, dim)
    return both(ctx, smallest(ctx, x, k, dim))


@converter(torch.median, Tensor.median, limits=ALL)
def median(ctx: Context, input, dim=None, keepdim=False):
    """The lower one of two; the first NaN, if there is one."""
    if dim is None:
        input, dim = reshape(ctx, input, [math.prod(dims(ctx, input))]), 0
    x, dim = lifted(ctx, input, dim)
    sizes = dims(ctx, x)
    require(ctx, sizes[dim] > 0, "there is no median of nothing", at_calls=True)
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
