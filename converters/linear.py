import functools
import math

import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

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
    elementwise,
    expand,
    expression,
    fusion,
    gather,
    greater,
    is_symbolic,
    materialize,
    matmul,
    maximum,
    mul,
    operands,
    permute,
    proven,
    reduce,
    reshape,
    same_size,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

EW, Reduce, Unary = trt.ElementWiseOperation, trt.ReduceOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten


def product(ctx: Context, a, b, transpose_b=False):
    """Matrices multiplied in the recorded dtype; TensorRT has no integer product, so that is a sum of products."""
    dtype = ctx.out.dtype
    ndim = max(2, len(dims(ctx, a)), len(dims(ctx, b)))
    a, b = (materialize(ctx, x, dtype, ndim) for x in (a, b))
    if dtype.is_floating_point:
        return matmul(ctx, a, b, transpose_b=transpose_b)
    check(dtype in (torch.int32, torch.int64), f"matrices of {dtype} are not multiplied, those of int32 and int64 are")
    n = len(dims(ctx, b))
    b = b if transpose_b else permute(ctx, b, [*range(n - 2), n - 1, n - 2])
    a = reshape(ctx, a, (*dims(ctx, a)[:-1], 1, dims(ctx, a)[-1]))
    b = reshape(ctx, b, (*dims(ctx, b)[:-2], 1, *dims(ctx, b)[-2:]))
    return reduce(ctx, Reduce.SUM, mul(ctx, a, b), -1)


@converter(F.linear)
def linear(ctx: Context, input, weight, bias=None):
    result = product(ctx, input, weight, transpose_b=True)
    if bias is not None:
        result = add(ctx, result, bias, ctx.out.dtype)
    return reshape(ctx, result, ctx.out.shape)


@fusion(F.linear)
def heads_of_one_input(fuser, node):
    """Queries, keys and values, products with one input that are split into heads: one product, split once.

    TensorRT unites the products itself, but then brings each result into the order of its heads by a kernel of its own.
    """
    if (mine := _in_heads(fuser, node)) is None:
        return
    x, shape = fuser.arguments(node)["input"], mine.meta["val"].shape
    alike = [
        (user, moved)
        for user in x.users
        if user.target is F.linear
        and user.meta["val"].dtype is node.meta["val"].dtype
        and (moved := _in_heads(fuser, user)) is not None
        and all(map(same_size, moved.meta["val"].shape, shape))
    ]
    calls = [fuser.arguments(user) for user, _ in alike]
    if len(calls) < 2 or any(call["input"] is not x for call in calls):
        return
    weights, biases = ([fuser.constant(call[name]) for call in calls] for name in ("weight", "bias"))
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    (batch, heads, length, size), count = shape, len(calls)
    y = fuser.call(node, node, (batch, length, count * heads * size), F.linear, x, torch.cat(weights), bias)
    y = fuser.call(node, node, (batch, length, count, heads, size), torch.unflatten, y, -1, (count, heads, size))
    y = fuser.call(node, node, (count, *shape), torch.permute, y, (2, 0, 3, 1, 4))
    for index, (_, moved) in enumerate(alike):
        fuser.substitute(moved, fuser.call(moved, moved, shape, torch.select, y, 0, index))


def _in_heads(fuser, product):
    """The call that makes (batch, heads, tokens, size) of a product with constants, if that is all it is for."""
    call = fuser.arguments(product)
    constants = [call["weight"], *([] if call["bias"] is None else [call["bias"]])]
    if len(product.users) > 1 or any(fuser.constant(value) is None for value in constants):
        return None
    (view,) = product.users
    if view.target not in _VIEWS or len(view.users) > 1 or product.meta["val"].dim() != 3:
        return None
    (moved,), (batch, length, features), sizes = view.users, product.meta["val"].shape, view.meta["val"].shape
    if len(sizes) != 4 or not same_size(sizes[0], batch) or not same_size(sizes[1], length):
        return None
    if any(map(is_symbolic, (features, *sizes[2:]))) or sizes[2] * sizes[3] != features:
        return None
    if moved.target in (torch.transpose, Tensor.transpose):
        arguments = fuser.arguments(moved)
        order = {arguments["dim0"] % 4, arguments["dim1"] % 4} == {1, 2}
    else:
        order = moved.target in (torch.permute, Tensor.permute) and [d % 4 for d in fuser.arguments(moved)["dims"]] == [
            0,
            2,
            1,
            3,
        ]
    return moved if order else None


_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten)


@converter(torch.matmul, Tensor.matmul, torch.linalg.matmul)
def matmul_op(ctx: Context, input, other):
    result = product(ctx, input, other, transpose_b=len(dims(ctx, other)) == 1)
    return reshape(ctx, result, ctx.out.shape)


@converter(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def mm(ctx: Context, input, mat2, out_dtype=None):
    return product(ctx, input, mat2)


@converter(torch.mv, Tensor.mv)
def mv(ctx: Context, input, vec):
    return matmul_op(ctx, input, vec)


@converter(torch.dot, Tensor.dot)
def dot(ctx: Context, input, tensor):
    return matmul_op(ctx, input, tensor)


@converter(torch.vdot, Tensor.vdot)
def vdot(ctx: Context, input, other):
    return matmul_op(ctx, input, other)


@converter(torch.inner, Tensor.inner)
def inner(ctx: Context, input, other):
    """Every row of one with every row of the other: the rows become two matrices."""
    if not dims(ctx, input) or not dims(ctx, other):
        return mul(ctx, input, other, ctx.out.dtype)
    a, b = (reshape(ctx, x, (math.prod(dims(ctx, x)[:-1]), dims(ctx, x)[-1])) for x in (input, other))
    return reshape(ctx, product(ctx, a, b, transpose_b=True), ctx.out.shape)


@converter(torch.outer, Tensor.outer, torch.ger, Tensor.ger)
def outer(ctx: Context, input, vec2):
    return mul(ctx, reshape(ctx, input, (*dims(ctx, input), 1)), vec2, ctx.out.dtype)


@converter(torch.linalg.vecdot)
def vecdot(ctx: Context, x, y, *, dim=-1):
    a, b = operands(ctx, x, y, dtype=wide(ctx.out.dtype))
    return cast(ctx, reduce(ctx, Reduce.SUM, mul(ctx, a, b), dim), ctx.out.dtype)


def plus_product(ctx: Context, input, a, b, beta, alpha):
    """`beta * input + alpha * (a @ b)`; scaling down comes first, since half precision may overflow in the product.

    The casts keep it there: TensorRT moves a plain factor behind the product.
    """
    if is_symbolic(alpha) or abs(alpha) < 1:
        a, alpha = cast(ctx, mul(ctx, a, alpha, wide(ctx.out.dtype)), ctx.out.dtype), 1
    result = matmul_op(ctx, a, b)
    if alpha != 1:
        result = mul(ctx, result, alpha, wide(ctx.out.dtype))
    return plus(ctx, input, result, beta)


def plus(ctx: Context, input, result, beta):
    """`beta * input + result`, rounded once after factors."""
    dtype = dtype_of(result)
    if is_symbolic(beta) or beta not in (0, 1):
        dtype = wide(ctx.out.dtype)
        input = mul(ctx, input, beta, dtype)
    if is_symbolic(beta) or beta != 0:
        result = add(ctx, result, input, dtype)
    return cast(ctx, result, ctx.out.dtype)


@converter(torch.addmm, Tensor.addmm)
def addmm(ctx: Context, input, mat1, mat2, out_dtype=None, *, beta=1, alpha=1):
    return plus_product(ctx, input, mat1, mat2, beta, alpha)


@converter(torch.addmv, Tensor.addmv)
def addmv(ctx: Context, input, mat, vec, *, beta=1, alpha=1):
    return plus_product(ctx, input, mat, vec, beta, alpha)


@converter(torch.baddbmm, Tensor.baddbmm)
def baddbmm(ctx: Context, input, batch1, batch2, out_dtype=None, *, beta=1, alpha=1):
    return plus_product(ctx, input, batch1, batch2, beta, alpha)


@converter(torch.addbmm, Tensor.addbmm)
def addbmm(ctx: Context, input, batch1, batch2, *, beta=1, alpha=1):
    """A sum over the batch is one product of wider matrices."""
    batch, rows, inner = dims(ctx, batch1)
    a = reshape(ctx, permute(ctx, batch1, [1, 0, 2]), (rows, batch * inner))
    b = reshape(ctx, batch2, (batch * inner, dims(ctx, batch2)[-1]))
    return plus_product(ctx, input, a, b, beta, alpha)


@converter(torch.addr, Tensor.addr)
def addr(ctx: Context, input, vec1, vec2, *, beta=1, alpha=1):
    if is_symbolic(alpha) or alpha != 1:
        vec1 = mul(ctx, vec1, alpha, ctx.out.dtype)
    return plus(ctx, input, outer(ctx, vec1, vec2), beta)


@composite(torch.linalg.multi_dot)
def multi_dot(tensors):
    return functools.reduce(torch.matmul, tensors)


@composite(torch.chain_matmul)
def chain_matmul(*matrices, out=None):
    return functools.reduce(torch.matmul, matrices)


@composite(torch.kron, Tensor.kron)
def kron(input, other):
    ndim = max(input.dim(), other.dim())
    a, b = (x.reshape((1,) * (ndim - x.dim()) + tuple(x.shape)) for x in (input, other))
    check(ndim <= 4, "kron of more than 4 dimensions needs more than TensorRT's 8")
    a_apart, b_apart = [n for size in a.shape for n in (size, 1)], [n for size in b.shape for n in (1, size)]
    return (a.reshape(a_apart) * b.reshape(b_apart)).reshape([m * n for m, n in zip(a.shape, b.shape, strict=True)])


@converter(F.bilinear)
def bilinear(ctx: Context, input1, input2, weight, bias=None):
    n, i, j = dims(ctx, weight)
    rows = product(ctx, input2, reshape(ctx, weight, (n * i, j)), transpose_b=True)
    rows = reshape(ctx, rows, (*dims(ctx, rows)[:-1], n, i))
    result = product(ctx, rows, reshape(ctx, input1, (*dims(ctx, input1), 1)))
    result = reshape(ctx, result, ctx.out.shape)
    return result if bias is None else add(ctx, result, bias, ctx.out.dtype)


@composite(torch._trilinear)
def trilinear(i1, i2, i3, expand1, expand2, expand3, sumdim, unroll_dim=1):
    """The sum over some dimensions of a product of three tensors, each of which lacks others: an `einsum`."""
    ndim = i1.dim() + len(expand1)
    lacking = (expand1, expand2, expand3, sumdim)
    letters = ["".join("abcdefgh"[d] for d in range(ndim) if d not in dims) for dims in lacking]
    return torch.einsum(f"{','.join(letters[:3])}->{letters[3]}", i1, i2, i3)


@converter(torch.trace, Tensor.trace)
def trace(ctx: Context, input):
    rows, columns = dims(ctx, input)
    flat = reshape(ctx, cast(ctx, input, wide(ctx.out.dtype)), (rows * columns,))
    diagonal = slice_nd(ctx, flat, [0], [torch.sym_min(rows, columns)], [columns + 1])
    return cast(ctx, reduce(ctx, Reduce.SUM, diagonal, 0), ctx.out.dtype)


@converter(torch.linalg.cross)
def cross(ctx: Context, input, other, *, dim=-1):
    a, b = operands(ctx, input, other, dtype=ctx.out.dtype)
    turned = [
        [gather(ctx, x, constant(ctx, order), wrap_dim(dim, len(dims(ctx, x)))) for order in ([1, 2, 0], [2, 0, 1])]
        for x in (a, b)
    ]
    left, right = (mul(ctx, turned[0][i], turned[1][1 - i]) for i in (0, 1))
    return sub(ctx, left, right)


# Distances -----------------------------------------------------------------------------------------------------------


def norm(ctx: Context, x, p, dim, keepdim=False):
    """The `p`-norm along one dimension, in the dtype in which torch sums."""
    x = cast(ctx, x, wide(dtype_of(x)))
    if p == 2:
        return unary(ctx, Unary.SQRT, reduce(ctx, Reduce.SUM, mul(ctx, x, x), dim, keepdim))
    x = unary(ctx, Unary.ABS, x)
    if p == 0:
        positive = greater(ctx, x, 0)
        return reduce(ctx, Reduce.SUM, cast(ctx, positive, dtype_of(x)), dim, keepdim)
    if math.isinf(p):
        return reduce(ctx, Reduce.MAX if p > 0 else Reduce.MIN, x, dim, keepdim)
    if p == 1:
        return reduce(ctx, Reduce.SUM, x, dim, keepdim)
    return elementwise(ctx, EW.POW, reduce(ctx, Reduce.SUM, elementwise(ctx, EW.POW, x, p), dim, keepdim), 1 / p)


@converter(F.cosine_similarity)
def cosine_similarity(ctx: Context, x1, x2, dim=1, eps=1e-8):
    """A vector that is broadcast along `dim` is as long as the other."""
    a, b = operands(ctx, x1, x2, dtype=wide(ctx.out.dtype))
    products = mul(ctx, a, b)
    result, axis = reduce(ctx, Reduce.SUM, products, dim), wrap_dim(dim, len(dims(ctx, products)))
    for x in (a, b):
        sizes = [dims(ctx, products)[d] if d == axis else n for d, n in enumerate(dims(ctx, x))]
        length = maximum(ctx, norm(ctx, expand(ctx, x, sizes), 2, axis), eps)
        result = div(ctx, result, length)
    return cast(ctx, result, ctx.out.dtype)


@converter(F.pairwise_distance)
def pairwise_distance(ctx: Context, x1, x2, p=2.0, eps=1e-6, keepdim=False):
    a, b = operands(ctx, x1, x2, dtype=wide(ctx.out.dtype))
    difference = add(ctx, sub(ctx, a, b), eps)
    return cast(ctx, norm(ctx, difference, p, -1, keepdim), ctx.out.dtype)


@composite(torch.pdist, aten._pdist_forward)
def pdist(input, p=2.0):
    """The distances of all pairs of rows, in the order of the upper triangle."""
    check(not is_symbolic(input.shape[0]), "how many pairs there are grows with the square of a dynamic size")
    first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return torch.linalg.vector_norm(input[first] - input[second], p, -1)


@composite(torch.cdist)
def cdist_of_dynamic_sizes(x1, x2, p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary"):
    """torch takes another kernel from 26 points on, which is a question about sizes that need have no single answer."""
    dynamic = is_symbolic(x1.shape[-2]) or is_symbolic(x2.shape[-2])
    if p != 2 or not dynamic or compute_mode != "use_mm_for_euclid_dist_if_necessary":
        return NotImplemented
    return distances(x1, x2)


def distances(x1, x2):
    """`torch.cdist` by its default arguments, as a call that is recorded for all numbers of points."""
    if has_torch_function((x1, x2)):
        return handle_torch_function(distances, (x1, x2), x1, x2)
    check(same_size(x1.shape[-1], x2.shape[-1]), f"points of {x1.shape[-1]} and of {x2.shape[-1]} numbers")
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    return x1.new_empty((*batch, x1.shape[-2], x2.shape[-2]))


@converter(distances)
def distances_layers(ctx: Context, x1, x2):
    return cdist(ctx, x1, x2)


@converter(torch.cdist)
def cdist(ctx: Context, x1, x2, p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary"):
    rows, columns = dims(ctx, x1)[-2], dims(ctx, x2)[-2]
    large = (expression(rows) > 25) | (expression(columns) > 25)
    necessary = compute_mode == "use_mm_for_euclid_dist_if_necessary"
    if p == 2 and ((necessary and proven(ctx, large)) or compute_mode == "use_mm_for_euclid_dist"):
        return euclidean(ctx, x1, x2)
    a = reshape(ctx, x1, (*dims(ctx, x1)[:-1], 1, dims(ctx, x1)[-1]))
    b = reshape(ctx, x2, (*dims(ctx, x2)[:-2], 1, *dims(ctx, x2)[-2:]))
    return cast(ctx, norm(ctx, sub(ctx, a, b), p, -1), ctx.out.dtype)


_COMPUTE_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


@composite(aten.cdist, aten._cdist_forward)
def cdist_by_number(x1, x2, p=2.0, compute_mode=None):
    return torch.cdist(x1, x2, p, _COMPUTE_MODES[compute_mode or 0])


@composite(torch._euclidean_dist)
def euclidean_dist(x1, x2):
    return torch.cdist(x1, x2, 2.0, "use_mm_for_euclid_dist")


def euclidean(ctx: Context, x1, x2):
    """Distances by one matrix product, `|a - b|^2 = |a|^2 - 2ab + |b|^2`, as torch has them for many points."""
    squares = [reduce(ctx, Reduce.SUM, mul(ctx, x, x), -1, True) for x in (x1, x2)]
    ndim = len(dims(ctx, squares[1]))
    sums = add(ctx, squares[0], permute(ctx, squares[1], [*range(ndim - 2), ndim - 1, ndim - 2]))
    twice = product(ctx, mul(ctx, x1, 2), x2, transpose_b=True)
    return unary(ctx, Unary.SQRT, maximum(ctx, sub(ctx, sums, twice), 0))
