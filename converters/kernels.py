"""Operators that stand for one way to compute a call, as the calls that they stand for.

Programs of other makers hold them: TorchScript after its optimizations, exported programs with tables of their own.
"""

import torch.nn.functional as F

from torch2rt.vocabulary import composite, torch

aten = torch.ops.aten


# Convolutions --------------------------------------------------------------------------------------------------------


@composite(aten.convolution_overrideable)
def convolution_overrideable(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def convolution(input, weight, bias, stride, padding, dilation, groups):
    return getattr(F, f"conv{weight.dim() - 2}d")(input, weight, bias, stride, padding, dilation, groups)


@composite(aten.mkldnn_convolution, aten.cudnn_convolution, aten.miopen_convolution, aten.miopen_depthwise_convolution)
def library_convolution(
    input,
    weight,
    bias=None,
    padding=0,
    stride=1,
    dilation=1,
    groups=1,
    benchmark=None,
    deterministic=None,
    allow_tf32=None,
):
    return convolution(input, weight, bias, stride, padding, dilation, groups)


@composite(aten.cudnn_convolution_relu, aten.miopen_convolution_relu)
def convolution_relu(input, weight, bias, stride, padding, dilation, groups):
    return F.relu(convolution(input, weight, bias, stride, padding, dilation, groups))


@composite(aten.cudnn_convolution_add_relu, aten.miopen_convolution_add_relu)
def convolution_add_relu(input, weight, z, alpha, bias, stride, padding, dilation, groups):
    y = convolution(input, weight, bias, stride, padding, dilation, groups)
    return F.relu(torch.add(y, z, alpha=1 if alpha is None else alpha))


@composite(
    aten._slow_conv2d_forward,
    aten.slow_conv3d_forward,
    aten.slow_conv_dilated2d,
    aten.slow_conv_dilated3d,
    aten._conv_depthwise2d,
    aten.conv_depthwise3d,
)
def plain_convolution(input, weight, kernel_size, bias=None, stride=1, padding=0, dilation=1):
    return convolution(input, weight, bias, stride, padding, dilation, input.shape[1] // weight.shape[1])


@composite(aten.slow_conv_transpose2d, aten.slow_conv_transpose3d)
def plain_transposed(input, weight, kernel_size, bias=None, stride=1, padding=0, output_padding=0, dilation=1):
    transposed = getattr(F, f"conv_transpose{weight.dim() - 2}d")
    return transposed(input, weight, bias, stride, padding, output_padding, 1, dilation)


@composite(aten.conv_tbc)
def convolution_of_time_first(input, weight, bias, pad=0):
    """(time, batch, channels) with a weight of (time, channels, results)."""
    return F.conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


# Products ------------------------------------------------------------------------------------------------------------


@composite(aten.mkldnn_linear)
def library_linear(input, weight, bias=None):
    return F.linear(input, weight, bias)


@composite(aten._addmm_activation)
def addmm_activation(input, mat1, mat2, *, beta=1, alpha=1, use_gelu=False):
    return activated(torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha), use_gelu)


def activated(x, use_gelu):
    """What torch's fused kernels do after a product: on a GPU they have the approximate gelu."""
    if not use_gelu:
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if x.is_cuda else "none")


# What else has a private twin ----------------------------------------------------------------------------------------


@composite(aten._add_relu)
def add_relu(input, other, alpha=1):
    return F.relu(torch.add(input, other, alpha=alpha))


@composite(aten._is_any_true)
def is_any_true(input):
    return input.any()


@composite(aten._is_all_true)
def is_all_true(input):
    return input.all()


@composite(aten._aminmax)
def extremes(input, dim=None, keepdim=False):
    return tuple(torch.aminmax(input, dim=dim, keepdim=keepdim))


@composite(aten._stack)
def stacked(tensors, dim=0):
    return torch.stack(tensors, dim)


@composite(aten._logcumsumexp)
def logcumsumexp(input, dim):
    return torch.logcumsumexp(input, dim)


@composite(aten.cudnn_grid_sampler, aten._grid_sampler_2d_cpu_fallback)
def grid_sampler(input, grid, interpolation_mode=0, padding_mode=0, align_corners=True):
    return torch.grid_sampler(input, grid, interpolation_mode, padding_mode, align_corners)
