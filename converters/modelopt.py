"""The operator of nvidia-modelopt's quantisers, which exists once `modelopt.torch.quantization` is imported."""

from torch2rt.vocabulary import check, composite, fake_quantize, fake_quantize_fp8, is_traced, rewrite, torch

SMALLEST = 2.0**-24  # range: one below that is taken for 1


@composite(torch.ops.tensorrt.quantize_op)
def quantize_op(input, amax, num_bits, exponent_bits, unsigned, narrow_range):
    check((num_bits, exponent_bits) in ((8, 0), (8, 4)) and not unsigned, f"{num_bits=}, {exponent_bits=}, {unsigned=}")
    if is_traced(amax) or amax.numel() != 1:  # computed from inputs, or one for each channel
        amax = amax.to(torch.float32)
        steps = (448.0 if exponent_bits else 127.0) / torch.where(amax <= SMALLEST, 1.0, amax)
        whole = rounded(input.to(torch.float32) * steps, 1.0, exponent_bits, narrow_range)
        return (whole * (1.0 / steps)).to(input.dtype)
    largest = float(amax)
    check(largest > 0, f"a range of {largest}")
    return rounded(input, largest / (448 if exponent_bits else 127), exponent_bits, narrow_range)


def rounded(input, scale, exponent_bits, narrow_range):
    if exponent_bits:
        return fake_quantize_fp8(input, scale)
    return fake_quantize(input, scale, -127 if narrow_range else -128, 127)


if hasattr(torch.ops.tensorrt, "dynamic_block_quantize_op"):  # of recent versions
    rewrite(
        "Values in blocks with scales of their own (NVFP4, MXFP4, MXFP6, MXFP8, MXINT8) do not convert. Quantise the "
        "module with FP8_DEFAULT_CFG or INT8_DEFAULT_CFG, or its weights alone with INT4_AWQ_CFG",
        torch.ops.tensorrt.dynamic_block_quantize_op,
    )
