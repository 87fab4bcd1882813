from torch.overrides import handle_torch_function, has_torch_function

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    composite,
    concat,
    converter,
    dims,
    gather,
    iota,
    is_traced,
    less,
    materialize,
    narrow,
    reshape,
    select,
    torch,
    wrap_dim,
)

Tensor, aten, prims = torch.Tensor, torch.ops.aten, torch.ops.prims


@converter(torch.cat, torch.concat, torch.concatenate, prims.cat)
def cat(ctx: Context, tensors, dim=0):
    ndim = len(ctx.out.shape)
    joined = [t for t in tensors if len(dims(ctx, t)) == ndim]  # torch still lets (0,) tensors pass among others
    return concat(ctx, [materialize(ctx, t, ctx.out.dtype) for t in joined], dim)


@converter(torch.stack)
def stack(ctx: Context, tensors, dim=0):
    dim = wrap_dim(dim, len(ctx.out.shape))
    shape = (*ctx.out.shape[:dim], 1, *ctx.out.shape[dim + 1 :])
    return concat(ctx, [reshape(ctx, cast(ctx, t, ctx.out.dtype), shape) for t in tensors], dim)


@converter(torch.split, Tensor.split, aten.split)
def split(ctx: Context, tensor, split_size=None, dim=0, *, split_size_or_sections=None, split_sizes=None):
    return _pieces(ctx, tensor, dim)


@converter(torch.split_with_sizes, Tensor.split_with_sizes)
def split_with_sizes(ctx: Context, input, split_sizes, dim=0):
    return _pieces(ctx, input, dim)


@converter(torch.chunk, Tensor.chunk)
def chunk(ctx: Context, input, chunks, dim=0):
    return _pieces(ctx, input, dim)


@converter(torch.unbind, Tensor.unbind)
def unbind(ctx: Context, input, dim=0):
    return tuple(reshape(ctx, narrow(ctx, input, dim, i, 1), out.shape) for i, out in enumerate(ctx.out))


def _pieces(ctx: Context, x, dim):
    """One piece after the other along a dimension, as long as recorded."""
    lengths = [piece.shape[dim] for piece in ctx.out]
    return tuple(narrow(ctx, x, dim, sum(lengths[:i]), length) for i, length in enumerate(lengths))


@composite(torch.tensor_split, Tensor.tensor_split)
def tensor_split(input, *args, **kwargs):
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    check(not any(map(is_traced, given)), "how large the parts are depends on a computed tensor; give numbers")
    return NotImplemented


# A part that starts where data says ----------------------------------------------------------------------------------


@composite(torch.narrow, Tensor.narrow)
def narrow_op(input, dim, start, length):
    if not isinstance(start, Tensor):
        return NotImplemented
    check(not start.dim() and not start.dtype.is_floating_point, "a computed start is an integer without dimensions")
    return narrow_at(input, dim, start, length) if is_traced(start) else input.narrow(dim, int(start), length)


def narrow_at(input, dim, start, length):
    """`torch.narrow`, of whose fake result only the memory and the sizes count: a write to that memory is refused."""
    if has_torch_function((input, start)):
        return handle_torch_function(narrow_at, (input, start), input, dim, start, length)
    if not is_traced(start):
        return input.narrow(dim, start, length)
    part = input.narrow(dim, 0, length)
    return part.as_strided(part.shape, part.stride(), part.storage_offset())


@converter(narrow_at)
def narrow_at_op(ctx: Context, input, dim, start, length):
    first = add(ctx, start, dims(ctx, input)[dim])
    first = select(ctx, less(ctx, start, 0), first, start, torch.int64)
    return gather(ctx, input, add(ctx, first, iota(ctx, length)), dim)
