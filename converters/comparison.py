from torch2rt.vocabulary import (
    cast,
    check,
    converter,
    dtype_of,
    elementwise,
    result_type,
    select,
    torch,
    trt,
    unary,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor, prims = torch.Tensor, torch.ops.prims


# Comparing -----------------------------------------------------------------------------------------------------------


def compare(ctx, op, a, b):
    """One comparison in torch's common dtype; bytes are compared as int32."""
    dtype = result_type(ctx, a, b)
    if dtype in (torch.int8, torch.uint8):
        a, b = (x if isinstance(x, trt.ITensor) else torch.as_tensor(x).to(dtype) for x in (a, b))
        dtype = torch.int32
    return elementwise(ctx, op, a, b, dtype)


def inverted(ctx, x):
    return unary(ctx, Unary.NOT, x)


def or_equal(ctx, op, a, b):
    """TensorRT has no GREATER_EQUAL or LESS_EQUAL; of floats, "not less" would be true of a NaN."""
    if result_type(ctx, a, b).is_floating_point:
        return elementwise(ctx, EW.OR, compare(ctx, op, a, b), compare(ctx, EW.EQUAL, a, b))
    return inverted(ctx, compare(ctx, EW.LESS if op == EW.GREATER else EW.GREATER, a, b))


@converter(torch.eq, Tensor.eq, Tensor.__eq__, prims.eq)
def eq(ctx, input, other):
    return compare(ctx, EW.EQUAL, input, other)


@converter(torch.ne, Tensor.ne, torch.not_equal, Tensor.not_equal, prims.ne)
def ne(ctx, input, other):
    return inverted(ctx, compare(ctx, EW.EQUAL, input, other))


@converter(torch.gt, Tensor.gt, torch.greater, Tensor.greater, prims.gt)
def gt(ctx, input, other):
    return compare(ctx, EW.GREATER, input, other)


@converter(torch.lt, Tensor.lt, torch.less, Tensor.less, prims.lt)
def lt(ctx, input, other):
    return compare(ctx, EW.LESS, input, other)


@converter(torch.ge, Tensor.ge, torch.greater_equal, Tensor.greater_equal, prims.ge)
def ge(ctx, input, other):
    return or_equal(ctx, EW.GREATER, input, other)


@converter(torch.le, Tensor.le, torch.less_equal, Tensor.less_equal, prims.le)
def le(ctx, input, other):
    return or_equal(ctx, EW.LESS, input, other)


# Choosing ------------------------------------------------------------------------------------------------------------


def choose(ctx, condition, a, b):
    """A select in the recorded dtype; TensorRT does not select among bytes."""
    dtype = ctx.out.dtype
    if dtype in (torch.int8, torch.uint8):
        a, b = (x if isinstance(x, trt.ITensor) else torch.as_tensor(x).to(dtype) for x in (a, b))
        return cast(ctx, select(ctx, condition, a, b, torch.int32), dtype)
    return select(ctx, condition, a, b, dtype)


@converter(torch.where, prims.where)
def where(ctx, condition, input, other):
    return choose(ctx, condition, input, other)


@converter(Tensor.where)
def where_method(ctx, input, condition, other):
    return choose(ctx, condition, input, other)


@converter(torch.masked_fill, Tensor.masked_fill)
def masked_fill(ctx, input, mask, value):
    return choose(ctx, mask, value, input)


# Kinds of numbers ----------------------------------------------------------------------------------------------------


def always(ctx, x, answer):
    """The answer for every element."""
    x = cast(ctx, x, torch.bool)
    return elementwise(ctx, EW.OR if answer else EW.AND, x, answer)


@converter(torch.isnan, Tensor.isnan)
def isnan(ctx, input):
    return unary(ctx, Unary.ISNAN, input) if dtype_of(input).is_floating_point else always(ctx, input, False)


@converter(torch.isinf, Tensor.isinf)
def isinf(ctx, input):
    return unary(ctx, Unary.ISINF, input) if dtype_of(input).is_floating_point else always(ctx, input, False)


@converter(torch.isposinf, Tensor.isposinf)
def isposinf(ctx, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, False)
    return elementwise(ctx, EW.EQUAL, input, float("inf"))


@converter(torch.isneginf, Tensor.isneginf)
def isneginf(ctx, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, False)
    return elementwise(ctx, EW.EQUAL, input, float("-inf"))


@converter(torch.isfinite, Tensor.isfinite, prims.isfinite)
def isfinite(ctx, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, True)
    return elementwise(ctx, EW.LESS, unary(ctx, Unary.ABS, input), float("inf"))


@converter(torch.isreal, Tensor.isreal)
def isreal(ctx, input):
    return always(ctx, input, True)


@converter(torch.nan_to_num, Tensor.nan_to_num)
def nan_to_num(ctx, input, nan=None, posinf=None, neginf=None):
    dtype = ctx.out.dtype
    if not dtype.is_floating_point:
        return input
    limits = torch.finfo(dtype)
    x = select(ctx, unary(ctx, Unary.ISNAN, input), 0.0 if nan is None else nan, input, dtype)
    x = select(ctx, isposinf(ctx, input), limits.max if posinf is None else posinf, x, dtype)
    return select(ctx, isneginf(ctx, input), limits.min if neginf is None else neginf, x, dtype)


@converter(torch.signbit, Tensor.signbit, prims.signbit)
def signbit(ctx, input):
    """The reciprocal tells -0.0 from 0.0. A NaN counts as positive."""
    if not dtype_of(input).is_floating_point:
        return compare(ctx, EW.LESS, input, 0) if dtype_of(input) is not torch.bool else always(ctx, input, False)
    sign = elementwise(ctx, EW.MIN, input, unary(ctx, Unary.RECIP, input))
    return elementwise(ctx, EW.LESS, sign, 0)


# Logic ---------------------------------------------------------------------------------------------------------------


@converter(torch.logical_and, Tensor.logical_and)
def logical_and(ctx, input, other):
    return elementwise(ctx, EW.AND, input, other, torch.bool)


@converter(torch.logical_or, Tensor.logical_or)
def logical_or(ctx, input, other):
    return elementwise(ctx, EW.OR, input, other, torch.bool)


@converter(torch.logical_xor, Tensor.logical_xor)
def logical_xor(ctx, input, other):
    return elementwise(ctx, EW.XOR, input, other, torch.bool)


@converter(torch.logical_not, Tensor.logical_not)
def logical_not(ctx, input):
    return inverted(ctx, cast(ctx, input, torch.bool))


# Bits ----------------------------------------------------------------------------------------------------------------

AS_BOOL = "TensorRT has no bitwise layers: bools are supported, integers not"


@converter(
    torch.bitwise_and, Tensor.bitwise_and, Tensor.__and__, prims.bitwise_and,
    limits="bools; integers with a mask 2**n - 1",
)  # fmt: skip
def bitwise_and(ctx, input, other):
    """Of an integer, the lowest bits are what remains of a division."""
    if ctx.out.dtype is torch.bool:
        return elementwise(ctx, EW.AND, input, other)
    x, mask = (other, input) if isinstance(input, int) else (input, other)
    low_bits = isinstance(mask, int) and 0 < mask < torch.iinfo(ctx.out.dtype).max and mask & (mask + 1) == 0
    check(low_bits, f"{AS_BOOL}, but for masks of the form 2**n - 1")
    x = cast(ctx, x, _integer(ctx.out.dtype))
    high = elementwise(ctx, EW.PROD, elementwise(ctx, EW.FLOOR_DIV, x, mask + 1), mask + 1)
    return cast(ctx, elementwise(ctx, EW.SUB, x, high), ctx.out.dtype)


@converter(torch.bitwise_or, Tensor.bitwise_or, Tensor.__or__, prims.bitwise_or, limits="bools only")
def bitwise_or(ctx, input, other):
    check(ctx.out.dtype is torch.bool, AS_BOOL)
    return elementwise(ctx, EW.OR, input, other)


@converter(torch.bitwise_xor, Tensor.bitwise_xor, Tensor.__xor__, prims.bitwise_xor, limits="bools only")
def bitwise_xor(ctx, input, other):
    check(ctx.out.dtype is torch.bool, AS_BOOL)
    return elementwise(ctx, EW.XOR, input, other)


@converter(torch.bitwise_not, Tensor.bitwise_not, Tensor.__invert__, prims.bitwise_not)
def bitwise_not(ctx, input):
    """Of an integer, -1 - x, or 255 - x of an unsigned byte."""
    dtype = ctx.out.dtype
    if dtype is torch.bool:
        return inverted(ctx, input)
    x = elementwise(ctx, EW.SUB, 255 if dtype is torch.uint8 else -1, cast(ctx, input, _integer(dtype)))
    return cast(ctx, x, dtype)


@converter(
    torch.bitwise_left_shift, Tensor.bitwise_left_shift, Tensor.__lshift__, prims.shift_left, limits="by constants"
)  # fmt: skip
def left_shift(ctx, input, other):
    return elementwise(ctx, EW.PROD, input, _power_of_two(ctx, other), ctx.out.dtype)


@converter(
    torch.bitwise_right_shift, Tensor.bitwise_right_shift, Tensor.__rshift__, prims.shift_right_arithmetic,
    limits="by constants",
)  # fmt: skip
def right_shift(ctx, input, other):
    return elementwise(ctx, EW.FLOOR_DIV, input, _power_of_two(ctx, other), ctx.out.dtype)


def _power_of_two(ctx, shift):
    dtype = ctx.out.dtype
    check(isinstance(shift, (int, Tensor)), "TensorRT has no shift layers; shifts by constants are supported")
    check(dtype in (torch.int32, torch.int64), f"shifts of {dtype} are not supported; cast to int32")
    shift, largest = torch.as_tensor(shift), torch.iinfo(dtype).bits - 2
    check(bool(((shift >= 0) & (shift <= largest)).all()), f"shifts of {dtype} are supported from 0 to {largest}")
    return torch.bitwise_left_shift(torch.ones_like(shift), shift).to(dtype)


def _integer(dtype):
    return torch.int32 if dtype in (torch.int8, torch.uint8) else dtype
