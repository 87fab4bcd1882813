import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    activation,
    cast,
    constant,
    converter,
    dims,
    elementwise,
    materialize,
    permute,
    reshape,
    select,
    torch,
    trt,
    unary,
)

EW, Kind, Unary = trt.ElementWiseOperation, trt.ActivationType, trt.UnaryOperation


def sigmoid_of(ctx, x):
    return activation(ctx, Kind.SIGMOID, x)


@converter(torch.relu, torch.Tensor.relu, F.relu)
def relu(ctx, input, inplace=False):
    return activation(ctx, Kind.RELU, input)


@converter(torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit, F.sigmoid)
def sigmoid(ctx, input):
    return sigmoid_of(ctx, cast(ctx, input, ctx.out.dtype))


@converter(torch.tanh, torch.Tensor.tanh, F.tanh)
def tanh(ctx, input):
    return activation(ctx, Kind.TANH, cast(ctx, input, ctx.out.dtype))


@converter(F.leaky_relu)
def leaky_relu(ctx, input, negative_slope=0.01, inplace=False):
    return activation(ctx, Kind.LEAKY_RELU, input, alpha=negative_slope)


@converter(F.elu)
def elu(ctx, input, alpha=1.0, inplace=False):
    return activation(ctx, Kind.ELU, input, alpha=alpha)


@converter(F.selu)
def selu(ctx, input, inplace=False):
    return activation(ctx, Kind.SELU, input, alpha=1.6732632423543772, beta=1.0507009873554805)


@converter(F.celu)
def celu(ctx, input, alpha=1.0, inplace=False):
    negative = elementwise(ctx, EW.PROD, activation(ctx, Kind.ELU, elementwise(ctx, EW.DIV, input, alpha), 1.0), alpha)
    return select(ctx, elementwise(ctx, EW.GREATER, input, 0), input, negative)


@converter(F.gelu)
def gelu(ctx, input, approximate="none"):
    return activation(ctx, {"none": Kind.GELU_ERF, "tanh": Kind.GELU_TANH}[approximate], input)


@converter(F.silu)
def silu(ctx, input, inplace=False):
    return elementwise(ctx, EW.PROD, input, sigmoid_of(ctx, input))


@converter(F.mish)
def mish(ctx, input, inplace=False):
    return elementwise(ctx, EW.PROD, input, activation(ctx, Kind.TANH, softplus(ctx, input)))


@converter(F.softplus)
def softplus(ctx, input, beta=1.0, threshold=20.0):
    scaled = input if beta == 1 else elementwise(ctx, EW.PROD, input, beta)
    smooth = activation(ctx, Kind.SOFTPLUS, scaled, alpha=1.0, beta=1.0)
    smooth = smooth if beta == 1 else elementwise(ctx, EW.DIV, smooth, beta)
    return select(ctx, elementwise(ctx, EW.GREATER, scaled, threshold), input, smooth)


@converter(F.softsign)
def softsign(ctx, input):
    return activation(ctx, Kind.SOFTSIGN, cast(ctx, input, ctx.out.dtype))


@converter(F.hardtanh)
def hardtanh(ctx, input, min_val=-1.0, max_val=1.0, inplace=False):
    return elementwise(ctx, EW.MIN, elementwise(ctx, EW.MAX, input, min_val), max_val)


@converter(F.hardsigmoid)
def hardsigmoid(ctx, input, inplace=False):
    return activation(ctx, Kind.HARD_SIGMOID, input, alpha=1 / 6, beta=0.5)


@converter(F.hardswish)
def hardswish(ctx, input, inplace=False):
    return elementwise(ctx, EW.PROD, input, hardsigmoid(ctx, input))


@converter(F.relu6)
def relu6(ctx, input, inplace=False):
    return hardtanh(ctx, input, 0.0, 6.0)
