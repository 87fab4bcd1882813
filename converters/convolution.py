import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    cast,
    check,
    converter,
    dims,
    dtype_of,
    is_symbolic,
    lift,
    narrow,
    ntuple,
    reshape,
    slice_nd,
    torch,
    trt,
    unlift,
)


@converter(torch.conv1d, torch.conv2d, torch.conv3d, limits="kernel sizes are static")
def conv(ctx, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """TensorRT has no 1-d convolution: `lift` makes it one of height 1."""
    n = len(dims(ctx, weight)) - 2
    stride, dilation = ntuple(stride, n), ntuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, dims(ctx, weight)[2:], strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = ntuple(0 if padding == "valid" else padding, n)
    maps = dims(ctx, weight)[0]
    return _layer(ctx, "add_convolution_nd", input, weight, bias, maps, stride, before, after, dilation, groups)


@converter(
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    limits="kernel sizes are static",
)  # fmt: skip
def conv_transpose(ctx, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """TensorRT has no output_padding and no deconvolution with stride and dilation, or in bfloat16.

    The kernel makes up for it: zeros between its elements for the dilation, zeros behind them where output_padding
    reaches beyond the full result.
    """
    maps, n = dims(ctx, weight)[1] * groups, len(dims(ctx, weight)) - 2
    stride, padding, output_padding, dilation = (ntuple(v, n) for v in (stride, padding, output_padding, dilation))
    check(not any(map(is_symbolic, (*padding, *output_padding))), "padding and output_padding must be static")
    if max(stride) > 1 and max(dilation) > 1:
        weight, dilation = _spread(ctx, weight, dilation), (1,) * n
    more = [max(0, math.ceil((o - p) / d)) for o, p, d in zip(output_padding, padding, dilation, strict=True)]
    if any(more):
        weight = _extended(ctx, weight, more)
    after = [p - o + m * d for p, o, m, d in zip(padding, output_padding, more, dilation, strict=True)]
    if dtype_of(input) is torch.bfloat16:
        input, weight, bias = (None if v is None else cast(ctx, v, torch.float32) for v in (input, weight, bias))
    result = _layer(ctx, "add_deconvolution_nd", input, weight, bias, maps, stride, padding, after, dilation, groups)
    return cast(ctx, result, ctx.out.dtype)


@converter(torch.convolution)
def convolution(ctx, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed:
        return conv_transpose(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(ctx, input, weight, bias, stride, padding, dilation, groups)


def _layer(ctx, add, input, weight, bias, maps, stride, before, after, dilation, groups):
    """One (de)convolution; kernel and bias are its weights where they are constant, else its inputs."""
    n = len(stride)
    check(ctx.out.dtype.is_floating_point, f"TensorRT convolves no {ctx.out.dtype}")
    check(not any(map(is_symbolic, (*dims(ctx, weight), *before))), "the sizes of kernel and padding must be static")
    x = lift(ctx, input, n)
    weight = weight if isinstance(weight, torch.Tensor) else lift(ctx, weight, n)
    kernel_size = (*[1] * (2 - n), *dims(ctx, weight)[-n:])
    kernel, shift = (
        ctx.weights(v, role) if isinstance(v, torch.Tensor) else trt.Weights()
        for v, role in ((weight, "kernel"), (bias, "bias"))
    )  # fmt: skip
    layer = getattr(ctx.network, add)(x, maps, kernel_size, kernel, shift)
    for index, value in ((1, weight), (2, bias)):
        if isinstance(value, trt.ITensor):
            layer.set_input(index, value)
    layer.stride_nd, layer.dilation_nd = ((*[1] * (2 - n), *v) for v in (stride, dilation))
    layer.pre_padding, layer.post_padding = ((*[0] * (2 - n), *v) for v in (before, after))
    layer.num_groups = groups
    return unlift(ctx, layer.get_output(0), n)


def _spread(ctx, weight, dilation):
    """A kernel with its dilation spelled out in zeros: behind each of its elements, but for the last."""
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, dims(ctx, weight)[2:], strict=True)]
    if isinstance(weight, torch.Tensor):
        spread = weight.new_zeros(*weight.shape[:2], *sizes)
        spread[(..., *(slice(None, None, d) for d in dilation))] = weight
        return spread
    for axis, (d, size) in enumerate(zip(dilation, sizes, strict=True), 2):
        before, (k, *after) = dims(ctx, weight)[:axis], dims(ctx, weight)[axis:]
        rows = _padded(ctx, reshape(ctx, weight, (*before, k, 1, *after)), (*before, k, d, *after))
        weight = narrow(ctx, reshape(ctx, rows, (*before, k * d, *after)), axis, 0, size)
    return weight


def _extended(ctx, weight, more):
    """A kernel with this many zeros behind its elements, per dimension."""
    if isinstance(weight, torch.Tensor):
        return F.pad(weight, [v for m in reversed(more) for v in (0, m)])
    sizes = dims(ctx, weight)
    return _padded(ctx, weight, [*sizes[:2], *(k + m for k, m in zip(sizes[2:], more, strict=True))])


def _padded(ctx, weight, sizes):
    return slice_nd(ctx, weight, [0] * len(sizes), sizes, [1] * len(sizes), trt.SampleMode.FILL)
