import math

import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    cast,
    check,
    composite,
    converter,
    dims,
    dtype_of,
    elementwise,
    is_symbolic,
    lift,
    matmul,
    narrow,
    ntuple,
    permute,
    reshape,
    slice_nd,
    torch,
    trt,
    unlift,
)

EW = trt.ElementWiseOperation


@converter(torch.conv1d, torch.conv2d, torch.conv3d, limits="kernel sizes are static")
def conv(ctx: Context, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """TensorRT has no 1-d convolution: `lift` makes it one of height 1."""
    n = len(dims(ctx, weight)) - 2
    stride, dilation = ntuple(stride, n), ntuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, dims(ctx, weight)[2:], strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = list(ntuple(0 if padding == "valid" else padding, n))
    if _is_product(ctx, input, weight, stride, (*before, *after), dilation, groups):
        return _as_product(ctx, input, weight, bias)
    if _has_few_channels(ctx, input, weight, stride, dilation, groups):
        input, weight, stride, before, after = _space_to_depth(ctx, input, weight, stride, before, ctx.out.shape[2:])
    maps = dims(ctx, weight)[0]
    return _layer(ctx, "add_convolution_nd", input, weight, bias, maps, stride, before, after, dilation, groups)


@converter(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, limits="kernel sizes are static")
def conv_transpose(ctx: Context, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
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
def convolution(ctx: Context, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed:
        return conv_transpose(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(ctx, input, weight, bias, stride, padding, dilation, groups)


@composite(torch._convolution)
def convolution_and_how(
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    benchmark=None,
    deterministic=None,
    cudnn_enabled=None,
    allow_tf32=None,
):
    """The last four choose among kernels, of which fake tensors on a GPU have none."""
    return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _layer(ctx: Context, add, input, weight, bias, maps, stride, before, after, dilation, groups):
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
    )
    layer = getattr(ctx.network, add)(x, maps, kernel_size, kernel, shift)
    for index, value in ((1, weight), (2, bias)):
        if isinstance(value, trt.ITensor):
            layer.set_input(index, value)
    layer.stride_nd, layer.dilation_nd = ((*[1] * (2 - n), *v) for v in (stride, dilation))
    layer.pre_padding, layer.post_padding = ((*[0] * (2 - n), *v) for v in (before, after))
    layer.num_groups = groups
    return unlift(ctx, layer.get_output(0), n)


def _is_product(ctx: Context, input, weight, stride, padding, dilation, groups):
    """Whether a convolution is better a product of matrices, with less than half the time on the GPUs tried.

    That is so for windows that do not overlap and have few channels, as where images become patches, and for single
    elements, as behind a global pooling.
    """
    sizes, (_, maps, *kernel) = dims(ctx, input), dims(ctx, weight)
    if len(sizes) != len(kernel) + 2 or any(map(is_symbolic, (*sizes[1:], *kernel, maps))) or groups != 1:
        return False
    if any(padding) or list(kernel) != list(stride) and set(kernel) != {1} or set(dilation) != {1}:
        return False
    single = set(sizes[2:]) == {1}
    patches = maps < 8 and max(kernel) > 1 and not any(s % k for s, k in zip(sizes[2:], kernel, strict=True))
    return ctx.out.dtype.is_floating_point and (single or patches)


def _as_product(ctx: Context, x, weight, bias):
    """The same as a product: (batch, channels, rows, columns) to (batch, places, channels x window) and back."""
    (batch, maps, *sizes), (_, _, *window) = dims(ctx, x), dims(ctx, weight)
    n, places = len(window), [s // k for s, k in zip(sizes, window, strict=True)]
    if max(window) > 1:
        parts = [v for p, k in zip(places, window, strict=True) for v in (p, k)]
        x = reshape(ctx, x, (batch, maps, *parts))
        x = permute(ctx, x, (0, *range(2, 2 + 2 * n, 2), 1, *range(3, 2 + 2 * n, 2)))
    features = maps * math.prod(window)
    single = math.prod(places) == 1
    x = reshape(ctx, x, (batch, features) if single else (batch, math.prod(places), features))
    weight = reshape(ctx, weight, (dims(ctx, weight)[0], features))
    y = matmul(ctx, x, weight, transpose_b=True)
    y = y if bias is None else elementwise(ctx, EW.SUM, y, bias, dtype_of(y))
    if single:
        return reshape(ctx, y, ctx.out.shape)
    # in this order, so that a permutation to channels last undoes it
    return permute(ctx, reshape(ctx, y, (batch, *places, dims(ctx, weight)[0])), (0, n + 1, *range(1, n + 1)))


def _has_few_channels(ctx: Context, input, weight, stride, dilation, groups):
    """Whether a convolution has too few channels for the GPU's matrix units, and could have more: that of an image."""
    sizes = dims(ctx, input)[1:]
    if not isinstance(weight, torch.Tensor) or any(map(is_symbolic, sizes)) or len(sizes) != weight.dim() - 1:
        return False
    fits = not any(size % s for size, s in zip(sizes[1:], stride, strict=True))
    return fits and max(stride) > 1 and sizes[0] < 8 and groups == 1 and set(dilation) == {1}


def _space_to_depth(ctx: Context, x, weight, stride, before, out):
    """The same convolution without a stride: what lies within one becomes channels.

    Row s*i + b of the input is row i of its channel b. Tap t reads row s*i + t - padding, which is tap a of channel b
    for t - padding = s*a + b. A tap that there was none of is zero.
    """
    n, (batch, maps, *sizes) = len(stride), dims(ctx, x)
    kernel = weight.shape[2:]
    low = [-p // s for p, s in zip(before, stride, strict=True)]
    taps = [(k - 1 - p) // s - a + 1 for k, p, s, a in zip(kernel, before, stride, low, strict=True)]
    front = [-(s * a + p) for p, s, a in zip(before, stride, low, strict=True)]
    back = [t * s - f - k for t, s, f, k in zip(taps, stride, front, kernel, strict=True)]
    weight = F.pad(weight, [v for pair in reversed(list(zip(front, back, strict=True))) for v in pair])
    split = [v for t, s in zip(taps, stride, strict=True) for v in (t, s)]
    order = (0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))
    features = maps * math.prod(stride)
    weight = weight.reshape(weight.shape[0], maps, *split).permute(order).reshape(-1, features, *taps)
    places = [size // s for size, s in zip(sizes, stride, strict=True)]
    split = [v for p, s in zip(places, stride, strict=True) for v in (p, s)]
    x = reshape(ctx, permute(ctx, reshape(ctx, x, (batch, maps, *split)), order), (batch, features, *places))
    after = [o - p + a + t - 1 for o, p, a, t in zip(out, places, low, taps, strict=True)]
    return x, weight, (1,) * n, [-a for a in low], after


def _spread(ctx: Context, weight, dilation):
    """A kernel with its dilation spelled out in zeros: behind each of its elements, but for the last."""
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, dims(ctx, weight)[2:], strict=True)]
    if isinstance(weight, torch.Tensor):
        spread = weight.new_zeros(*weight.shape[:2], *sizes)
        every = [slice(None), slice(None), *(slice(None, None, d) for d in dilation)]
        spread[tuple(every)] = weight
        return spread
    for axis, (d, size) in enumerate(zip(dilation, sizes, strict=True), 2):
        before, (k, *after) = dims(ctx, weight)[:axis], dims(ctx, weight)[axis:]
        rows = _padded(ctx, reshape(ctx, weight, (*before, k, 1, *after)), (*before, k, d, *after))
        weight = narrow(ctx, reshape(ctx, rows, (*before, k * d, *after)), axis, 0, size)
    return weight


def _extended(ctx: Context, weight, more):
    """A kernel with this many zeros behind its elements, per dimension."""
    if isinstance(weight, torch.Tensor):
        return F.pad(weight, [v for m in reversed(more) for v in (0, m)])
    sizes = dims(ctx, weight)
    return _padded(ctx, weight, [*sizes[:2], *(k + m for k, m in zip(sizes[2:], more, strict=True))])


def _padded(ctx: Context, weight, sizes):
    return slice_nd(ctx, weight, [0] * len(sizes), sizes, [1] * len(sizes), trt.SampleMode.FILL)
