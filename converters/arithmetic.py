import math

from torch2rt.vocabulary import (
    Context,
    cast,
    clamp,
    converter,
    elementwise,
    equal,
    floor_div,
    is_symbolic,
    less,
    logical_or,
    rounds_powers_wrong,
    select,
    torch,
    trt,
    unary,
    wide,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor, prims = torch.Tensor, torch.ops.prims
BYTES = (torch.int8, torch.uint8)


# One layer -----------------------------------------------------------------------------------------------------------


def binary(ctx: Context, op, a, b):
    """One layer in the recorded dtype.

    TensorRT has no arithmetic on bytes, so they are computed in int32 and wrap around as torch's do. A number that half
    precision cannot hold makes torch compute in float32. So does one here that scales down, as in `(q * scale) @ k`:
    TensorRT for RTX 1.6 moves a plain factor behind the product, which may overflow, but none past a cast.
    """
    dtype = ctx.out.dtype
    if dtype in BYTES:
        a, b = (cast(ctx, x, dtype) if isinstance(x, (trt.ITensor, Tensor)) else x for x in as_recorded(ctx, a, b))
        return wrapped(ctx, elementwise(ctx, op, a, b, torch.int32), dtype)
    half = fits(a, dtype) and fits(b, dtype) and not (dtype is torch.float16 and shrinks(op, a, b))
    return cast(ctx, elementwise(ctx, op, a, b, dtype if half else torch.float32), dtype)


def shrinks(op, a, b):
    """Whether one side is a number that scales the other one down."""
    if op == EW.DIV:
        return is_symbolic(b) or isinstance(b, (int, float)) and abs(b) > 1
    return op == EW.PROD and any(is_symbolic(x) or isinstance(x, (int, float)) and abs(x) < 1 for x in (a, b))


def fits(x, dtype):
    """Whether a number keeps its size in a dtype, rather than turn into infinity, zero or a subnormal number."""
    if isinstance(x, Tensor) and x.dim() == 0 and x.dtype.is_floating_point:
        x = x.item()
    if not isinstance(x, (int, float)) or wide(dtype) is dtype or x == 0 or not math.isfinite(x):
        return True
    return not dtype.is_floating_point or torch.finfo(dtype).tiny <= abs(x) <= torch.finfo(dtype).max


def wrapped(ctx: Context, x, dtype):
    """An int32 as a byte, modulo 256."""
    if dtype is torch.int8:
        x = elementwise(ctx, EW.SUM, x, 128)
    x = elementwise(ctx, EW.SUB, x, elementwise(ctx, EW.PROD, floor_div(ctx, x, 256), 256))
    return cast(ctx, elementwise(ctx, EW.SUB, x, 128) if dtype is torch.int8 else x, dtype)


def is_half(dtype):
    return dtype.is_floating_point and wide(dtype) is not dtype


def rounded(number, dtype):
    return torch.tensor(number).to(dtype).item()


def as_recorded(ctx: Context, *values):
    """Numbers as the recorded dtype holds them, as torch takes a remainder of half precision or bytes by them."""
    dtype = ctx.out.dtype
    narrow = is_half(dtype) or dtype in BYTES
    return [rounded(v, dtype) if narrow and isinstance(v, (int, float)) else v for v in values]


def scaled(ctx: Context, x, alpha):
    return x if alpha == 1 else elementwise(ctx, EW.PROD, x, alpha, wide(ctx.out.dtype))


def narrowed(ctx: Context, op, a, b):
    """One layer in the wider dtype of a composed call, and its result in the recorded one."""
    dtype = ctx.out.dtype
    x = elementwise(ctx, op, a, b, wide(dtype))
    return wrapped(ctx, x, dtype) if dtype in BYTES else cast(ctx, x, dtype)


@converter(torch.add, Tensor.add, prims.add)
def add(ctx: Context, input, other, alpha=1):
    return binary(ctx, EW.SUM, input, other) if alpha == 1 else narrowed(ctx, EW.SUM, input, scaled(ctx, other, alpha))


@converter(torch.sub, Tensor.sub, torch.subtract, Tensor.subtract, prims.sub)
def sub(ctx: Context, input, other, alpha=1):
    return binary(ctx, EW.SUB, input, other) if alpha == 1 else narrowed(ctx, EW.SUB, input, scaled(ctx, other, alpha))


@converter(torch.rsub)
def rsub(ctx: Context, input, other, alpha=1):
    return sub(ctx, other, input, alpha)


@converter(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, prims.mul)
def mul(ctx: Context, input, other):
    return binary(ctx, EW.PROD, input, other)


@converter(torch.maximum, Tensor.maximum, prims.maximum)
def maximum(ctx: Context, input, other):
    return binary(ctx, EW.MAX, input, other)


@converter(torch.minimum, Tensor.minimum, prims.minimum)
def minimum(ctx: Context, input, other):
    return binary(ctx, EW.MIN, input, other)


@converter(torch.fmax, Tensor.fmax, prims.fmax)
def fmax(ctx: Context, input, other):
    return without_nan(ctx, EW.MAX, input, other)


@converter(torch.fmin, Tensor.fmin, prims.fmin)
def fmin(ctx: Context, input, other):
    return without_nan(ctx, EW.MIN, input, other)


def without_nan(ctx: Context, op, a, b):
    """The other side where one is NaN: what a comparison with it says, which is false, chooses the second one."""
    dtype = ctx.out.dtype
    if not dtype.is_floating_point:
        return binary(ctx, op, a, b)
    a, b = cast(ctx, a, dtype), cast(ctx, b, dtype)
    first = elementwise(ctx, EW.GREATER if op == EW.MAX else EW.LESS, a, b)
    return select(ctx, logical_or(ctx, first, unary(ctx, Unary.ISNAN, b)), a, b)


# Powers --------------------------------------------------------------------------------------------------------------


@converter(torch.pow, Tensor.pow, prims.pow)
def pow_op(ctx: Context, input, exponent):
    """Powers of integers are exact products; a negative tensor exponent gives 0, where torch gives 1 / 1 = 1."""
    dtype = ctx.out.dtype
    if isinstance(exponent, Tensor) and exponent.dim() == 0:
        exponent = exponent.item()
    if not isinstance(exponent, (int, float)):
        return power(ctx, input, exponent)
    if not dtype.is_floating_point and exponent >= 1:
        x = product(ctx, cast(ctx, input, wide(dtype)), exponent)
        return wrapped(ctx, x, dtype) if dtype in BYTES else x
    if not dtype.is_floating_point:
        return power(ctx, input, exponent)
    if exponent in (1, 2, 3):
        return product(ctx, cast(ctx, input, dtype), int(exponent))
    if abs(exponent) == 0.5 or exponent in (-1, -2):
        x = cast(ctx, input, wide(dtype))
        x = unary(ctx, Unary.SQRT, x) if abs(exponent) == 0.5 else product(ctx, x, -int(exponent))
        return cast(ctx, unary(ctx, Unary.RECIP, x) if exponent < 0 else x, dtype)
    return power(ctx, input, exponent)


def power(ctx: Context, input, exponent):
    dtype = ctx.out.dtype
    if rounds_powers_wrong(dtype):
        return cast(ctx, elementwise(ctx, EW.POW, input, exponent, wide(dtype)), dtype)
    return binary(ctx, EW.POW, input, exponent)


def product(ctx: Context, x, exponent):
    """A power with a positive integer exponent, by squaring."""
    result = None
    while True:
        if exponent & 1:
            result = x if result is None else elementwise(ctx, EW.PROD, result, x)
        exponent >>= 1
        if not exponent:
            return result
        x = elementwise(ctx, EW.PROD, x, x)


@converter(torch.square, Tensor.square)
def square(ctx: Context, input):
    return pow_op(ctx, input, 2)


# Rounding ------------------------------------------------------------------------------------------------------------


@converter(torch.floor, Tensor.floor, prims.floor)
def floor(ctx: Context, input):
    return unary(ctx, Unary.FLOOR, input) if ctx.out.dtype.is_floating_point else input


@converter(torch.ceil, Tensor.ceil, prims.ceil)
def ceil(ctx: Context, input):
    return unary(ctx, Unary.CEIL, input) if ctx.out.dtype.is_floating_point else input


@converter(torch.round, Tensor.round, torch.special.round, prims.round)
def round_op(ctx: Context, input, *, decimals=0):
    dtype = ctx.out.dtype
    if not dtype.is_floating_point:
        return input
    if not decimals:
        return unary(ctx, Unary.ROUND, input)
    there, back = (EW.PROD, EW.DIV) if decimals > 0 else (EW.DIV, EW.PROD)
    power = 10.0 ** abs(decimals)
    x = unary(ctx, Unary.ROUND, elementwise(ctx, there, cast(ctx, input, wide(dtype)), power))
    return cast(ctx, elementwise(ctx, back, x, power), dtype)


@converter(torch.trunc, Tensor.trunc, torch.fix, Tensor.fix, prims.trunc)
def trunc(ctx: Context, input):
    return truncated(ctx, input) if ctx.out.dtype.is_floating_point else input


@converter(torch.frac, Tensor.frac)
def frac(ctx: Context, input):
    return elementwise(ctx, EW.SUB, input, truncated(ctx, input))


def truncated(ctx: Context, x):
    """Towards zero: up below it, down above."""
    return select(ctx, less(ctx, x, 0), unary(ctx, Unary.CEIL, x), unary(ctx, Unary.FLOOR, x))


# Bounds --------------------------------------------------------------------------------------------------------------


@converter(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip)
def clamp_op(ctx: Context, input, min=None, max=None):
    dtype = ctx.out.dtype
    return cast(ctx, clamp(ctx, input, min, max, wide(dtype) if dtype in BYTES else dtype), dtype)


@converter(torch.clamp_min, Tensor.clamp_min)
def clamp_min(ctx: Context, input, min):
    return binary(ctx, EW.MAX, input, min)


@converter(torch.clamp_max, Tensor.clamp_max)
def clamp_max(ctx: Context, input, max):
    return binary(ctx, EW.MIN, input, max)


# Several operands ----------------------------------------------------------------------------------------------------


@converter(torch.lerp, Tensor.lerp)
def lerp(ctx: Context, input, end, weight):
    """A constant weight counts from the nearer end, as torch's does, so that both ends are met exactly."""
    dtype = wide(ctx.out.dtype)
    step = elementwise(ctx, EW.SUB, end, input, dtype)
    if isinstance(weight, (int, float)) and abs(weight) >= 0.5:
        return narrowed(ctx, EW.SUB, end, elementwise(ctx, EW.PROD, step, 1 - weight, dtype))
    return narrowed(ctx, EW.SUM, input, elementwise(ctx, EW.PROD, step, weight, dtype))


@converter(torch.addcmul, Tensor.addcmul)
def addcmul(ctx: Context, input, tensor1, tensor2, *, value=1):
    term = elementwise(ctx, EW.PROD, scaled(ctx, tensor1, value), tensor2, wide(ctx.out.dtype))
    return narrowed(ctx, EW.SUM, input, term)


@converter(torch.addcdiv, Tensor.addcdiv)
def addcdiv(ctx: Context, input, tensor1, tensor2, *, value=1):
    term = elementwise(ctx, EW.DIV, scaled(ctx, tensor1, value), tensor2, wide(ctx.out.dtype))
    return narrowed(ctx, EW.SUM, input, term)


@converter(torch.hypot, Tensor.hypot, prims.hypot)
def hypot(ctx: Context, input, other):
    """The longer side times sqrt(1 + ratio**2), which neither overflows nor vanishes on the way.

    Infinity where a side is infinite, even if the other one is NaN.
    """
    dtype = wide(ctx.out.dtype)
    a, b = (unary(ctx, Unary.ABS, cast(ctx, x, dtype)) for x in (input, other))
    longer, shorter = elementwise(ctx, EW.MAX, a, b), elementwise(ctx, EW.MIN, a, b)
    ratio = select(ctx, equal(ctx, a, b), 1.0, elementwise(ctx, EW.DIV, shorter, longer))
    length = unary(ctx, Unary.SQRT, elementwise(ctx, EW.SUM, elementwise(ctx, EW.PROD, ratio, ratio), 1.0))
    infinite = logical_or(ctx, *(equal(ctx, x, math.inf) for x in (a, b)))
    return cast(ctx, select(ctx, infinite, math.inf, elementwise(ctx, EW.PROD, longer, length)), ctx.out.dtype)
