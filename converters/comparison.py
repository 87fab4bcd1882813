from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    converter,
    dims,
    dtype_of,
    elementwise,
    equal,
    floor_div,
    fusion,
    gather,
    is_negative,
    is_symbolic,
    less,
    mul,
    reduce,
    reshape,
    result_type,
    same_size,
    select,
    sub,
    torch,
    trt,
    unary,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor, prims = torch.Tensor, torch.ops.prims


# Comparing -----------------------------------------------------------------------------------------------------------


def compare(ctx: Context, op, a, b):
    """One comparison in torch's common dtype; bytes are compared as int32."""
    dtype = result_type(ctx, a, b)
    if dtype in (torch.int8, torch.uint8):
        a, b = (torch.as_tensor(x) if isinstance(x, (int, float)) else x for x in (a, b))
        a, b = (x if is_symbolic(x) else cast(ctx, x, dtype) for x in (a, b))
        dtype = torch.int32
    return elementwise(ctx, op, a, b, dtype)


def inverted(ctx: Context, x):
    return unary(ctx, Unary.NOT, x)


def or_equal(ctx: Context, op, a, b):
    """TensorRT has no GREATER_EQUAL or LESS_EQUAL; of floats, "not less" would be true of a NaN."""
    if result_type(ctx, a, b).is_floating_point:
        return elementwise(ctx, EW.OR, compare(ctx, op, a, b), compare(ctx, EW.EQUAL, a, b))
    return inverted(ctx, compare(ctx, EW.LESS if op == EW.GREATER else EW.GREATER, a, b))


@converter(torch.eq, Tensor.eq, Tensor.__eq__, prims.eq)
def eq(ctx: Context, input, other):
    return compare(ctx, EW.EQUAL, input, other)


@converter(torch.ne, Tensor.ne, torch.not_equal, Tensor.not_equal, prims.ne)
def ne(ctx: Context, input, other):
    return inverted(ctx, compare(ctx, EW.EQUAL, input, other))


@converter(torch.gt, Tensor.gt, torch.greater, Tensor.greater, prims.gt)
def gt(ctx: Context, input, other):
    return compare(ctx, EW.GREATER, input, other)


@converter(torch.lt, Tensor.lt, torch.less, Tensor.less, prims.lt)
def lt(ctx: Context, input, other):
    return compare(ctx, EW.LESS, input, other)


@converter(torch.ge, Tensor.ge, torch.greater_equal, Tensor.greater_equal, prims.ge)
def ge(ctx: Context, input, other):
    return or_equal(ctx, EW.GREATER, input, other)


@converter(torch.le, Tensor.le, torch.less_equal, Tensor.less_equal, prims.le)
def le(ctx: Context, input, other):
    return or_equal(ctx, EW.LESS, input, other)


# Choosing ------------------------------------------------------------------------------------------------------------


def choose(ctx: Context, condition, a, b):
    """A select in the recorded dtype; TensorRT does not select among bytes."""
    dtype = ctx.out.dtype
    if dtype in (torch.int8, torch.uint8):
        a, b = (x if isinstance(x, trt.ITensor) else torch.as_tensor(x).to(dtype) for x in (a, b))
        return cast(ctx, select(ctx, condition, a, b, torch.int32), dtype)
    return select(ctx, condition, a, b, dtype)


@converter(torch.where, prims.where)
def where(ctx: Context, condition, input, other):
    return choose(ctx, condition, input, other)


@converter(Tensor.where)
def where_method(ctx: Context, input, condition, other):
    return choose(ctx, condition, input, other)


@converter(torch.masked_fill, Tensor.masked_fill)
def masked_fill(ctx: Context, input, mask, value):
    return choose(ctx, mask, value, input)


# Kinds of numbers ----------------------------------------------------------------------------------------------------


def always(ctx: Context, x, answer):
    """The answer for every element."""
    x = cast(ctx, x, torch.bool)
    return elementwise(ctx, EW.OR if answer else EW.AND, x, answer)


@converter(torch.isnan, Tensor.isnan)
def isnan(ctx: Context, input):
    return unary(ctx, Unary.ISNAN, input) if dtype_of(input).is_floating_point else always(ctx, input, False)


@converter(torch.isinf, Tensor.isinf)
def isinf(ctx: Context, input):
    return unary(ctx, Unary.ISINF, input) if dtype_of(input).is_floating_point else always(ctx, input, False)


@converter(torch.isposinf, Tensor.isposinf)
def isposinf(ctx: Context, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, False)
    return equal(ctx, input, float("inf"))


@converter(torch.isneginf, Tensor.isneginf)
def isneginf(ctx: Context, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, False)
    return equal(ctx, input, float("-inf"))


@converter(torch.isfinite, Tensor.isfinite, prims.isfinite)
def isfinite(ctx: Context, input):
    if not dtype_of(input).is_floating_point:
        return always(ctx, input, True)
    return less(ctx, unary(ctx, Unary.ABS, input), float("inf"))


@converter(torch.isreal, Tensor.isreal)
def isreal(ctx: Context, input):
    return always(ctx, input, True)


@converter(torch.nan_to_num, Tensor.nan_to_num)
def nan_to_num(ctx: Context, input, nan=None, posinf=None, neginf=None):
    dtype = ctx.out.dtype
    if not dtype.is_floating_point:
        return input
    limits = torch.finfo(dtype)
    x = select(ctx, unary(ctx, Unary.ISNAN, input), 0.0 if nan is None else nan, input, dtype)
    x = select(ctx, isposinf(ctx, input), limits.max if posinf is None else posinf, x, dtype)
    return select(ctx, isneginf(ctx, input), limits.min if neginf is None else neginf, x, dtype)


@converter(torch.signbit, Tensor.signbit, prims.signbit)
def signbit(ctx: Context, input):
    """A NaN counts as positive."""
    if not dtype_of(input).is_floating_point:
        return compare(ctx, EW.LESS, input, 0) if dtype_of(input) is not torch.bool else always(ctx, input, False)
    return is_negative(ctx, input)


# Logic ---------------------------------------------------------------------------------------------------------------


@converter(torch.logical_and, Tensor.logical_and)
def logical_and(ctx: Context, input, other):
    return elementwise(ctx, EW.AND, input, other, torch.bool)


@converter(torch.logical_or, Tensor.logical_or)
def logical_or(ctx: Context, input, other):
    return elementwise(ctx, EW.OR, input, other, torch.bool)


@converter(torch.logical_xor, Tensor.logical_xor)
def logical_xor(ctx: Context, input, other):
    return elementwise(ctx, EW.XOR, input, other, torch.bool)


@converter(torch.logical_not, Tensor.logical_not)
def logical_not(ctx: Context, input):
    return inverted(ctx, cast(ctx, input, torch.bool))


# Bits ----------------------------------------------------------------------------------------------------------------


@converter(torch.bitwise_and, Tensor.bitwise_and, Tensor.__and__, prims.bitwise_and)
def bitwise_and(ctx: Context, input, other):
    if ctx.out.dtype is torch.bool:
        return elementwise(ctx, EW.AND, input, other)
    return cast(ctx, shared_bits(ctx, *whole(ctx, input, other)), ctx.out.dtype)


@fusion(torch.bitwise_and, Tensor.bitwise_and, Tensor.__and__, torch.logical_and, Tensor.logical_and)
def and_true(fuser, node):
    """A mask "and" one that is true everywhere is the mask, expanded: it may be the same for all queries, say."""
    call = fuser.arguments(node)
    for mask, other in ((call["input"], call["other"]), (call["other"], call["input"])):
        true = fuser.constant(other)
        if true is None or true.dtype is not torch.bool or not true.all() or fuser.constant(mask) is not None:
            continue
        mine, shape = mask.meta["val"], node.meta["val"].shape
        new = len(shape) - mine.dim()
        sizes = [*shape[:new], *(-1 if same_size(a, b) else b for a, b in zip(mine.shape, shape[new:]))]
        if mine.dtype is torch.bool and not any(map(is_symbolic, sizes)):
            fuser.substitute(node, fuser.call(node, node, shape, Tensor.expand, mask, *sizes))
            return


@converter(torch.bitwise_or, Tensor.bitwise_or, Tensor.__or__, prims.bitwise_or)
def bitwise_or(ctx: Context, input, other):
    """The bits that only one integer has, and all of the other one."""
    if ctx.out.dtype is torch.bool:
        return elementwise(ctx, EW.OR, input, other)
    a, b = whole(ctx, input, other)
    alone = sub(ctx, a, shared_bits(ctx, a, b))
    return cast(ctx, add(ctx, alone, b), ctx.out.dtype)


@converter(torch.bitwise_xor, Tensor.bitwise_xor, Tensor.__xor__, prims.bitwise_xor)
def bitwise_xor(ctx: Context, input, other):
    if ctx.out.dtype is torch.bool:
        return elementwise(ctx, EW.XOR, input, other)
    a, b = whole(ctx, input, other)
    shared = shared_bits(ctx, a, b)
    alone = [sub(ctx, x, shared) for x in (a, b)]
    return cast(ctx, add(ctx, *alone), ctx.out.dtype)


def whole(ctx: Context, *values):
    """Integers in the type they are computed in; constants keep the range of the recorded one."""
    dtype = ctx.out.dtype
    return [
        cast(ctx, x if isinstance(x, trt.ITensor) or is_symbolic(x) else torch.as_tensor(x).to(dtype), _integer(dtype))
        for x in values
    ]


def shared_bits(ctx: Context, a, b):
    """The bits that two integers share: TensorRT has no bitwise layers, but it divides.

    Of a mask of the lowest bits, what remains of a division, and of one of all others, what is divided. Else all bits
    that may be shared lie along a dimension of their own.
    """
    x, mask = (b, a) if isinstance(a, Tensor) else (a, b)
    dtype, width = dtype_of(x), torch.iinfo(ctx.out.dtype).bits
    places = list(range(width))
    if isinstance(mask, Tensor) and mask.numel() == 1 and mask.dim() <= len(dims(ctx, x)):
        mask = int(mask)
        if 0 <= mask < torch.iinfo(dtype).max and mask & (mask + 1) == 0:
            return sub(ctx, x, multiples(ctx, x, mask + 1))
        if -torch.iinfo(dtype).max <= mask < 0 and -mask & (-mask - 1) == 0:
            return multiples(ctx, x, -mask)
        places = [k for k in places if mask >> k & 1]
    bits = bits_of(ctx, x, places)
    if not isinstance(mask, int):
        bits = mul(ctx, bits, bits_of(ctx, mask, places))
    signed = ctx.out.dtype.is_signed
    worth = torch.tensor([-(1 << k) if signed and k == width - 1 else 1 << k for k in places], dtype=dtype)
    return reduce(ctx, trt.ReduceOperation.SUM, mul(ctx, bits, worth), -1)


def multiples(ctx: Context, x, unit):
    """The greatest multiples of a number that integers reach."""
    return mul(ctx, floor_div(ctx, x, unit), unit)


def bits_of(ctx: Context, x, places):
    """Bits of integers, along a new last dimension: whether the quotients by powers of two are odd."""
    if isinstance(x, Tensor):
        return x.unsqueeze(-1) >> torch.tensor(places, device=x.device) & 1
    x = shifted_down(ctx, reshape(ctx, x, [*dims(ctx, x), 1]), torch.tensor(places))
    return sub(ctx, x, multiples(ctx, x, 2))


def shifted_down(ctx: Context, x, shift):
    """Quotients by powers of two; the highest is beyond the type, so it takes two divisions."""
    highest = torch.iinfo(dtype_of(x)).bits - 1
    powers = [1 << min(k, highest - 1) for k in range(highest + 1)]
    x = floor_div(ctx, x, _looked_up(ctx, powers, shift, x))
    if isinstance(shift, Tensor) and not bool((shift == highest).any()):
        return x
    return floor_div(ctx, x, _looked_up(ctx, [1] * highest + [2], shift, x))


def _looked_up(ctx: Context, table, shift, like):
    table = torch.tensor(table, dtype=dtype_of(like))
    return table[shift.cpu()] if isinstance(shift, Tensor) else gather(ctx, table, shift, 0)


@converter(torch.bitwise_not, Tensor.bitwise_not, Tensor.__invert__, prims.bitwise_not)
def bitwise_not(ctx: Context, input):
    """Of an integer, -1 - x, or 255 - x of an unsigned byte."""
    dtype = ctx.out.dtype
    if dtype is torch.bool:
        return inverted(ctx, input)
    x = sub(ctx, 255 if dtype is torch.uint8 else -1, cast(ctx, input, _integer(dtype)))
    return cast(ctx, x, dtype)


@converter(
    torch.bitwise_left_shift, Tensor.bitwise_left_shift, Tensor.__lshift__, prims.shift_left, limits="int32, int64"
)
def left_shift(ctx: Context, input, other):
    (x,), bits = whole(ctx, input), torch.iinfo(ctx.out.dtype).bits
    powers = [1 << k for k in range(bits - 1)] + [-(1 << bits - 1)]
    return mul(ctx, x, _looked_up(ctx, powers, _amount(ctx, other), x))


@converter(
    torch.bitwise_right_shift,
    Tensor.bitwise_right_shift,
    Tensor.__rshift__,
    prims.shift_right_arithmetic,
    limits="int32, int64",
)
def right_shift(ctx: Context, input, other):
    (x,) = whole(ctx, input)
    return shifted_down(ctx, x, _amount(ctx, other))


def _amount(ctx: Context, shift):
    """By how many bits to shift; more than there are or less than none are for torch to define, which it does not."""
    dtype = ctx.out.dtype
    check(dtype in (torch.int32, torch.int64), f"shifts of {dtype} are not supported; cast to int32")
    if isinstance(shift, trt.ITensor) or is_symbolic(shift):
        return shift if dtype_of(shift) in (torch.int32, torch.int64) else cast(ctx, shift, torch.int32)
    shift, largest = torch.as_tensor(shift).long(), torch.iinfo(dtype).bits - 1
    check(bool(((shift >= 0) & (shift <= largest)).all()), f"shifts of {dtype} are supported from 0 to {largest}")
    return shift


def _integer(dtype):
    return torch.int32 if dtype in (torch.int8, torch.uint8) else dtype
