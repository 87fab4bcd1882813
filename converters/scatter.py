import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    check,
    composite,
    converter,
    dims,
    expand,
    gather,
    is_integral,
    is_symbolic,
    is_traced,
    materialize,
    require,
    reshape,
    same_size,
    slice_nd,
    torch,
    trt,
    wrap_dim,
)

Tensor = torch.Tensor


# Reading --------------------------------------------------------------------------------------------------------------


@converter(torch.index_select, Tensor.index_select)
def index_select(ctx: Context, input, dim, index):
    if not dims(ctx, input):
        return reshape(ctx, input, ctx.out.shape)
    return reshape(ctx, gather(ctx, input, _in_range(ctx, index, input, dim), dim), ctx.out.shape)


@converter(torch.gather, Tensor.gather)
def gather_op(ctx: Context, input, dim, index, *, sparse_grad=False):
    x, index = (materialize(ctx, v, None, 1) for v in (input, _in_range(ctx, index, input, dim)))
    return reshape(ctx, gather(ctx, x, index, dim, each=True), ctx.out.shape)


@composite(torch.take_along_dim, Tensor.take_along_dim)
def take_along_dim(input, indices, dim=None):
    """A gather for which an index counts on after the last element, as before the first."""
    if dim is None:
        return input.flatten().gather(0, indices.flatten() % input.numel())
    dim = wrap_dim(dim, input.dim())
    indices = indices % input.shape[dim]
    around = lambda size, shape: [*shape[:dim], size, *shape[dim + 1 :]]  # noqa: E731
    shape = torch.broadcast_shapes(around(1, input.shape), around(1, indices.shape))
    return input.expand(around(input.shape[dim], shape)).gather(dim, indices.expand(around(indices.shape[dim], shape)))


@composite(torch.masked_select, Tensor.masked_select)
def masked_select(input, mask):
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    if is_traced(mask) or any(map(is_symbolic, shape)):
        return NotImplemented
    return input.expand(shape)[mask.expand(shape)]


def _in_range(ctx: Context, index, x, dim):
    """An index tensor; a constant one must name existing elements, as torch sees to when it runs."""
    if isinstance(index, Tensor) and index.numel():
        size = dims(ctx, x)[dim] if dims(ctx, x) else 1
        for value in (int(index.min()), int(index.max())):
            check(value >= 0, f"index {value} is out of range")
            require(ctx, size > value, f"index {value} is out of range", at_calls=True)
    return index


# Writing --------------------------------------------------------------------------------------------------------------


@converter(torch.scatter, Tensor.scatter, limits="no reduce as an ATen operator")
def scatter(ctx: Context, input, dim, index, src=None, *, value=None, reduce=None):
    check(reduce is None, f"{reduce=} is supported in torch.scatter itself")
    x, index = (materialize(ctx, v, None, 1) for v in (input, _in_range(ctx, index, input, dim)))
    updates = _for_each(ctx, value if src is None else src, dims(ctx, index))
    layer = ctx.network.add_scatter(x, index, updates, trt.ScatterMode.ELEMENT)
    layer.axis = wrap_dim(dim, len(dims(ctx, x)))
    result = ctx.track(layer.get_output(0), dims(ctx, x))
    if id(x) in ctx.bytes:
        ctx.bytes.add(id(result))
    return reshape(ctx, result, ctx.out.shape)


def _for_each(ctx: Context, src, sizes):
    """One value for each place in an index tensor of these sizes, which may be smaller than what the values come in."""
    if not isinstance(src, (Tensor, trt.ITensor)):
        return expand(ctx, materialize(ctx, src, ctx.out.dtype), sizes)
    return slice_nd(ctx, materialize(ctx, src, ctx.out.dtype, 1), [0] * len(sizes), sizes, [1] * len(sizes))


@composite(torch.take, Tensor.take)
def take(input, index):
    return input.flatten()[index.flatten()].reshape(index.shape)


@composite(torch.put, Tensor.put)
def put(input, index, source, accumulate=False):
    return input.flatten().index_put((index.flatten(),), source.flatten(), accumulate).reshape(input.shape)


@composite(torch.masked_scatter, Tensor.masked_scatter)
def masked_scatter(input, mask, source):
    """Each true element takes the value at its place among all of them, or where these come in rows, each row does."""
    input, mask = torch.broadcast_tensors(input, mask)
    if same_size(source.numel(), 0):
        return input.clone()
    shape, rows = input.shape, mask
    while rows.dim() and same_size(rows.stride(-1), 0) and fits_last(source, shape, input.dim() - rows.dim() + 1):
        rows = rows.select(-1, 0)
    place = rows.reshape(-1).long().cumsum(0) - 1
    values = source.reshape(-1, *shape[rows.dim() :])
    if is_symbolic(values.shape[0]):  # of size 1, the only row is for all that index_put puts under a mask
        place = place.clamp(max=values.shape[0] - 1)
        values = torch.cat([values, values.new_zeros(1, *values.shape[1:])])  # of size 0, there is none to take
    values = values.index_select(0, place.clamp(min=0)).reshape(shape)
    return torch.where(rows.reshape(*rows.shape, *[1] * (input.dim() - rows.dim())), values, input)


def fits_last(x, shape, n):
    """Whether the last `n` sizes of a tensor are those of a shape."""
    return x.dim() >= n and all(map(same_size, x.shape[x.dim() - n :], shape[len(shape) - n :]))


@composite(torch.index_fill, Tensor.index_fill)
def index_fill(input, dim, index, value):
    x = input if input.dim() else input.reshape(1)
    dim = wrap_dim(dim, x.dim())
    size = x.shape[dim]
    if not is_traced(index) and index.numel():
        inside = bool(size > int(index.max())) and bool(size >= -int(index.min()))
        check(inside, "an index is out of range")
    index = torch.where(index < 0, index + size, index).reshape(-1)
    hit = (torch.arange(size, device=input.device).unsqueeze(-1) == index).any(-1)
    return x.masked_fill(hit.reshape(size, *[1] * (x.dim() - dim - 1)), value).reshape(input.shape)


# Writing where several values may meet: TensorRT's scatter keeps one of them, so every place looks for its own --------


@composite(torch.scatter, Tensor.scatter)
def scatter_reducing(input, dim, index, src=None, *, value=None, reduce=None):
    if reduce is None:
        return NotImplemented
    src = value if src is None else src
    src = src if isinstance(src, Tensor) else torch.full(index.shape, src, dtype=input.dtype, device=input.device)
    return scatter_reduce(input, dim, index, src, {"add": "sum", "multiply": "prod"}[reduce])


@composite(torch.scatter_add, Tensor.scatter_add)
def scatter_add(input, dim, index, src):
    return scatter_reduce(input, dim, index, src, "sum")


@composite(torch.scatter_reduce, Tensor.scatter_reduce)
def scatter_reduce(input, dim, index, src, reduce, *, include_self=True):
    x, index, src = (t if t.dim() else t.reshape(1) for t in (input, index, src))
    dim = wrap_dim(dim, x.dim())
    if not all(map(same_size, src.shape, index.shape)):
        src = src[tuple(slice(size) for size in index.shape)]
    for d in range(x.dim()):
        if d != dim and not same_size(index.shape[d], x.shape[d]):
            missing = [0, 0] * (x.dim() - 1 - d) + [0, x.shape[d] - index.shape[d]]
            index, src = F.pad(index, missing, value=-1), F.pad(src, missing)
    result = _gathered_up(*(t.movedim(dim, -1) for t in (x, index, src)), reduce, include_self)
    return result.movedim(-1, dim).reshape(input.shape)


@composite(torch.index_add, Tensor.index_add)
def index_add(input, dim, index, source, *, alpha=1):
    return index_reduce(input, dim, index, source if alpha == 1 else source * alpha, "sum")


@composite(torch.index_reduce, Tensor.index_reduce)
def index_reduce(input, dim, index, source, reduce, *, include_self=True):
    x, source = (t if t.dim() else t.reshape(1) for t in (input, source))
    dim = wrap_dim(dim, x.dim())
    result = _gathered_up(x.movedim(dim, -1), index.reshape(-1), source.movedim(dim, -1), reduce, include_self)
    return result.movedim(-1, dim).reshape(input.shape)


LIMIT = 2**28  # elements in the comparison of every place with every index


def _gathered_up(x, index, src, how, include_self):
    """`x` combined, along its last dimension, with those elements of `src` whose `index` is the place."""
    static = [s for s in (*src.shape, x.shape[-1]) if not is_symbolic(s)]
    check(math.prod(static) <= LIMIT, f"TensorRT cannot add up where indices meet; comparing all pairs takes {static}")
    if not is_traced(index) and index.numel():
        check(0 <= int(index.max()) < x.shape[-1] and int(index.min()) >= -1, "an index is out of range")
    hit = index.unsqueeze(-2) == torch.arange(x.shape[-1], device=x.device).unsqueeze(-1)
    values = torch.where(hit, src.unsqueeze(-2), _neutral(how, x.dtype))
    total = getattr(values, "sum" if how == "mean" else how)(-1).to(x.dtype)
    if include_self:
        combine = {"prod": torch.mul, "amax": torch.maximum, "amin": torch.minimum}.get(how, torch.add)
        total = combine(x, total)
    if how == "mean":
        count = (hit.sum(-1) + int(include_self)).clamp(min=1)
        total = torch.div(total, count, rounding_mode="floor" if is_integral(x.dtype) else None).to(x.dtype)
    return total if include_self else torch.where(hit.any(-1), total, x)


def _neutral(how, dtype):
    """What changes nothing when it is combined with others."""
    if how not in ("amax", "amin"):
        return 1 if how == "prod" else 0
    if dtype.is_floating_point:
        low, high = -math.inf, math.inf
    else:
        low, high = (False, True) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return low if how == "amax" else high
