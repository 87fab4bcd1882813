"""The operators of programs that `torch.export` and torch's or torchao's pt2e quantisation make.

They exist once `torch.ao.quantization.fx._decomposed` is imported, as it is before a program can have them.
"""

from torch2rt.vocabulary import check, composite, torch

ops = torch.ops.quantized_decomposed


@composite(ops.quantize_per_tensor)
def quantize_per_tensor(input, scale, zero_point, quant_min, quant_max, dtype):
    steps = (input * (1.0 / scale)).round()
    steps = steps if isinstance(zero_point, int) and zero_point == 0 else steps + zero_point
    return steps.clamp(quant_min, quant_max).to(dtype)


@composite(ops.dequantize_per_tensor)
def dequantize_per_tensor(input, scale, zero_point, quant_min, quant_max, dtype, *, out_dtype=None):
    check(input.dtype is dtype, f"{input.dtype} is brought back as {dtype}")
    steps = input.to(torch.float32)
    steps = steps if isinstance(zero_point, int) and zero_point == 0 else steps - zero_point
    result = steps * scale
    return result if out_dtype is None else result.to(out_dtype)


@composite(ops.quantize_per_channel)
def quantize_per_channel(input, scales, zero_points, axis, quant_min, quant_max, dtype):
    scale, zero = (along(values, input, axis) for values in (scales, zero_points))
    return ((input * (1.0 / scale)).round() + zero).clamp(quant_min, quant_max).to(dtype)


@composite(ops.dequantize_per_channel)
def dequantize_per_channel(input, scales, zero_points, axis, quant_min, quant_max, dtype, *, out_dtype=None):
    steps = input.to(torch.float32)
    steps = steps if zero_points is None else steps - along(zero_points, input, axis)
    result = steps * along(scales, input, axis)
    return result if out_dtype is None else result.to(out_dtype)


def along(values, x, axis):
    """A number for each index of one dimension, ready to broadcast."""
    return values.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])
