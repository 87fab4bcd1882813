"""Complex numbers, of which TensorRT has none: a complex value is a pair of float32 tensors, its parts.

What only moves, joins or adds elements is done to both parts by the converter it has for real values.
"""

import functools
import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Complex,
    Context,
    cast,
    check,
    complex_converter,
    composite,
    concat,
    converter,
    elementwise,
    equal,
    less,
    logical_and,
    narrow,
    reshape,
    select,
    torch,
    trt,
    unary,
)
from torch2rt.vocabulary.complex import (
    filled,
    from_polar,
    is_complex,
    minus,
    negative,
    part,
    parts,
    plus,
    product,
    quotient,
    times,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor, aten = torch.Tensor, torch.ops.aten


# Both parts alike ----------------------------------------------------------------------------------------------------


def part_by_part(*data, mixed=False):
    """A converter that does to each part what is done to real values; `data` are the arguments that have parts."""

    def convert(ctx: Context, *args, **kwargs):
        given = {name: ctx.arguments[name] for name in data}
        out = ctx.out if isinstance(ctx.out, (tuple, list)) else (ctx.out,)
        check(all(o.is_complex() for o in out), f"its result of {out[0].dtype} is not supported")
        check(mixed or all(map(is_complex, given.values())), "of real numbers it makes complex ones")
        real, imag = (ctx.again(**{name: part(ctx, x, i) for name, x in given.items()}) for i in (0, 1))
        return tuple(map(Complex, real, imag)) if isinstance(real, (tuple, list)) else Complex(real, imag)

    return convert


complex_converter(
    torch.flatten,
    torch.reshape,
    Tensor.view,
    torch.squeeze,
    torch.permute,
    torch.transpose,
    torch.t,
    Tensor.expand,
    torch.ops.prims.broadcast_in_dim,
    Tensor.repeat,
    torch.roll,
    torch.flip,
    Tensor.unfold,
    torch.as_strided,
    torch.diagonal,
    torch.diag_embed,
    torch.tril,
    torch.triu,
    torch.trace,
    torch.pixel_shuffle,
    torch.pixel_unshuffle,
    torch.channel_shuffle,
    torch.select,
    aten.slice.Tensor,
    Tensor.__getitem__,
    aten.index.Tensor,
    torch.index_select,
    torch.gather,
    torch.split_with_sizes,
    torch.chunk,
    torch.unbind,
    torch.clone,
    F.dropout,
    torch.dropout,
    torch.neg,
    torch.positive,
    torch.sum,
    torch.mean,
    torch.cumsum,
)(part_by_part("input"))
complex_converter(torch.split)(part_by_part("tensor"))
complex_converter(torch.zeros)(part_by_part())
complex_converter(torch.cat, torch.stack)(part_by_part("tensors", mixed=True))
complex_converter(torch.where, Tensor.where)(part_by_part("input", "other", mixed=True))
complex_converter(torch.masked_fill, F.pad, torch.constant_pad_nd)(part_by_part("input", "value", mixed=True))
complex_converter(torch.select_scatter, torch.slice_scatter, torch.diagonal_scatter)(
    part_by_part("input", "src", mixed=True)
)
complex_converter(torch.scatter)(part_by_part("input", "src", "value", mixed=True))
complex_converter(torch.index_put)(part_by_part("input", "values", mixed=True))
complex_converter(torch.index_copy)(part_by_part("input", "source", mixed=True))
complex_converter(aten.copy)(part_by_part("src", mixed=True))
complex_converter(torch.fill)(part_by_part("value", mixed=True))


@complex_converter(torch.ones)
def ones(ctx: Context, *args, **kwargs):
    return filled(ctx, 1, None)


@complex_converter(torch.full)
def full(ctx: Context, *args, fill_value=None, **kwargs):
    return filled(ctx, *parts(ctx, args[-1] if fill_value is None else fill_value))


@complex_converter(torch.scalar_tensor)
def scalar_tensor(ctx: Context, s, **kwargs):
    return filled(ctx, *parts(ctx, s))


@complex_converter(Tensor.to, limits="not to bool")
def converted(ctx: Context, input, *args, **kwargs):
    """torch drops the imaginary part on the way to a real type."""
    if ctx.out.is_complex():
        return Complex(*(ctx.again(input=part(ctx, input, i)) for i in (0, 1)))
    check(ctx.out.dtype is not torch.bool, "whether complex numbers are zero is not supported; compare with 0")
    return ctx.again(input=parts(ctx, input)[0])


# Numbers and pairs of numbers ----------------------------------------------------------------------------------------


@complex_converter(torch.complex)
def complex_op(ctx: Context, real, imag):
    return filled(ctx, real, imag)


@complex_converter(torch.polar)
def polar(ctx: Context, abs, angle):
    return filled(ctx, *from_polar(ctx, abs, angle))


@complex_converter(torch.view_as_complex)
def view_as_complex(ctx: Context, input):
    return Complex(*(reshape(ctx, narrow(ctx, input, -1, i, 1), ctx.out.shape) for i in (0, 1)))


@complex_converter(torch.view_as_real, torch.view_as_real_copy)
def view_as_real(ctx: Context, input):
    shape = (*ctx.out.shape[:-1], 1)
    return concat(ctx, [reshape(ctx, x, shape) for x in parts(ctx, input)], -1)


@composite(Tensor.real.__get__)
def real_attribute(input):
    return torch.real(input)


@composite(Tensor.imag.__get__)
def imag_attribute(input):
    return torch.imag(input)


@complex_converter(torch.real)
def real(ctx: Context, input):
    return parts(ctx, input)[0]


@complex_converter(torch.imag)
def imag(ctx: Context, input):
    return parts(ctx, input)[1]


@converter(
    torch.real,
    torch.conj,
    Tensor.conj,
    aten._conj,
    torch.conj_physical,
    Tensor.conj_physical,
    torch.resolve_conj,
    Tensor.resolve_conj,
    torch.resolve_neg,
    Tensor.resolve_neg,
)
def real_value(ctx: Context, input):
    return input


@complex_converter(torch.resolve_conj, Tensor.resolve_conj, torch.resolve_neg, Tensor.resolve_neg)
def complex_value(ctx: Context, input):
    return input


@complex_converter(torch.conj, Tensor.conj, aten._conj, torch.conj_physical, Tensor.conj_physical, aten._conj_physical)
def conj(ctx: Context, input):
    """torch only takes a note that the imaginary part is to be read with the other sign; here it is another value."""
    re, im = parts(ctx, input)
    return Complex(re, negative(ctx, im))


@converter(aten._neg_view)
def neg_view(ctx: Context, input):
    return unary(ctx, Unary.NEG, input)


@complex_converter(torch.abs)
def abs_op(ctx: Context, input):
    return ctx.apply(torch.hypot, *parts(ctx, input))


@converter(torch.angle, Tensor.angle)
def angle_of_real(ctx: Context, input):
    """Pi below zero, and of a NaN itself."""
    x = cast(ctx, input, ctx.out.dtype)
    angle = select(ctx, less(ctx, x, 0.0), math.pi, 0.0, ctx.out.dtype)
    return select(ctx, unary(ctx, Unary.ISNAN, x), x, angle)


@complex_converter(torch.angle)
def angle(ctx: Context, input):
    re, im = parts(ctx, input)
    return ctx.apply(torch.atan2, im, re)


# Arithmetic ----------------------------------------------------------------------------------------------------------


@complex_converter(torch.add)
def add(ctx: Context, input, other, alpha=1):
    (a, b), (c, d) = parts(ctx, input), scaled(ctx, other, alpha)
    return filled(ctx, plus(ctx, a, c), plus(ctx, b, d))


@complex_converter(torch.sub)
def sub(ctx: Context, input, other, alpha=1):
    (a, b), (c, d) = parts(ctx, input), scaled(ctx, other, alpha)
    return filled(ctx, minus(ctx, a, c), minus(ctx, b, d))


@complex_converter(torch.rsub)
def rsub(ctx: Context, input, other, alpha=1):
    return sub(ctx, other, input, alpha)


def scaled(ctx: Context, x, alpha):
    return parts(ctx, x) if alpha == 1 else product(ctx, parts(ctx, x), parts(ctx, alpha))


@complex_converter(torch.mul)
def mul(ctx: Context, input, other):
    return filled(ctx, *product(ctx, parts(ctx, input), parts(ctx, other)))


@complex_converter(torch.div)
def div(ctx: Context, input, other, *, rounding_mode=None):
    return filled(ctx, *quotient(ctx, parts(ctx, input), parts(ctx, other)))


@complex_converter(torch.reciprocal)
def reciprocal(ctx: Context, input):
    return filled(ctx, *quotient(ctx, (1.0, None), parts(ctx, input)))


@complex_converter(torch.sgn)
def sgn(ctx: Context, input):
    """Of length 1, or 0 for 0."""
    length = ctx.apply(torch.hypot, *parts(ctx, input))
    length = select(ctx, equal(ctx, length, 0.0), 1.0, length)
    return filled(ctx, *quotient(ctx, parts(ctx, input), (length, None)))


@complex_converter(torch.square)
def square(ctx: Context, input):
    return mul(ctx, input, input)


@complex_converter(torch.pow, limits="complex numbers to the power of a real number")
def pow_op(ctx: Context, input, exponent):
    """Small whole powers as products; others turn the angle."""
    check(isinstance(exponent, (int, float)), "complex numbers are only raised to the power of a real number")
    x = parts(ctx, input)
    if not float(exponent).is_integer() or not 1 <= abs(exponent) <= 16:
        length = ctx.apply(torch.pow, ctx.apply(torch.hypot, *x), exponent)
        return Complex(*from_polar(ctx, length, times(ctx, ctx.apply(torch.atan2, *reversed(x)), float(exponent))))
    result = functools.reduce(lambda y, _: product(ctx, y, x), range(abs(int(exponent)) - 1), x)
    return Complex(*(result if exponent > 0 else quotient(ctx, (1.0, None), result)))


@complex_converter(torch.sqrt)
def sqrt(ctx: Context, input):
    return pow_op(ctx, input, 0.5)


@complex_converter(torch.exp)
def exp(ctx: Context, input):
    re, im = parts(ctx, input)
    return Complex(*from_polar(ctx, unary(ctx, Unary.EXP, re), im))


@complex_converter(torch.log)
def log(ctx: Context, input):
    re, im = parts(ctx, input)
    return Complex(unary(ctx, Unary.LOG, ctx.apply(torch.hypot, re, im)), ctx.apply(torch.atan2, im, re))


@complex_converter(torch.eq)
def eq(ctx: Context, input, other):
    a, b = ([0.0 if v is None else v for v in parts(ctx, x)] for x in (input, other))
    same = (equal(ctx, *pair, torch.float32) for pair in zip(a, b, strict=True))
    return logical_and(ctx, *same)


@complex_converter(torch.ne)
def ne(ctx: Context, input, other):
    return unary(ctx, Unary.NOT, eq(ctx, input, other))


def either(op):
    """A converter of questions about both parts."""

    def convert(ctx: Context, input):
        return elementwise(ctx, op, *(ctx.again(input=x) for x in parts(ctx, input)))

    return convert


complex_converter(torch.isnan, torch.isinf)(either(EW.OR))
complex_converter(torch.isfinite)(either(EW.AND))


@complex_converter(torch.linalg.vector_norm)
def vector_norm(ctx: Context, input, *args, **kwargs):
    return ctx.again(input=abs_op(ctx, input), dtype=None)


# Products of matrices ------------------------------------------------------------------------------------------------


def bilinear(first, second):
    """A converter of products by those of the parts."""

    def convert(ctx: Context, *args, **kwargs):
        x, y = (parts(ctx, ctx.arguments[name]) for name in (first, second))
        return Complex(*product(ctx, x, y, lambda ctx, a, b: ctx.again(**{first: a, second: b})))

    return convert


complex_converter(torch.matmul, torch.inner)(bilinear("input", "other"))
complex_converter(torch.mm)(bilinear("input", "mat2"))
complex_converter(torch.mv)(bilinear("input", "vec"))
complex_converter(torch.dot)(bilinear("input", "tensor"))
complex_converter(torch.outer)(bilinear("input", "vec2"))
complex_converter(torch._VF.tensordot)(bilinear("a", "b"))


@complex_converter(torch.vdot)
def vdot(ctx: Context, input, other):
    (a, b), y = parts(ctx, input), parts(ctx, other)
    return Complex(*product(ctx, (a, negative(ctx, b)), y, lambda ctx, a, b: ctx.again(input=a, other=b)))


@complex_converter(torch.einsum)
def einsum_of_two(ctx: Context, equation, *operands):
    if len(operands) == 1:
        return Complex(*(ctx.again(operands=(x,)) for x in parts(ctx, operands[0])))
    x, y = (parts(ctx, operand) for operand in operands)
    return Complex(*product(ctx, x, y, lambda ctx, *pair: ctx.again(operands=pair)))


@complex_converter(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def weighted(ctx: Context, input, weight, bias=None, *args, **kwargs):
    """The bias goes with one term of each part."""
    x, y = parts(ctx, input), parts(ctx, weight)
    biases = [part(ctx, bias, i) for i in (0, 1)]

    def term(i, j, bias=None):
        return None if x[i] is None or y[j] is None else ctx.again(input=x[i], weight=y[j], bias=bias)

    re = minus(ctx, term(0, 0, biases[0]), term(1, 1))
    if y[1] is None:
        return Complex(re, term(1, 0, biases[1]))
    return Complex(re, plus(ctx, term(0, 1, biases[1]), term(1, 0)))
