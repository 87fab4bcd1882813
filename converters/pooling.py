import functools
import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    composite,
    constant,
    converter,
    dims,
    div,
    dtype_of,
    equal,
    expand,
    floor_div,
    gather,
    iota,
    is_symbolic,
    largest,
    less,
    lift,
    maximum,
    minimum,
    mul,
    ntuple,
    reduce,
    require,
    reshape,
    rewrite,
    same_size,
    select,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    unlift,
    wide,
)

Reduce, Pool, Unary = trt.ReduceOperation, trt.PoolingType, trt.UnaryOperation
_nn, aten = torch._C._nn, torch.ops.aten

rewrite(
    "Its windows are drawn at random, and an engine draws no random numbers",
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
    _nn.fractional_max_pool2d,
    _nn.fractional_max_pool3d,
)


@composite(F.max_pool1d, torch.max_pool1d)
def max_pool1d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """As one over two dimensions; torch's own takes the length for static."""
    return F.max_pool2d(*_flat(input, kernel_size, stride, padding, dilation), ceil_mode).squeeze(-2)


@composite(F.max_pool1d_with_indices, torch.max_pool1d_with_indices)
def max_pool1d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True
):
    results = F.max_pool2d_with_indices(*_flat(input, kernel_size, stride, padding, dilation), ceil_mode)
    return tuple(result.squeeze(-2) for result in results)


def _flat(input, *window):
    return input.unsqueeze(-2), *((unit, *v) for v, unit in zip(_window(1, *window), (1, 1, 0, 1), strict=True))


def _register_max(n):
    @converter(getattr(F, f"max_pool{n}d"), getattr(torch, f"max_pool{n}d"))
    def max_pool(
        ctx: Context, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ):
        window = _window(n, kernel_size, stride, padding, dilation)
        return _max_pool(ctx, input, window, ceil_mode, ctx.out.shape)

    @converter(getattr(_nn, f"max_pool{n}d_with_indices"))
    def max_pool_with_indices(ctx: Context, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        window = _window(n, kernel_size, stride, padding, dilation)
        sizes, out = dims(ctx, input)[-n:], ctx.out[0].shape
        best = _max_pool(ctx, input, window, ceil_mode, out)
        if any(map(is_symbolic, sizes)):
            return best, None
        tables = [_taps(size, o, *w) for size, o, w in zip(sizes, out[-n:], zip(*window, strict=True), strict=True)]
        return best, _indices(ctx, input, tables, out)


def _register_average(n):
    @converter(getattr(F, f"avg_pool{n}d"), limits="floating point only")
    def avg_pool(
        ctx, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        check(dtype_of(input).is_floating_point, f"TensorRT does not average {dtype_of(input)}")
        window = _window(n, kernel_size, stride, padding)[:3]
        return _avg_pool(ctx, input, window, ceil_mode, count_include_pad, divisor_override)


def _register_adaptive(n):
    private = [getattr(aten, f"_adaptive_avg_pool{n}d")] if n > 1 else []

    @converter(getattr(torch if n == 1 else _nn, f"adaptive_avg_pool{n}d"), *private)
    def adaptive_avg_pool(ctx: Context, input, output_size):
        return cast(ctx, _adaptive(ctx, input, Reduce.AVG, ctx.out.shape, n), ctx.out.dtype)

    @converter(getattr(F, f"adaptive_max_pool{n}d"))
    def adaptive_max_pool(ctx: Context, input, output_size, return_indices=False):
        return _adaptive(ctx, input, Reduce.MAX, ctx.out.shape, n)

    @converter(getattr(torch if n == 1 else _nn, f"adaptive_max_pool{n}d"))
    def adaptive_max_pool_with_indices(ctx: Context, input, output_size):
        sizes, out = dims(ctx, input)[-n:], ctx.out[0].shape
        best = _adaptive(ctx, input, Reduce.MAX, out, n)
        if any(map(is_symbolic, (*sizes, *out[-n:]))):
            return best, None
        tables = [_adaptive_taps(size, o)[0] for size, o in zip(sizes, out[-n:], strict=True)]
        return best, _indices(ctx, input, tables, out)


for _n in (1, 2, 3):
    _register_average(_n)
    _register_adaptive(_n)
    if _n > 1:
        _register_max(_n)


@converter(_nn.max_unpool2d)
def max_unpool2d(ctx: Context, input, indices, output_size):
    """The values scattered over planes of zeros."""
    n = len(output_size)
    planes = dims(ctx, input)[:-n]
    zeros = expand(ctx, constant(ctx, 0, dtype_of(input)), (*planes, math.prod(output_size)))
    values, places = (reshape(ctx, x, (*planes, math.prod(dims(ctx, x)[-n:]))) for x in (input, indices))
    layer = ctx.network.add_scatter(zeros, places, values, trt.ScatterMode.ELEMENT)
    layer.axis = len(planes)
    return reshape(ctx, ctx.track(layer.get_output(0), dims(ctx, zeros)), ctx.out.shape)


@converter(_nn.max_unpool3d)
def max_unpool3d(ctx: Context, input, indices, output_size, stride, padding):
    return max_unpool2d(ctx, input, indices, output_size)


# Windows of one size --------------------------------------------------------------------------------------------------


def _window(n, kernel_size, stride, padding, dilation=1):
    """Sizes, strides, padding and dilation per dimension; torch's default stride is the size."""
    stride = stride if isinstance(stride, int) or stride else kernel_size
    return tuple(ntuple(v, n) for v in (kernel_size, stride, padding, dilation))


def _max_pool(ctx: Context, x, window, ceil_mode, sizes):
    """`ceil_mode` is TensorRT's ROUND_UP, unless a last window may start in the padding, which torch leaves out."""
    kernel, stride, padding, dilation = window
    n = len(kernel)
    _some(ctx, sizes[-n:])
    kernel = _no_larger(ctx, x, kernel, padding) if max(dilation) == 1 else kernel
    window = kernel, stride, padding, dilation
    if max(dilation) > 1 or not dtype_of(x).is_floating_point or ctx.nan == "keep":
        return _shifted_max(ctx, x, window, sizes[-n:])
    x = lift(ctx, x, n)
    if ceil_mode and any(s > k - p for k, s, p in zip(kernel, stride, padding, strict=True)):
        x = _reach(ctx, x, window, sizes[-n:], -math.inf)
        ceil_mode, padding = False, (0,) * n
    layer = _pool(ctx, Pool.MAX, x, kernel, stride, padding)
    if ceil_mode:
        layer.padding_mode = trt.PaddingMode.EXPLICIT_ROUND_UP
    return unlift(ctx, layer.get_output(0), n, sizes)


def _some(ctx: Context, sizes):
    """torch refuses a result without elements."""
    for size in sizes:
        require(ctx, size > 0, "the input is too small for the window", at_calls=True)


def _no_larger(ctx: Context, x, kernel, padding):
    """A window that hangs over everything, as `ceil_mode` allows, sees what one as large as the padded input does."""
    sizes = dims(ctx, x)[-len(kernel) :]
    return tuple(min(k, largest(ctx, size) + 2 * p) for size, k, p in zip(sizes, kernel, padding, strict=True))


def _pool(ctx: Context, kind, x, kernel, stride, padding):
    units = 2 - len(kernel)
    layer = ctx.network.add_pooling_nd(x, kind, (*[1] * units, *kernel))
    layer.stride_nd = (*[1] * units, *stride)
    layer.padding_nd = (*[0] * units, *padding)
    return layer


def _reach(ctx: Context, x, window, sizes, fill):
    """Exactly what the windows see, with a fill value where they reach over the edges."""
    kernel, stride, padding = window[:3]
    kept = dims(ctx, x)[: -len(kernel)]
    reach = [(size - 1) * s + k for size, s, k in zip(sizes, stride, kernel, strict=True)]
    start, steps = [*[0] * len(kept), *(-p for p in padding)], [1] * (len(kept) + len(kernel))
    return slice_nd(ctx, x, start, [*kept, *reach], steps, trt.SampleMode.FILL, fill)


def _shifted_max(ctx: Context, x, window, sizes):
    """The largest of slices, one for each place in the window: TensorRT pools no integers, passes over NaNs, and has no
    dilation.
    """
    dtype = dtype_of(x)
    x = x if dtype.is_floating_point else cast(ctx, x, wide(dtype))
    fill = -math.inf if dtype.is_floating_point else torch.iinfo(dtype_of(x)).min
    first = len(dims(ctx, x)) - len(sizes)
    for axis, (size, k, s, p, d) in enumerate(zip(sizes, *window, strict=True), first):
        parts = [_strided(ctx, x, axis, i * d - p, size, s, fill) for i in range(k)]
        x = functools.reduce(lambda a, b: maximum(ctx, a, b), parts)
    return cast(ctx, x, dtype)


def _strided(ctx: Context, x, axis, start, size, stride, fill):
    """Elements of one dimension, with a fill value for those beyond the edges."""
    old = dims(ctx, x)
    at = lambda value, others: [value if d == axis else other for d, other in enumerate(others)]  # noqa: E731
    starts, sizes, strides = at(start, [0] * len(old)), at(size, old), at(stride, [1] * len(old))
    return slice_nd(ctx, x, starts, sizes, strides, trt.SampleMode.FILL, fill)


def _avg_pool(ctx: Context, input, window, ceil_mode, count_include_pad, divisor):
    """torch counts what a window has inside the padded input, however far `ceil_mode` lets it hang over."""
    kernel, stride, padding = window
    kernel = _no_larger(ctx, input, kernel, padding)
    window = (kernel, stride, padding)
    n, sizes = len(kernel), ctx.out.shape[-len(kernel) :]
    _some(ctx, sizes)
    each = zip(dims(ctx, input)[-n:], sizes, *window, strict=True)
    hangs = ceil_mode and not all(same_size(o, (i + 2 * p - k) // s + 1) for i, o, k, s, p in each)
    x = lift(ctx, cast(ctx, input, torch.float32) if hangs or divisor else input, n)
    if hangs:
        x, padding = _reach(ctx, x, window, sizes, 0.0), (0,) * n
    layer = _pool(ctx, Pool.AVERAGE, x, kernel, stride, padding)
    layer.average_count_excludes_padding = not (hangs or divisor or count_include_pad)
    result = unlift(ctx, layer.get_output(0), n)
    if divisor:
        result = mul(ctx, result, math.prod(kernel) / divisor)
    elif hangs:
        result = div(ctx, result, _share(ctx, input, window, sizes, count_include_pad))
    return cast(ctx, result, ctx.out.dtype)


def _share(ctx: Context, input, window, sizes, count_include_pad):
    """Which part of each window counts: the average of ones over all that does."""
    kernel, stride, padding = window
    n = len(kernel)
    counted = [i + 2 * p * count_include_pad for i, p in zip(dims(ctx, input)[-n:], padding, strict=True)]
    before = (0,) * n if count_include_pad else padding
    if any(map(is_symbolic, counted)):
        ones = expand(ctx, constant(ctx, 1.0), [1, 1, *[1] * (2 - n), *counted])
        ones = _reach(ctx, ones, (kernel, stride, before), sizes, 0.0)
        return unlift(ctx, _pool(ctx, Pool.AVERAGE, ones, kernel, stride, (0,) * n).get_output(0), n, (1, *sizes))
    each = zip(sizes, kernel, stride, before, counted, strict=True)
    pads = [(p, (o - 1) * s + k - p - c) for o, k, s, p, c in each]
    ones = F.pad(torch.ones(1, *counted), [v for pair in reversed(pads) for v in pair])
    return getattr(F, f"avg_pool{n}d")(ones, kernel, stride)


# Windows of the sizes that the result asks for ------------------------------------------------------------------------


def _adaptive(ctx: Context, x, op, sizes, n):
    """One pooling where the windows are equal, one reduction where a single element is asked for, else gathers."""
    axes = range(len(sizes) - n, len(sizes))
    windows = [_equal_window(dims(ctx, x)[axis], sizes[axis]) for axis in axes]
    if all(k == 1 for k in windows):
        return x
    if None not in windows and not all(same_size(sizes[axis], 1) for axis in axes):
        if op is Reduce.MAX:
            return _max_pool(ctx, x, (windows, windows, [0] * n, [1] * n), False, sizes)
        layer = _pool(ctx, Pool.AVERAGE, lift(ctx, x, n), windows, windows, (0,) * n)
        return unlift(ctx, layer.get_output(0), n, sizes)
    x = cast(ctx, x, torch.float32) if op is Reduce.AVG else x
    single = [axis for axis, k in zip(axes, windows, strict=True) if k != 1 and same_size(sizes[axis], 1)]
    if single:
        x = reduce(ctx, op, x, single, keepdim=True)
    for axis, k in zip(axes, windows, strict=True):
        if k != 1 and axis not in single:
            x = _gathered(ctx, x, op, axis, sizes[axis])
    return x


def _equal_window(size, out):
    """The size of the windows where all have the same, which is where the sizes divide."""
    if same_size(size, out):
        return 1
    return None if is_symbolic(size) or is_symbolic(out) or size % out else size // out


def _gathered(ctx: Context, x, op, axis, out):
    """Each window of one dimension gathered and reduced."""
    size = dims(ctx, x)[axis]
    static = not is_symbolic(size) and not is_symbolic(out)
    places, inside = _adaptive_taps(size, out) if static else _dynamic_taps(ctx, size, out)
    seen = gather(ctx, x, places, axis)
    if op is Reduce.MAX:
        return reduce(ctx, op, seen, axis + 1)
    after = [1] * (len(dims(ctx, x)) - axis - 1)
    if static:
        count, mask = inside.sum(1).float().reshape(out, *after), inside.reshape(*inside.shape, *after)
    else:
        count = reshape(ctx, reduce(ctx, Reduce.SUM, cast(ctx, inside, torch.float32), 1), (out, *after))
        mask = reshape(ctx, inside, (*dims(ctx, inside), *after))
    if not static or not inside.all():
        seen = select(ctx, mask, seen, 0.0)  # not a weight of 0, which makes NaN of infinity
    return div(ctx, reduce(ctx, Reduce.SUM, seen, axis + 1), count)


def _adaptive_taps(size, out):
    """Where each window reads, its last place repeated up to a common length, and which of the places are its own."""
    i = torch.arange(out)[:, None]
    start, end = i * size // out, -(-(i + 1) * size // out)
    places = start + torch.arange(int((end - start).max()))
    return torch.minimum(places, end - 1), places < end


def _dynamic_taps(ctx: Context, size, out):
    """`_adaptive_taps` for sizes that are known when the engine runs."""
    require(ctx, out > 0, "the output has no windows", at_calls=True)
    longest = (size + out - 1) // out + 1
    i = torch.arange(out)[:, None] if not is_symbolic(out) else reshape(ctx, iota(ctx, out), (out, 1))
    from_zero = mul(ctx, i, size)
    start = floor_div(ctx, from_zero, out)
    end = floor_div(ctx, add(ctx, from_zero, size + out - 1), out)
    places = add(ctx, start, iota(ctx, longest))
    inside = less(ctx, places, end)
    return minimum(ctx, places, sub(ctx, end, 1)), inside


# Indices --------------------------------------------------------------------------------------------------------------


def _taps(size, out, k, s, p, d):
    """Where each window reads, with its first place repeated for those beyond the edges."""
    places = torch.arange(out)[:, None] * s - p + torch.arange(k) * d
    inside = (places >= 0) & (places < size)
    first = places.masked_fill(~inside, size).amin(1, keepdim=True)
    return torch.where(inside, places, first)


def _indices(ctx: Context, x, tables, sizes):
    """The first place in the flattened planes where each window has its maximum, or the last one where it has a NaN.

    TensorRT's pooling does not tell.
    """
    n = len(tables)
    planes, spatial = dims(ctx, x)[:-n], dims(ctx, x)[-n:]
    places = torch.zeros((), dtype=torch.int64)
    for axis, table in enumerate(tables):  # window by window, and in each window place by place
        shape = [1] * (2 * n)
        shape[axis], shape[n + axis] = table.shape
        places = places + table.reshape(shape) * math.prod(spatial[axis + 1 :])
    places = places.flatten(0, n - 1).flatten(1)
    seen = gather(ctx, reshape(ctx, x, (*planes, math.prod(spatial))), places, -1)
    best = equal(ctx, seen, reduce(ctx, Reduce.MAX, seen, -1, keepdim=True, keep_nan=False))
    first = reduce(ctx, Reduce.MIN, select(ctx, best, places, math.prod(spatial)), -1)
    if dtype_of(x).is_floating_point:
        last = reduce(ctx, Reduce.MAX, select(ctx, unary(ctx, Unary.ISNAN, seen), places, -1), -1)
        first = select(ctx, less(ctx, last, 0), first, last)
    return reshape(ctx, first, sizes)
