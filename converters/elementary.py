import math

from torch2rt.vocabulary import (
    Context,
    activation,
    add,
    cast,
    check,
    clamp,
    converter,
    div,
    elementwise,
    greater,
    is_negative,
    less,
    logical_and,
    mul,
    named,
    select,
    sub,
    torch,
    trt,
    unary,
    wide,
)

EW, Kind, Unary = trt.ElementWiseOperation, trt.ActivationType, trt.UnaryOperation
Tensor = torch.Tensor

# One layer -----------------------------------------------------------------------------------------------------------

FLOAT = {
    Unary.EXP: ("exp",),
    Unary.LOG: ("log",),
    Unary.SQRT: ("sqrt",),
    Unary.RECIP: ("reciprocal",),
    Unary.SIN: ("sin",),
    Unary.COS: ("cos",),
    Unary.TAN: ("tan",),
    Unary.SINH: ("sinh",),
    Unary.COSH: ("cosh",),
    Unary.ASIN: ("asin", "arcsin"),
    Unary.ACOS: ("acos", "arccos"),
    Unary.ATAN: ("atan", "arctan"),
    Unary.ASINH: ("asinh", "arcsinh"),
    Unary.ACOSH: ("acosh", "arccosh"),
    Unary.ATANH: ("atanh", "arctanh"),
    Unary.ERF: ("erf",),
}
SIGNED = {Unary.ABS: ("abs", "absolute")}


def _float(op, names):
    def convert(ctx: Context, input):
        return unary(ctx, op, cast(ctx, input, ctx.out.dtype))

    return convert


def _signed(op, names):
    def convert(ctx: Context, input):
        dtype = ctx.out.dtype
        if dtype in (torch.int8, torch.uint8, torch.bool):
            return cast(ctx, unary(ctx, op, cast(ctx, input, torch.int32)), dtype)
        return unary(ctx, op, input)

    return convert


for table, make in ((FLOAT, _float), (SIGNED, _signed)):
    for op, names in table.items():
        function = make(op, names)
        function.__name__ = names[0]
        converter(*named(*names))(function)


@converter(*named("sign", "sgn"))
def sign(ctx: Context, input):
    """Of a NaN, torch makes 0."""
    dtype = ctx.out.dtype
    x = cast(ctx, input, dtype if dtype.is_floating_point else wide(dtype))
    x = unary(ctx, Unary.SIGN, x)
    if dtype.is_floating_point:
        x = select(ctx, unary(ctx, Unary.ISNAN, x), 0.0, x, dtype)
    return cast(ctx, x, dtype)


@converter(*named("neg", "negative"))
def neg(ctx: Context, input):
    """A byte goes through int32; 0 apart, the negative of an unsigned one is 256 - x."""
    dtype = ctx.out.dtype
    x = cast(ctx, input, wide(dtype)) if dtype in (torch.int8, torch.uint8) else input
    if dtype is torch.uint8:
        x = select(ctx, elementwise(ctx, EW.EQUAL, x, 0), 0, sub(ctx, 256, x), torch.int32)
    else:
        x = unary(ctx, Unary.NEG, x)
    return cast(ctx, x, dtype)


@converter(torch.positive, Tensor.positive)
def positive(ctx: Context, input):
    return input


# Compositions --------------------------------------------------------------------------------------------------------


def composed(*targets):
    """Register a function of one float tensor that is given it in float32 if it is of half precision."""

    def register(function):
        def convert(ctx: Context, input):
            return cast(ctx, function(ctx, cast(ctx, input, wide(ctx.out.dtype))), ctx.out.dtype)

        convert.__name__, convert.__doc__ = function.__name__, function.__doc__
        return converter(*targets)(convert)

    return register


@composed(*named("rsqrt"))
def rsqrt(ctx: Context, x):
    return unary(ctx, Unary.RECIP, unary(ctx, Unary.SQRT, x))


@composed(*named("exp2"))
def exp2(ctx: Context, x):
    return elementwise(ctx, EW.POW, 2.0, x)


@composed(*named("expm1"))
def expm1(ctx: Context, x):
    """tanh(x / 2) * (exp(x) + 1), in which nothing cancels near 0."""
    half = activation(ctx, Kind.TANH, mul(ctx, x, 0.5))
    return mul(ctx, half, add(ctx, unary(ctx, Unary.EXP, x), 1.0))


@composed(*named("log1p"))
def log1p(ctx: Context, x):
    return log_one_plus(ctx, x)


def log_one_plus(ctx: Context, x):
    """log(1 + x), and near 0, where the sum would lose x, 2 * atanh(x / (2 + x))."""
    ratio = div(ctx, x, add(ctx, x, 2.0))
    near = mul(ctx, unary(ctx, Unary.ATANH, ratio), 2.0)
    far = unary(ctx, Unary.LOG, add(ctx, x, 1.0))
    return select(ctx, less(ctx, unary(ctx, Unary.ABS, x), 0.5), near, far)


@composed(*named("log2"))
def log2(ctx: Context, x):
    return mul(ctx, unary(ctx, Unary.LOG, x), 1 / math.log(2))


@composed(*named("log10"))
def log10(ctx: Context, x):
    return mul(ctx, unary(ctx, Unary.LOG, x), 1 / math.log(10))


ERFC = -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223


@composed(*named("erfc"))
def erfc(ctx: Context, x):
    """1 - erf(x) loses the tail; the approximation of Numerical Recipes' erfcc is good to 1.2e-7 of the result."""
    size = unary(ctx, Unary.ABS, x)
    t = div(ctx, 2.0, add(ctx, size, 2.0))
    series = 0.17087277
    for c in ERFC:
        series = add(ctx, mul(ctx, t, series), c)
    exponent = sub(ctx, series, mul(ctx, size, size))
    tail = mul(ctx, t, unary(ctx, Unary.EXP, exponent))
    return select(ctx, less(ctx, x, 0), sub(ctx, 2.0, tail), tail)


@composed(*named("sinc"))
def sinc(ctx: Context, x):
    angle = mul(ctx, x, math.pi)
    ratio = div(ctx, unary(ctx, Unary.SIN, angle), angle)
    return select(ctx, elementwise(ctx, EW.EQUAL, x, 0), 1.0, ratio)


@composed(*named("deg2rad"))
def deg2rad(ctx: Context, x):
    return mul(ctx, x, math.pi / 180)


@composed(*named("rad2deg"))
def rad2deg(ctx: Context, x):
    return mul(ctx, x, 180 / math.pi)


@converter(*named("logit"), limits="eps up to 0.5")
def logit(ctx: Context, input, eps=None):
    dtype = wide(ctx.out.dtype)
    x = cast(ctx, input, dtype)
    if eps is not None and eps >= 0:
        check(eps <= 0.5, f"{eps=} puts the lower bound above the upper one")
        x = clamp(ctx, x, eps, 1 - eps)
    odds = div(ctx, x, sub(ctx, 1.0, x))
    return cast(ctx, unary(ctx, Unary.LOG, odds), ctx.out.dtype)


# Two operands --------------------------------------------------------------------------------------------------------


@converter(*named("atan2", "arctan2"))
def atan2(ctx: Context, input, other):
    """The angle of the magnitudes, mirrored to the left side and then to the lower one, where -0.0 lies, too."""
    dtype = wide(ctx.out.dtype)
    y, x = cast(ctx, input, dtype), cast(ctx, other, dtype)
    rise, run = unary(ctx, Unary.ABS, y), unary(ctx, Unary.ABS, x)
    equal = select(ctx, elementwise(ctx, EW.EQUAL, rise, 0), 0.0, 1.0, dtype)  # two zeros or infinities have no ratio
    slope = select(ctx, elementwise(ctx, EW.EQUAL, rise, run), equal, div(ctx, rise, run))
    angle = unary(ctx, Unary.ATAN, slope)
    angle = select(ctx, is_negative(ctx, x), sub(ctx, math.pi, angle), angle)
    return cast(ctx, select(ctx, is_negative(ctx, y), unary(ctx, Unary.NEG, angle), angle), ctx.out.dtype)


@converter(*named("xlogy"))
def xlogy(ctx: Context, input, other):
    return vanishing(ctx, input, other, lambda y: unary(ctx, Unary.LOG, y))


@converter(torch.special.xlog1py)
def xlog1py(ctx: Context, input, other):
    return vanishing(ctx, input, other, lambda y: log_one_plus(ctx, y))


def vanishing(ctx: Context, x, y, log):
    """`x * log(y)`, which is 0 with x for any y but NaN."""
    dtype = wide(ctx.out.dtype)
    y = cast(ctx, y, dtype)
    product = mul(ctx, x, log(y), dtype)
    if not isinstance(x, (int, float)) or x == 0:
        known = elementwise(ctx, EW.EQUAL, y, y)
        nothing = logical_and(ctx, elementwise(ctx, EW.EQUAL, x, 0), known)
        product = select(ctx, nothing, 0.0, product)
    return cast(ctx, product, ctx.out.dtype)


@converter(torch.heaviside, Tensor.heaviside)
def heaviside(ctx: Context, input, values):
    step = cast(ctx, greater(ctx, input, 0), ctx.out.dtype)
    return select(ctx, elementwise(ctx, EW.EQUAL, input, 0), values, step)


@converter(torch.copysign, Tensor.copysign)
def copysign(ctx: Context, input, other):
    """A NaN counts as positive."""
    dtype = ctx.out.dtype
    size = unary(ctx, Unary.ABS, cast(ctx, input, dtype))
    if isinstance(other, (int, float)):
        return unary(ctx, Unary.NEG, size) if math.copysign(1, other) < 0 else size
    return select(ctx, is_negative(ctx, cast(ctx, other, dtype)), unary(ctx, Unary.NEG, size), size)
