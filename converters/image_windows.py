import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    converter,
    dims,
    equal,
    floor_div,
    gather,
    greater,
    iota,
    is_symbolic,
    less,
    logical_and,
    mul,
    ntuple,
    permute,
    reduce,
    require,
    reshape,
    select,
    slice_nd,
    torch,
    trt,
    wide,
)

EW = trt.ElementWiseOperation


@converter(F.unfold)
def unfold_image(ctx: Context, input, kernel_size, dilation=1, padding=0, stride=1):
    """Pad, flatten the image, and gather every window's pixels by their constant positions.

    In an image of dynamic size the rows of the windows are gathered, and then their columns.
    """
    if any(map(is_symbolic, dims(ctx, input)[-2:])):
        return reshape(ctx, _windows_of_any(ctx, input, kernel_size, dilation, padding, stride), ctx.out.shape)
    position, (height, width) = _windows(ctx, dims(ctx, input)[-2:], kernel_size, dilation, padding, stride)
    *batch, channels = dims(ctx, input)[:-2]
    top, left = ntuple(padding, 2)
    if top or left:
        n = len(batch) + 1
        start = [*[0] * n, -top, -left]
        input = slice_nd(ctx, input, start, [*batch, channels, height, width], [1] * (n + 2), trt.SampleMode.FILL)
    x = gather(ctx, reshape(ctx, input, [*batch, channels, height * width]), position, -1)
    return reshape(ctx, x, ctx.out.shape)


@converter(F.fold)
def fold_image(ctx: Context, input, output_size, kernel_size, dilation=1, padding=0, stride=1):
    """For every pixel, gather the window elements that cover it (or a zero in their stead) and add them up."""
    if any(map(is_symbolic, (*ntuple(output_size, 2), *dims(ctx, input)))):
        return _fold_any(ctx, input, output_size, kernel_size, dilation, padding, stride)
    size, (top, left) = ntuple(output_size, 2), ntuple(padding, 2)
    position, (height, width) = _windows(ctx, size, kernel_size, dilation, padding, stride)
    *batch, _, _ = dims(ctx, input)
    zero = position.numel()
    pixel, element = position.reshape(-1).sort(stable=True)
    count = pixel.bincount(minlength=height * width)
    rank = torch.arange(zero) - (count.cumsum(0) - count)[pixel]
    cover = torch.full((height * width, max(int(count.max()), 1)), zero)
    cover[pixel, rank] = element
    cover = cover.reshape(height, width, -1)[top : top + size[0], left : left + size[1]]
    channels = ctx.out.shape[-3]
    x = cast(ctx, reshape(ctx, input, [*batch, channels, zero]), wide(ctx.out.dtype))
    n = len(batch) + 2
    x = slice_nd(ctx, x, [0] * n, [*batch, channels, zero + 1], [1] * n, trt.SampleMode.FILL)
    return cast(ctx, reduce(ctx, trt.ReduceOperation.SUM, gather(ctx, x, cover, -1), -1), ctx.out.dtype)


def _windows_of_any(ctx: Context, x, kernel_size, dilation, padding, stride):
    """(..., channels, window rows, window columns, rows, columns) of an image of dynamic size."""
    n = len(dims(ctx, x)) - 2
    top, left = ntuple(padding, 2)
    if top or left:
        *kept, height, width = dims(ctx, x)
        size = [*kept, height + 2 * top, width + 2 * left]
        x = slice_nd(ctx, x, [*[0] * n, -top, -left], size, [1] * (n + 2), trt.SampleMode.FILL)
    for axis, *window in zip((n, n + 2), *(ntuple(v, 2) for v in (kernel_size, dilation, stride)), strict=True):
        k, d, s = window
        out = _number_of_windows(dims(ctx, x)[axis], k, d, s)
        require(ctx, out > 0, "the image is too small for the window")
        first = mul(ctx, reshape(ctx, iota(ctx, out), (1, out)), s)
        x = gather(ctx, x, add(ctx, first, torch.arange(k)[:, None] * d), axis)
    return permute(ctx, x, [*range(n), n, n + 2, n + 1, n + 3])


def _number_of_windows(padded, k, d, s):
    return (padded - d * (k - 1) - 1) // s + 1


def _fold_any(ctx: Context, x, output_size, kernel_size, dilation, padding, stride):
    """`fold` where sizes are dynamic: along the columns, and then along the rows."""
    sizes, options = ntuple(output_size, 2), (kernel_size, dilation, padding, stride)
    each = list(zip(*(ntuple(v, 2) for v in options), strict=True))
    places = [_number_of_windows(size + 2 * p, k, d, s) for size, (k, d, p, s) in zip(sizes, each, strict=True)]
    require(ctx, math.prod(places) == dims(ctx, x)[-1], "the number of windows does not fit the image")
    *batch, _, _ = dims(ctx, x)
    n = len(batch) + 1
    channels = ctx.out.shape[-3]
    x = cast(ctx, x, wide(ctx.out.dtype))
    x = reshape(ctx, x, [*batch, channels, *(k for k, *_ in each), *places])
    x = permute(ctx, x, [*range(n), n, n + 2, n + 1, n + 3])
    x = _covered(ctx, x, sizes[1], places[1], *each[1])
    x = permute(ctx, x, [*range(n), n + 2, n, n + 1])
    x = _covered(ctx, x, sizes[0], places[0], *each[0])
    return cast(ctx, permute(ctx, x, [*range(n), n + 1, n]), ctx.out.dtype)


def _covered(ctx: Context, x, size, places, k, d, p, s):
    """The last two dimensions, tap and window, as the sums of those that cover each place of a size."""
    *kept, _, _ = dims(ctx, x)
    n = len(kept)
    x = reshape(ctx, x, [*kept, k * places])
    x = slice_nd(ctx, x, [0] * (n + 1), [*kept, k * places + 1], [1] * (n + 1), trt.SampleMode.FILL)
    taps = torch.arange(k)
    offset = add(ctx, reshape(ctx, iota(ctx, size), (size, 1)), p - taps * d)
    window = floor_div(ctx, offset, s)
    starts = equal(ctx, mul(ctx, window, s), offset)
    exists = logical_and(ctx, greater(ctx, window, -1), less(ctx, window, places))
    element = add(ctx, window, mul(ctx, taps, places))
    element = select(ctx, logical_and(ctx, starts, exists), element, k * places, torch.int64)
    return reduce(ctx, trt.ReduceOperation.SUM, gather(ctx, x, element, n), -1)


def _windows(ctx: Context, size, kernel_size, dilation, padding, stride):
    """The position in the padded, flattened image of each element of each window, and the padded size."""
    padded = [n + 2 * p for n, p in zip(size, ntuple(padding, 2), strict=True)]
    axis = []
    for n, k, d, s in zip(padded, ntuple(kernel_size, 2), ntuple(dilation, 2), ntuple(stride, 2), strict=True):
        axis.append(torch.arange(k)[:, None] * d + torch.arange((n - d * (k - 1) - 1) // s + 1) * s)
    rows, columns = axis
    position = rows[:, None, :, None] * padded[1] + columns[None, :, None, :]
    return position.reshape(rows.shape[0] * columns.shape[0], -1), padded
