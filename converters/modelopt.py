"""The operator of nvidia-modelopt's quantisers, which exists once `modelopt.torch.quantization` is imported."""

from torch2rt.vocabulary import check, composite, fake_quantize, fake_quantize_fp8, is_traced, torch


@composite(torch.ops.tensorrt.quantize_op)
def quantize_op(input, amax, num_bits, exponent_bits, unsigned, narrow_range):
    check(not is_traced(amax) and amax.numel() == 1, "the range is computed from inputs, or one for each channel")
    check((num_bits, exponent_bits) in ((8, 0), (8, 4)) and not unsigned, f"{num_bits=}, {exponent_bits=}, {unsigned=}")
    largest = float(amax)
    check(largest > 0, f"a range of {largest}")
    if exponent_bits:
        return fake_quantize_fp8(input, largest / 448)
    return fake_quantize(input, largest / 127, -127 if narrow_range else -128, 127)
