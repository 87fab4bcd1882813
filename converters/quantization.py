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
    fake_quantize,
    fake_quantize_fp8,
    is_traced,
    keep,
    materialize,
    mul,
    quantized_and_back,
    scaled,
    stored,
    torch,
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


@converter(scaled)
def scaled_layers(ctx: Context, x, scale, bias=None):
    y = cast(ctx, mul(ctx, x, scale, torch.float32), ctx.out.dtype)
    return y if bias is None else add(ctx, y, bias, ctx.out.dtype)


def is_int8(zero_point, quant_min, quant_max):
    """Whether integers of this range are what TensorRT calls int8."""
    return not is_traced(zero_point) and int(zero_point) == 0 and -128 <= quant_min < 0 < quant_max <= 127


@composite(torch.fake_quantize_per_tensor_affine)
def fake_quantize_per_tensor(input, scale, zero_point, quant_min, quant_max):
    if not is_traced(scale) and is_int8(zero_point, quant_min, quant_max) and float(scale) > 0:
        return fake_quantize(input, float(scale), quant_min, quant_max)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    return rounded_and_back(input, scale, zero_point, quant_min, quant_max)


@composite(torch.fake_quantize_per_channel_affine)
def fake_quantize_per_channel(input, scale, zero_point, axis, quant_min, quant_max):
    check(0 <= axis < input.dim(), f"{axis=} of {input.dim()} dimensions")
    along = [-1 if i == axis else 1 for i in range(input.dim())]
    return rounded_and_back(input, scale.reshape(along), zero_point.reshape(along), quant_min, quant_max)


def rounded_and_back(input, scale, zero_point, quant_min, quant_max):
    """In float32, multiplied by the reciprocal, as torch's kernels do it. A NaN becomes the smallest integer there."""
    check(quant_min <= quant_max, f"{quant_min=} is above {quant_max=}")
    steps = (input.float() * (1.0 / scale)).round() + zero_point
    steps = torch.where(steps.isnan(), float(quant_min), steps).clamp(quant_min, quant_max)
    return ((steps - zero_point) * scale).to(input.dtype)
