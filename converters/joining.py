from torch2rt.vocabulary import (
    cast,
    concat,
    converter,
    dims,
    materialize,
    narrow,
    reshape,
    torch,
    wrap_dim,
)

Tensor, aten, prims = torch.Tensor, torch.ops.aten, torch.ops.prims


@converter(torch.cat, torch.concat, torch.concatenate, prims.cat)
def cat(ctx, tensors, dim=0):
    ndim = len(ctx.out.shape)
    joined = [t for t in tensors if len(dims(ctx, t)) == ndim]  # torch still lets (0,) tensors pass among others
    return concat(ctx, [materialize(ctx, t, ctx.out.dtype) for t in joined], dim)


@converter(torch.stack)
def stack(ctx, tensors, dim=0):
    dim = wrap_dim(dim, len(ctx.out.shape))
    shape = (*ctx.out.shape[:dim], 1, *ctx.out.shape[dim + 1 :])
    return concat(ctx, [reshape(ctx, cast(ctx, t, ctx.out.dtype), shape) for t in tensors], dim)


@converter(torch.split, Tensor.split, aten.split)
def split(ctx, tensor, split_size=None, dim=0, *, split_size_or_sections=None, split_sizes=None):
    return _pieces(ctx, tensor, dim)


@converter(torch.split_with_sizes, Tensor.split_with_sizes)
def split_with_sizes(ctx, input, split_sizes, dim=0):
    return _pieces(ctx, input, dim)


@converter(torch.chunk, Tensor.chunk)
def chunk(ctx, input, chunks, dim=0):
    return _pieces(ctx, input, dim)


@converter(torch.unbind, Tensor.unbind)
def unbind(ctx, input, dim=0):
    return tuple(reshape(ctx, narrow(ctx, input, dim, i, 1), out.shape) for i, out in enumerate(ctx.out))


def _pieces(ctx, x, dim):
    """One piece after the other along a dimension, as long as recorded."""
    lengths = [piece.shape[dim] for piece in ctx.out]
    return tuple(narrow(ctx, x, dim, sum(lengths[:i]), length) for i, length in enumerate(lengths))
