import functools

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    clamp,
    composite,
    converter,
    dequantize,
    dequantized,
    dims,
    fake_quantize,
    fake_quantize_fp8,
    is_symbolic,
    is_traced,
    keep,
    largest,
    materialize,
    matmul,
    mul,
    narrow,
    quantized_and_back,
    scaled,
    slice_nd,
    stored,
    torch,
    trt,
)

aten = torch.ops.aten

keep(dequantize)


@converter(dequantize, limits="constant weights")
def dequantize_layers(ctx: Context, weight, scale, axis, dtype):
    check(isinstance(weight, torch.Tensor), "quantised weights must be constant")
    if weight.dtype is torch.uint8 and not ctx.takes_int4(dtype):
        return dequantize(weight, scale, axis, dtype)
    scale = ctx.as_dtype(scale, dtype if weight.dtype is torch.uint8 else torch.float32)
    return dequantized(ctx, stored(ctx, weight), scale, dtype, axis)


@converter(fake_quantize)
def quantize_layers(ctx: Context, x, scale, low=-128, high=127):
    """As layers, which TensorRT moves into the products around them. Fewer integers than int8 has are a bound."""
    x = materialize(ctx, x)
    if (low, high) != (-128, 127):
        x = clamp(ctx, x, low * scale, high * scale)
    return quantized_and_back(ctx, x, torch.tensor(scale, dtype=torch.float32), ctx.out.dtype)


@converter(fake_quantize_fp8)
def quantize_layers_fp8(ctx: Context, x, scale):
    scale = torch.tensor(scale, dtype=torch.float32)
    return quantized_and_back(ctx, materialize(ctx, x), scale, ctx.out.dtype, stored_as=torch.float8_e4m3fn)


@converter(aten._int_mm)
def int_mm(ctx: Context, input, mat2):
    """A product of int8 numbers whose scale is 1, which TensorRT has kernels for.

    It gives float32, in which integers are exact up to 2 ** 24: longer sums are sums of parts. If their number of terms
    is dynamic, zeros follow up to the largest.
    """
    count = dims(ctx, input)[-1]
    if is_symbolic(count):
        count = largest(ctx, count)
        rows, columns = dims(ctx, input)[0], dims(ctx, mat2)[1]
        input, mat2 = (_with_zeros(ctx, x, sizes) for x, sizes in ((input, (rows, count)), (mat2, (count, columns))))
    most = count if _is_exact(mat2) else EXACT_TERMS
    sums = [_int8_product(ctx, input, mat2, i, min(most, count - i)) for i in range(0, count, most)]
    return functools.reduce(lambda a, b: add(ctx, a, b, torch.int32), sums)


EXACT_TERMS = 2**24 // 2**14  # products of two int8 in an exact float32


def _is_exact(weight):
    """Whether the sums of a constant matrix times any int8 numbers are exact."""
    if not isinstance(weight, torch.Tensor):
        return False
    # one answer is read, and no number: other weights may take the place of these
    return bool(weight.int().abs().sum(0).max() <= 2**24 // 128)


def _with_zeros(ctx, x, sizes):
    return slice_nd(ctx, x, [0, 0], sizes, [1, 1], trt.SampleMode.FILL)


def _int8_product(ctx, input, mat2, start, length):
    operands = []
    for x, dim in ((input, 1), (mat2, 0)):
        one = torch.ones((), dtype=torch.float32)
        if isinstance(x, torch.Tensor):
            part = x.narrow(dim, start, length).contiguous()
            operands.append(dequantized(ctx, stored(ctx, part), one, torch.float32))
        else:
            part = cast(ctx, narrow(ctx, x, dim, start, length), torch.float32)
            operands.append(quantized_and_back(ctx, part, one, torch.float32))
    return cast(ctx, matmul(ctx, *operands), torch.int32)


@composite(aten._scaled_mm)
def scaled_mm(self, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """A product of fp8 numbers in float32, with a scale for each matrix, or for each row and each column."""
    check(scale_result is None and out_dtype is not None and out_dtype.itemsize > 1, f"{scale_result=}, {out_dtype=}")
    for scale, size in ((scale_a, (self.shape[0], 1)), (scale_b, (1, mat2.shape[1]))):
        check(scale.numel() == 1 or tuple(scale.shape) == size, f"scales of {tuple(scale.shape)} for blocks")
        check(scale.dtype is torch.float32, f"scales of {scale.dtype}")
    weight = mat2.to(torch.float32) * scale_b
    y = torch.nn.functional.linear(self.to(torch.float32), weight.t()) * scale_a
    return (y if bias is None else y + bias).to(out_dtype)


@converter(scaled)
def scaled_layers(ctx: Context, x, scale, bias=None):
    y = cast(ctx, mul(ctx, x, scale, torch.float32), ctx.out.dtype)
    return y if bias is None else add(ctx, y, bias, ctx.out.dtype)


@composite(torch.fake_quantize_per_tensor_affine)
def fake_quantize_per_tensor(input, scale, zero_point, quant_min, quant_max):
    if not is_traced(scale) and not is_traced(zero_point) and quant_min <= int(zero_point) <= quant_max:
        low, high = quant_min - int(zero_point), quant_max - int(zero_point)  # without the zero point
        if -128 <= low < high <= 127 and float(scale) > 0:
            return fake_quantize(input, float(scale), low, high)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    return rounded_and_back(input, scale, zero_point, quant_min, quant_max)


@composite(torch.fake_quantize_per_channel_affine)
def fake_quantize_per_channel(input, scale, zero_point, axis, quant_min, quant_max):
    check(0 <= axis < input.dim(), f"{axis=} of {input.dim()} dimensions")
    along = [-1 if i == axis else 1 for i in range(input.dim())]
    return rounded_and_back(input, scale.reshape(along), zero_point.reshape(along), quant_min, quant_max)


@composite(torch.fused_moving_avg_obs_fake_quant)
def observed(
    input,
    observer_on,
    fake_quant_on,
    running_min,
    running_max,
    scale,
    zero_point,
    averaging_const,
    quant_min,
    quant_max,
    ch_axis,
    per_row_fake_quant=False,
    symmetric_quant=False,
):
    """Of `torch.ao`'s quantisation-aware training."""
    check(
        not bool(observer_on),
        "the range still follows the inputs. Call module.apply(torch.ao.quantization.disable_observer) before",
    )
    if not bool(fake_quant_on):
        return input
    if per_row_fake_quant:
        return torch.fake_quantize_per_channel_affine(input, scale, zero_point, ch_axis, quant_min, quant_max)
    return torch.fake_quantize_per_tensor_affine(input, float(scale), int(zero_point), quant_min, quant_max)


def rounded_and_back(input, scale, zero_point, quant_min, quant_max):
    """In float32, multiplied by the reciprocal, as torch's kernels do it. A NaN becomes the smallest integer there."""
    check(quant_min <= quant_max, f"{quant_min=} is above {quant_max=}")
    steps = (input.float() * (1.0 / scale)).round() + zero_point
    steps = torch.where(steps.isnan(), float(quant_min), steps).clamp(quant_min, quant_max)
    return ((steps - zero_point) * scale).to(input.dtype)
