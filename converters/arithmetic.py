import math

from torch2rt.vocabulary import (
    Context,
    cast,
    clamp,
    converter,
    dims,
    elementwise,
    equal,
    floor_div,
    greater,
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


# Division ------------------------------------------------------------------------------------------------------------


@converter(torch.div, Tensor.div, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide)
def div(ctx: Context, input, other, *, rounding_mode=None):
    if rounding_mode == "floor":
        return floor_divide(ctx, input, other)
    if rounding_mode == "trunc" and ctx.out.dtype.is_floating_point:
        return quotient_to_zero(ctx, input, other)
    return binary(ctx, EW.DIV, input, other)


def quotient_to_zero(ctx: Context, a, b):
    """Of half precision, torch truncates the rounded quotient, but by a single number that in float32."""
    dtype = ctx.out.dtype
    quotient = elementwise(ctx, EW.DIV, a, b, wide(dtype))
    if all(not is_symbolic(size) and size == 1 for size in dims(ctx, b)):
        return cast(ctx, truncated(ctx, quotient), dtype)
    return truncated(ctx, cast(ctx, quotient, dtype))


@converter(prims.div)
def prims_div(ctx: Context, a, b):
    return binary(ctx, EW.DIV, a, b)


@converter(torch.floor_divide, Tensor.floor_divide)
def floor_divide(ctx: Context, input, other):
    """Of floats, torch takes the remainder off first: 1.0 // 0.1 is 9, and an infinite dividend gives NaN."""
    dtype = ctx.out.dtype
    if not dtype.is_floating_point:
        return binary(ctx, EW.FLOOR_DIV, input, other)
    if is_half(dtype):
        (input,) = as_recorded(ctx, input)
    a, b = as_floats(ctx, input, other)
    left = signed_remainder(ctx, a, b, dtype)
    exact = elementwise(ctx, EW.DIV, elementwise(ctx, EW.SUB, a, left), b)
    exact = select(ctx, sign_differs(ctx, left, b), elementwise(ctx, EW.SUB, exact, 1), exact)
    whole = unary(ctx, Unary.FLOOR, exact)
    rounded_down = greater(ctx, elementwise(ctx, EW.SUB, exact, whole), 0.5)
    whole = select(ctx, rounded_down, elementwise(ctx, EW.SUM, whole, 1), whole)
    quotient = elementwise(ctx, EW.DIV, a, b)
    whole = select(ctx, equal(ctx, exact, 0), elementwise(ctx, EW.PROD, quotient, 0), whole)
    return cast(ctx, select(ctx, equal(ctx, b, 0), quotient, whole), dtype)


def is_half(dtype):
    return dtype.is_floating_point and wide(dtype) is not dtype


def rounded(number, dtype):
    return torch.tensor(number).to(dtype).item()


def as_recorded(ctx: Context, *values):
    """Numbers as the recorded dtype holds them, as torch takes a remainder of half precision or bytes by them."""
    dtype = ctx.out.dtype
    narrow = is_half(dtype) or dtype in BYTES
    return [rounded(v, dtype) if narrow and isinstance(v, (int, float)) else v for v in values]


def as_floats(ctx: Context, a, b):
    """The operands of a division in the dtype it is composed in; a divisor that is one number stays a number."""
    dtype = wide(ctx.out.dtype)
    if isinstance(b, Tensor) and b.dim() == 0:
        b = b.item()
    a, b = (cast(ctx, x, ctx.out.dtype) if isinstance(x, (trt.ITensor, Tensor)) else x for x in (a, b))
    return cast(ctx, a, dtype), rounded(b, dtype) if isinstance(b, (int, float)) else cast(ctx, b, dtype)


@converter(torch.remainder, Tensor.remainder, prims.remainder)
def remainder(ctx: Context, input, other):
    """With the sign of the divisor; an infinite divisor of the other sign is the result itself."""
    dtype = ctx.out.dtype
    input, other = as_recorded(ctx, input, other)
    if not dtype.is_floating_point:
        return cast(ctx, left_over(ctx, EW.FLOOR_DIV, input, other, wide(dtype)), dtype)
    a, b = as_floats(ctx, input, other)
    left = signed_remainder(ctx, a, b, dtype)
    return cast(ctx, select(ctx, sign_differs(ctx, left, b), elementwise(ctx, EW.SUM, left, b), left), dtype)


@converter(torch.fmod, Tensor.fmod, prims.fmod)
def fmod(ctx: Context, input, other):
    """With the sign of the dividend."""
    dtype = ctx.out.dtype
    input, other = as_recorded(ctx, input, other)
    if not dtype.is_floating_point:
        return cast(ctx, left_over(ctx, EW.DIV, input, other, wide(dtype)), dtype)
    a, b = as_floats(ctx, input, other)
    return cast(ctx, signed_remainder(ctx, a, b, dtype), dtype)


def left_over(ctx: Context, division, a, b, dtype):
    """What a division of integers leaves."""
    whole = elementwise(ctx, EW.PROD, elementwise(ctx, division, a, b, dtype), b, dtype)
    return elementwise(ctx, EW.SUB, a, whole, dtype)


def sign_differs(ctx: Context, left, b):
    """Whether a remainder with the sign of the dividend has not that of the divisor."""
    if isinstance(b, (int, float)):
        return elementwise(ctx, EW.GREATER if b < 0 else EW.LESS, left, 0)
    below, above = less(ctx, left, 0), greater(ctx, left, 0)
    negative = less(ctx, b, 0)
    return select(ctx, negative, above, below)


def signed_remainder(ctx: Context, a, b, dtype):
    """What C's `fmod` gives: the exact remainder of two floats, with the sign of the dividend.

    Both are halved first, so that no product overflows. A dividend that is smaller than the divisor is the result.
    """
    size = unary(ctx, Unary.ABS, a)
    divisor = abs(b) if isinstance(b, (int, float)) else unary(ctx, Unary.ABS, b)
    half = elementwise(ctx, EW.PROD, size, 0.5)
    if isinstance(b, (int, float)):
        left = divided_by_number(ctx, half, divisor / 2, dtype)
        halved = divisor / 2
    else:
        halved = elementwise(ctx, EW.PROD, divisor, 0.5)
        left = divided_by_tensor(ctx, half, halved, dtype)
    left = select(ctx, less(ctx, left, 0), elementwise(ctx, EW.SUM, left, halved), left)
    left = elementwise(ctx, EW.PROD, left, 2)
    left = select(ctx, less(ctx, a, 0), unary(ctx, Unary.NEG, left), left)
    return select(ctx, less(ctx, size, divisor), a, left)


def divided_by_number(ctx: Context, x, b, dtype):
    """What long division leaves of x, from -b / 2 to b / 2: each step takes off 12 more bits of the quotient.

    The divisor is a sum of two numbers of 12 bits, so their products with 12 bits of the quotient are exact.
    """
    if b == 0 or not math.isfinite(b):
        return elementwise(ctx, EW.PROD, x, math.nan)
    largest = math.log2(torch.finfo(dtype).max / 2 / b)
    mantissa, exponent = math.frexp(b)
    high = math.ldexp(round(math.ldexp(mantissa, 12)), exponent - 12)
    exact = mantissa == 0.5 and b >= 0.5  # a power of two, whose quotients and products are not rounded
    for shift in [0] if exact else shifts(largest, 11):
        whole = unary(ctx, Unary.ROUND, elementwise(ctx, EW.DIV, x, math.ldexp(b, shift)))
        for part in filter(None, (high, b - high)):
            x = elementwise(ctx, EW.SUB, x, elementwise(ctx, EW.PROD, whole, math.ldexp(part, shift)))
    return x


def shifts(largest, bits):
    """By how many bits to shift the divisor in each step, with a quotient up to 2**largest and `bits` of it a step."""
    top = max(math.ceil(largest) - bits, 0)
    return [*range(top, 0, -bits - 1), 0]


def divided_by_tensor(ctx: Context, x, b, dtype):
    """As `divided_by_number`: half precision has few enough bits already, float32 is a sum of 8 bits and 16.

    The quotient may have 254 bits, while factors end at 2**127: first what is below 2 is shifted up by 126 bits.
    """
    if dtype is torch.float16:
        return long_division(ctx, x, [b], 41, 12)
    bits = 15 if dtype is torch.bfloat16 else 8
    raised = select(ctx, less(ctx, b, 2), elementwise(ctx, EW.PROD, b, 2.0**126), b)
    for divisor in (raised, b):
        x = long_division(ctx, x, parts_of(ctx, divisor, dtype), 127, bits)
    return x


def parts_of(ctx: Context, b, dtype):
    if dtype is torch.bfloat16:
        return [b]
    high = cast(ctx, cast(ctx, b, torch.bfloat16), torch.float32)
    return [high, elementwise(ctx, EW.SUB, b, high)]


def long_division(ctx: Context, x, parts, largest, bits):
    divisor = parts[0] if len(parts) == 1 else elementwise(ctx, EW.SUM, *parts)
    for shift in shifts(largest, bits):
        factor = 2.0**shift
        whole = unary(ctx, Unary.ROUND, elementwise(ctx, EW.DIV, x, elementwise(ctx, EW.PROD, divisor, factor)))
        for part in parts:
            product = elementwise(ctx, EW.PROD, elementwise(ctx, EW.PROD, whole, part), factor)
            x = elementwise(ctx, EW.SUB, x, product)
    return x


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
