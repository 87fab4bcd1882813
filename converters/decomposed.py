"""The operators of programs that `torch.export` and torch's or torchao's pt2e quantisation make.

They exist once `torch.ao.quantization.fx._decomposed` is imported, as it is before a program can have them.
"""

from torch2rt.vocabulary import check, composite, torch

ops = torch.ops.quantized_decomposed


@composite(ops.quantize_per_tensor)
def quantize_per_tensor(input, scale, zero_point, quant_min, quant_max, dtype):
    steps = (input * (1.0 / number(scale))).round()
    steps = steps if isinstance(zero_point, int) and zero_point == 0 else steps + zero_point
    return steps.clamp(quant_min, quant_max).to(dtype)


@composite(ops.dequantize_per_tensor)
def dequantize_per_tensor(input, scale, zero_point, quant_min, quant_max, dtype, *, out_dtype=None):
    check(input.dtype is dtype, f"{input.dtype} is brought back as {dtype}")
    steps = input.to(torch.float32)
    steps = steps if isinstance(zero_point, int) and zero_point == 0 else steps - zero_point
    result = steps * number(scale)
    return result if out_dtype is None else result.to(out_dtype)


def number(scale):
    """A scale as float32, which a tensor of it need not be: its meta kernel says that it is float64."""
    return scale.to(torch.float32) if isinstance(scale, torch.Tensor) else scale


@composite(ops.choose_qparams)
def choose_qparams(input, quant_min, quant_max, eps, dtype):
    """A scale and a zero point for what a tensor ranges over, and 0."""
    low, high = input.amin().clamp(max=0.0), input.amax().clamp(min=0.0)
    scale = ((high - low) / float(quant_max - quant_min)).clamp(min=eps)
    zero_point = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale.float().reshape(1), zero_point.long().reshape(1)


@composite(ops.choose_qparams_symmetric)
def choose_qparams_symmetric(input, quant_min, quant_max, eps, dtype):
    largest = torch.maximum(-input.amin().clamp(max=0.0), input.amax().clamp(min=0.0))
    scale = (largest / (float(quant_max - quant_min) / 2)).clamp(min=eps)
    return scale.float().reshape(1), torch.full([1], 128 if dtype is torch.uint8 else 0, device=input.device)


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
