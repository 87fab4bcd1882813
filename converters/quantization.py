from torch2rt.vocabulary import check, composite, torch


@composite(torch.fake_quantize_per_tensor_affine)
def fake_quantize_per_tensor(input, scale, zero_point, quant_min, quant_max):
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    return quantized_and_back(input, scale, zero_point, quant_min, quant_max)


@composite(torch.fake_quantize_per_channel_affine)
def fake_quantize_per_channel(input, scale, zero_point, axis, quant_min, quant_max):
    check(0 <= axis < input.dim(), f"{axis=} of {input.dim()} dimensions")
    along = [-1 if i == axis else 1 for i in range(input.dim())]
    return quantized_and_back(input, scale.reshape(along), zero_point.reshape(along), quant_min, quant_max)


def quantized_and_back(input, scale, zero_point, quant_min, quant_max):
    """In float32, multiplied by the reciprocal, as torch's kernels do it. A NaN becomes the smallest integer there."""
    check(quant_min <= quant_max, f"{quant_min=} is above {quant_max=}")
    steps = (input.float() * (1.0 / scale)).round() + zero_point
    steps = torch.where(steps.isnan(), float(quant_min), steps).clamp(quant_min, quant_max)
    return ((steps - zero_point) * scale).to(input.dtype)
