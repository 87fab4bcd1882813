import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    activation,
    cast,
    check,
    clamp,
    composite,
    converter,
    dims,
    div,
    elementwise,
    equal,
    greater,
    less,
    logical_or,
    minimum,
    mul,
    reshape,
    select,
    slice_nd,
    sub,
    torch,
    trt,
    unary,
    wide,
    wrap_dim,
)

EW, Kind, Unary = trt.ElementWiseOperation, trt.ActivationType, trt.UnaryOperation
Tensor, aten, nn = torch.Tensor, torch.ops.aten, torch._C._nn


# Layers of their own -------------------------------------------------------------------------------------------------


@converter(torch.relu, Tensor.relu, F.relu)
def relu(ctx: Context, input, inplace=False):
    dtype = ctx.out.dtype if ctx.out.dtype.is_floating_point else wide(ctx.out.dtype)
    return cast(ctx, activation(ctx, Kind.RELU, cast(ctx, input, dtype)), ctx.out.dtype)


@converter(torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.sigmoid)
def sigmoid(ctx: Context, input):
    return activation(ctx, Kind.SIGMOID, cast(ctx, input, ctx.out.dtype))


@converter(torch.tanh, Tensor.tanh, F.tanh, torch.ops.prims.tanh)
def tanh(ctx: Context, input):
    return activation(ctx, Kind.TANH, cast(ctx, input, ctx.out.dtype))


@converter(F.leaky_relu, nn.leaky_relu)
def leaky_relu(ctx: Context, input, negative_slope=0.01, inplace=False):
    """TensorRT adds the slope's part to that above zero, which makes NaN of infinity if the slope is 0."""
    if negative_slope == 0:
        below = mul(ctx, input, 0.0)
        return select(ctx, greater(ctx, input, 0), input, below)
    return activation(ctx, Kind.LEAKY_RELU, input, alpha=negative_slope)


@converter(F.rrelu, torch.rrelu, limits="inference only")
def rrelu(ctx: Context, input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    check(not training, "training=True draws random slopes; call .eval() on the module")
    return activation(ctx, Kind.LEAKY_RELU, input, alpha=(lower + upper) / 2)


@composite(nn.rrelu_with_noise)
def rrelu_with_noise(input, noise, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    return F.rrelu(input, lower, upper, training)


@composite(aten.rrelu_with_noise_functional)
def rrelu_and_noise(input, noise, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    return F.rrelu(input, lower, upper, training), noise.clone()


@converter(torch.prelu, Tensor.prelu)
def prelu(ctx: Context, input, weight):
    """The slopes lie along the channels, at the rank of the input."""
    shape = [1] * len(dims(ctx, input))
    if not shape:
        return select(ctx, at_most(ctx, input, 0), mul(ctx, input, reshape(ctx, weight, ())), input)
    shape[min(1, len(shape) - 1)] = math.prod(dims(ctx, weight))
    return ctx.network.add_parametric_relu(input, reshape(ctx, weight, shape)).get_output(0)


@converter(F.elu)
def elu(ctx: Context, input, alpha=1.0, inplace=False):
    """As a SELU without its scale: TensorRT for RTX cannot build an ELU layer in a network behind a loop.

    Its alpha is 1 always: version 1.6 takes two ELU layers of one input for the same, whatever their alphas.
    """
    smooth = activation(ctx, Kind.SELU, input, alpha=1.0, beta=1.0)
    if alpha == 1:
        return smooth
    return select(ctx, greater(ctx, input, 0), input, mul(ctx, smooth, alpha))


@converter(aten.elu, limits="input_scale > 0")
def scaled_elu(ctx: Context, input, alpha=1, scale=1, input_scale=1):
    if scale == input_scale == 1:
        return elu(ctx, input, alpha)
    check(input_scale > 0, f"{input_scale=} turns the exponential side around; only positive scales are supported")
    x = elu(ctx, mul(ctx, input, input_scale), alpha * input_scale)
    return mul(ctx, x, scale / input_scale)


@converter(F.celu, torch.celu, limits="alpha > 0")
def celu(ctx: Context, input, alpha=1.0, inplace=False):
    check(alpha > 0, f"{alpha=}: only positive values are supported")
    if alpha == 1:
        return elu(ctx, input)
    return mul(ctx, elu(ctx, div(ctx, input, alpha)), alpha)


@converter(F.selu, torch.selu)
def selu(ctx: Context, input, inplace=False):
    return mul(ctx, elu(ctx, input, 1.6732632423543772), 1.0507009873554805)


@converter(F.gelu)
def gelu(ctx: Context, input, approximate="none"):
    return activation(ctx, {"none": Kind.GELU_ERF, "tanh": Kind.GELU_TANH}[approximate], input)


@converter(F.softsign)
def softsign(ctx: Context, input):
    return activation(ctx, Kind.SOFTSIGN, cast(ctx, input, ctx.out.dtype))


@converter(F.hardsigmoid, nn.hardsigmoid)
def hardsigmoid(ctx: Context, input, inplace=False):
    return activation(ctx, Kind.HARD_SIGMOID, input, alpha=1 / 6, beta=0.5)


# Products with a gate ------------------------------------------------------------------------------------------------


@converter(F.silu, nn.silu)
def silu(ctx: Context, input, inplace=False):
    return mul(ctx, input, activation(ctx, Kind.SIGMOID, input))


@converter(F.hardswish, nn.hardswish)
def hardswish(ctx: Context, input, inplace=False):
    gate = activation(ctx, Kind.HARD_SIGMOID, input, alpha=1 / 6, beta=0.5, keep_nan=False)  # the product is NaN anyway
    return mul(ctx, input, gate)


@converter(F.mish, nn.mish)
def mish(ctx: Context, input, inplace=False):
    return mul(ctx, input, activation(ctx, Kind.TANH, activation(ctx, Kind.SOFTPLUS, input, 1.0, 1.0)))


@converter(F.glu, nn.glu)
def glu(ctx: Context, input, dim=-1):
    sizes = dims(ctx, input)
    dim = wrap_dim(dim, len(sizes))
    start, stride = [0] * len(sizes), [1] * len(sizes)
    value = slice_nd(ctx, input, start, ctx.out.shape, stride)
    start[dim] = ctx.out.shape[dim]
    gate = slice_nd(ctx, input, start, ctx.out.shape, stride)
    return mul(ctx, value, activation(ctx, Kind.SIGMOID, gate))


# Logarithms of sums of exponentials ----------------------------------------------------------------------------------


@converter(F.softplus)
def softplus(ctx: Context, input, beta=1.0, threshold=20.0):
    """Above the threshold the input itself; from 20 on float32 cannot tell, and the exponential does not overflow."""
    x = cast(ctx, input, wide(ctx.out.dtype))
    smooth = activation(ctx, Kind.SOFTPLUS, mul(ctx, x, beta) if beta != 1 else x, 1.0, 1.0)
    smooth = div(ctx, smooth, beta) if beta != 1 else smooth
    linear = elementwise(ctx, EW.GREATER if beta > 0 else EW.LESS, x, min(threshold, 20.0) / beta)
    return cast(ctx, select(ctx, linear, x, smooth), ctx.out.dtype)


@converter(F.logsigmoid)
def logsigmoid(ctx: Context, input):
    """min(x, 0) - log(1 + exp(-|x|)), in which no exponential overflows."""
    x = cast(ctx, input, wide(ctx.out.dtype))
    tail = activation(ctx, Kind.SOFTPLUS, unary(ctx, Unary.NEG, unary(ctx, Unary.ABS, x)), alpha=1.0, beta=1.0)
    return cast(ctx, sub(ctx, minimum(ctx, x, 0.0), tail), ctx.out.dtype)


# Clipping and shrinking ----------------------------------------------------------------------------------------------


def clip(ctx: Context, x, low, high):
    dtype = ctx.out.dtype
    return cast(ctx, clamp(ctx, x, low, high, dtype if dtype.is_floating_point else wide(dtype)), dtype)


@converter(F.hardtanh, nn.hardtanh)
def hardtanh(ctx: Context, input, min_val=-1.0, max_val=1.0, inplace=False):
    return clip(ctx, input, min_val, max_val)


@converter(F.relu6, nn.relu6)
def relu6(ctx: Context, input, inplace=False):
    return clip(ctx, input, 0, 6)


def at_most(ctx: Context, x, limit):
    """Whether x <= limit, which a NaN is not."""
    return logical_or(ctx, less(ctx, x, limit), equal(ctx, x, limit))


@converter(F.threshold, torch.threshold)
def threshold_op(ctx: Context, input, threshold, value, inplace=False):
    dtype = ctx.out.dtype if ctx.out.dtype.is_floating_point else wide(ctx.out.dtype)
    x = cast(ctx, input, dtype)
    return cast(ctx, select(ctx, at_most(ctx, x, threshold), value, x, dtype), ctx.out.dtype)


@converter(F.hardshrink, Tensor.hardshrink)
def hardshrink(ctx: Context, input, lambd=0.5):
    return select(ctx, at_most(ctx, unary(ctx, Unary.ABS, input), lambd), 0, input)


@converter(F.softshrink)
def softshrink(ctx: Context, input, lambd=0.5):
    within = activation(ctx, Kind.CLIP, input, alpha=-lambd, beta=lambd, keep_nan=False)  # the difference is NaN anyway
    return sub(ctx, input, within)
