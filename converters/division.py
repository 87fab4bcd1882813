import math

from torch2rt.converters.arithmetic import as_recorded, binary, is_half, rounded, truncated

from torch2rt.vocabulary import (
    Context,
    cast,
    converter,
    dims,
    elementwise,
    equal,
    greater,
    is_symbolic,
    less,
    select,
    torch,
    trt,
    unary,
    wide,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor, prims = torch.Tensor, torch.ops.prims


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
