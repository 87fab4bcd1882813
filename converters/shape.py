import math

from torch2rt.vocabulary import (
    Context,
    add,
    check,
    composite,
    converter,
    dims,
    dtype_of,
    elementwise,
    expand,
    expression,
    gather,
    iota,
    is_symbolic,
    mul,
    ntuple,
    permute,
    proven,
    require,
    reshape,
    same_size,
    select,
    slice_nd,
    sub,
    torch,
    trt,
    wrap_dim,
)

Tensor, aten, prims = torch.Tensor, torch.ops.aten, torch.ops.prims
EW = trt.ElementWiseOperation


# The same elements in the same order ----------------------------------------------------------------------------------


@converter(
    torch.flatten,
    Tensor.flatten,
    torch.ravel,
    Tensor.ravel,
    torch.unflatten,
    Tensor.unflatten,
    torch.unsqueeze,
    Tensor.unsqueeze,
    Tensor.view_as,
    Tensor.reshape_as,
    aten._unsafe_view,
    aten._reshape_alias,
    prims.collapse_view,
    prims.collapse,
    prims.split_dim,
)
def same_elements(ctx: Context, input, *args, **kwargs):
    """What only changes the shape: the recorded one says all that the arguments say."""
    return reshape(ctx, input, ctx.out.shape)


@converter(torch.reshape, Tensor.reshape, prims.reshape)
def reshape_op(ctx: Context, input, *shape):
    return reshape(ctx, input, ctx.out.shape)


@converter(Tensor.view, limits="not as another dtype")
def view(ctx: Context, input, *size, dtype=None):
    if dtype is not None or (size and isinstance(size[0], torch.dtype)):
        check(ctx.out.dtype is dtype_of(input), "memory cannot be read as another type; convert with .to(dtype)")
    return reshape(ctx, input, ctx.out.shape)


@converter(torch.squeeze, Tensor.squeeze, prims.squeeze, limits="named dimensions where a size may be 1 or more")
def squeeze(ctx: Context, input, *dim):
    """torch drops a dynamic dimension whenever it happens to be 1: an engine has one rank."""
    sizes = dims(ctx, input)
    given = dim if dim and dim[0] is not None else range(len(sizes))
    for d in [wrap_dim(d, len(sizes)) for d in given] if sizes else []:
        check(
            not is_symbolic(sizes[d]) or proven(ctx, sizes[d] != 1),
            f"torch drops dimension {d} where its size is 1; name those to drop, or keep 1 out of its range",
        )
    return reshape(ctx, input, ctx.out.shape)


@composite(torch.as_strided, Tensor.as_strided, torch.as_strided_copy)
def known_memory(input, size, stride, storage_offset=None):
    check(owns_memory(input), "as_strided reads memory, which is only known of a contiguous tensor that is no view")
    return NotImplemented


def owns_memory(x):
    """Whether a tensor is all of its memory, in order."""
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not same_size(size, 1) and expression(stride - expected).expand() != 0:
            return False
        expected = expected * size
    return expression(x.untyped_storage().nbytes() - expected * x.itemsize).expand() == 0


@converter(torch.as_strided, Tensor.as_strided, torch.as_strided_copy, limits="within the tensor's memory")
def as_strided(ctx: Context, input, size, stride, storage_offset=None):
    """Of a tensor that is all of its memory, in order: `known_memory` has seen to that."""
    first, total = storage_offset or 0, math.prod(dims(ctx, input))
    last = sum(((length - 1) * step for length, step in zip(size, stride, strict=True)), first)
    if not any(same_size(length, 0) for length in size):
        require(ctx, last < total, "it reads beyond the tensor's memory")
    if any(map(is_symbolic, (first, *size, *stride))):
        position = first
        for d, (length, step) in enumerate(zip(size, stride, strict=True)):
            row = reshape(ctx, iota(ctx, length), [length, *[1] * (len(size) - 1 - d)])
            position = add(ctx, position, mul(ctx, row, step))
    else:
        position = torch.arange(max(last + 1, first)).as_strided(size, stride, first)
    return gather(ctx, reshape(ctx, input, [total]), position, 0)


@composite(torch.as_strided_scatter, Tensor.as_strided_scatter)
def as_strided_scatter(input, src, size, stride, storage_offset=None):
    check(owns_memory(input), "it writes to memory, which is only known of a contiguous tensor that is no view")
    place = torch.arange(input.numel(), device=input.device).as_strided(size, stride, storage_offset or 0)
    return input.reshape(-1).index_put((place.reshape(-1),), src.reshape(-1)).reshape(input.shape)


# Dimensions in another order ------------------------------------------------------------------------------------------


@converter(torch.permute, Tensor.permute, prims.transpose)
def permute_op(ctx: Context, input, *dims):
    return permute(ctx, input, dims)


@converter(torch.transpose, Tensor.transpose, torch.swapdims, Tensor.swapdims)
def transpose(ctx: Context, input, dim0, dim1):
    return permute(ctx, input, _swapped(len(dims(ctx, input)), dim0, dim1))


@converter(torch.t, Tensor.t)
def t(ctx: Context, input):
    return permute(ctx, input, range(len(dims(ctx, input)))[::-1])


def _swapped(ndim, dim0, dim1):
    order = list(range(ndim))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return order


def _to_end(ndim, *moved):
    """An order of dimensions with some of them last, and the order that takes it back."""
    last = [wrap_dim(d, ndim) for d in moved]
    order = [d for d in range(ndim) if d not in last] + last
    return order, [order.index(d) for d in range(ndim)]


@converter(torch.pixel_shuffle)
def pixel_shuffle(ctx: Context, input, upscale_factor):
    *batch, channels, height, width = dims(ctx, input)
    n, r = len(batch), upscale_factor
    x = reshape(ctx, input, [*batch, channels // r**2, r, r, height, width])
    x = permute(ctx, x, [*range(n + 1), n + 3, n + 1, n + 4, n + 2])
    return reshape(ctx, x, ctx.out.shape)


@converter(torch.pixel_unshuffle)
def pixel_unshuffle(ctx: Context, input, downscale_factor):
    *batch, channels, height, width = dims(ctx, input)
    n, r = len(batch), downscale_factor
    x = reshape(ctx, input, [*batch, channels, height // r, r, width // r, r])
    x = permute(ctx, x, [*range(n + 1), n + 2, n + 4, n + 1, n + 3])
    return reshape(ctx, x, ctx.out.shape)


@converter(torch.channel_shuffle)
def channel_shuffle(ctx: Context, input, groups):
    batch, channels, *rest = dims(ctx, input)
    x = reshape(ctx, input, [batch, groups, channels // groups, *rest])
    return reshape(ctx, permute(ctx, x, _swapped(len(rest) + 3, 1, 2)), ctx.out.shape)


# Elements again and again ---------------------------------------------------------------------------------------------


@converter(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def expand_op(ctx: Context, input, *size, implicit=False, other=None):
    return expand(ctx, input, ctx.out.shape)


@converter(prims.broadcast_in_dim)
def broadcast_in_dim(ctx: Context, input, shape, broadcast_dimensions):
    sizes = dict(zip(broadcast_dimensions, dims(ctx, input), strict=True))
    return expand(ctx, reshape(ctx, input, [sizes.get(d, 1) for d in range(len(shape))]), ctx.out.shape)


@converter(Tensor.repeat)
def repeat(ctx: Context, input, *repeats):
    """A slice that runs over the end and starts again."""
    sizes = dims(ctx, input)
    n = len(ctx.out.shape)
    x = reshape(ctx, input, (*[1] * (n - len(sizes)), *sizes))
    return slice_nd(ctx, x, [0] * n, ctx.out.shape, [1] * n, trt.SampleMode.WRAP)


@converter(torch.roll, Tensor.roll)
def roll(ctx: Context, input, shifts, dims=None):
    if dims is None or dims == () or dims == []:
        return reshape(ctx, _rolled(ctx, reshape(ctx, input, [math.prod(ctx.out.shape)]), shifts, 0), ctx.out.shape)
    return _rolled(ctx, input, shifts, dims)


def _rolled(ctx: Context, x, shifts, dim):
    """A slice that starts in the middle and wraps around."""
    sizes, flat = dims(ctx, x), lambda v: [n for item in v for n in ntuple(item, 1)]
    start = [0] * len(sizes)
    for shift, d in zip(flat([shifts]), flat([dim]), strict=True):
        start[d] += shift
    still = [same_size(shift, 0) or same_size(size, 0) for shift, size in zip(start, sizes, strict=True)]
    start = [0 if s else -shift % size for s, shift, size in zip(still, start, sizes, strict=True)]
    return slice_nd(ctx, x, start, sizes, [1] * len(sizes), trt.SampleMode.WRAP)


@converter(torch.flip, Tensor.flip, prims.rev)
def flip(ctx: Context, input, *dims):
    return _flipped(ctx, input, {wrap_dim(d, len(ctx.out.shape)) for d in dims})


def _flipped(ctx: Context, x, flipped):
    sizes = dims(ctx, x)
    flipped = {d for d in flipped if is_symbolic(sizes[d]) or sizes[d] > 1}  # TensorRT starts at no -1
    start = [size - 1 if d in flipped else 0 for d, size in enumerate(sizes)]
    return slice_nd(ctx, x, start, sizes, [-1 if d in flipped else 1 for d in range(len(sizes))])


@converter(Tensor.unfold, limits="windows that fit")
def unfold(ctx: Context, input, dimension, size, step):
    """Windows along one dimension: element j of window i is element i * step + j."""
    ndim = len(dims(ctx, input))
    if not ndim:
        return reshape(ctx, input, ctx.out.shape)
    dim = wrap_dim(dimension, ndim)
    require(ctx, dims(ctx, input)[dim] >= size, f"{size=} is more than dimension {dim} has", at_calls=True)
    first, offset = iota(ctx, ctx.out.shape[dim]), torch.arange(size)
    if isinstance(first, torch.Tensor):
        index = first[:, None] * step + offset
    else:
        first = mul(ctx, reshape(ctx, first, [*dims(ctx, first), 1]), step)
        index = add(ctx, first, offset)
    windows = gather(ctx, input, index, dim)
    return permute(ctx, windows, _to_end(ndim + 1, dim + 1)[0])


# Diagonals ------------------------------------------------------------------------------------------------------------


@converter(torch.diagonal, Tensor.diagonal, torch.diagonal_copy)
def diagonal(ctx: Context, input, offset=0, dim1=0, dim2=1):
    """With rows and columns as one dimension, the diagonal is every (columns + 1)-th element."""
    sizes = dims(ctx, input)
    x = permute(ctx, input, _to_end(len(sizes), dim1, dim2)[0])
    *batch, rows, columns = dims(ctx, x)
    n, size = len(batch), ctx.out.shape[-1]
    x = reshape(ctx, x, [*batch, rows * columns])
    start = offset if offset >= 0 else -offset * columns
    return slice_nd(ctx, x, [0] * n + [start], [*batch, size], [1] * n + [columns + 1])


@composite(Tensor.fill_diagonal_)
def fill_diagonal_(input, value, wrap=False):
    check(input.dim() == 2 and not wrap, "it is supported for matrices, without wrap")
    input.diagonal().fill_(value)
    return input


@converter(torch.diag_embed, Tensor.diag_embed)
def diag_embed(ctx: Context, input, offset=0, dim1=-2, dim2=-1):
    *batch, length = dims(ctx, input)
    n, m = len(batch), length + abs(offset)
    x = slice_nd(ctx, input, [0] * (n + 1), [*batch, m], [1] * (n + 1), trt.SampleMode.FILL) if offset else input
    x = reshape(ctx, x, [*batch, m, 1] if offset >= 0 else [*batch, 1, m])
    x = select(ctx, _distance(ctx, m, m, EW.EQUAL, offset), x, 0, ctx.out.dtype)
    return permute(ctx, x, _to_end(n + 2, dim1, dim2)[1])


@converter(torch.tril, Tensor.tril)
def tril(ctx: Context, input, diagonal=0):
    rows, columns = dims(ctx, input)[-2:]
    return select(ctx, _distance(ctx, rows, columns, EW.LESS, diagonal + 1), input, 0, ctx.out.dtype)


@converter(torch.triu, Tensor.triu)
def triu(ctx: Context, input, diagonal=0):
    rows, columns = dims(ctx, input)[-2:]
    return select(ctx, _distance(ctx, rows, columns, EW.GREATER, diagonal - 1), input, 0, ctx.out.dtype)


def _distance(ctx: Context, rows, columns, relation, offset):
    """The matrix of `column - row <relation> offset`."""
    row, column = iota(ctx, rows), iota(ctx, columns)
    if not any(map(is_symbolic, (rows, columns, offset))):
        return {EW.EQUAL: torch.eq, EW.LESS: torch.lt, EW.GREATER: torch.gt}[relation](column - row[:, None], offset)
    return elementwise(ctx, relation, sub(ctx, column, reshape(ctx, row, [rows, 1])), offset)
