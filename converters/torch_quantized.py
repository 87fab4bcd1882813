"""What `torch.ao.quantization.quantize_dynamic` makes, and quantised tables: their inputs and results are float32."""

from torch2rt.vocabulary import check, composite, torch

ops = torch.ops.quantized
F = torch.nn.functional
SMALLEST = 6.1e-5  # of the scales that torch's kernels choose


@composite(ops.linear_dynamic)
def linear_dynamic(X, W_prepack, reduce_range=False):
    """The input is rounded to 128 or 256 steps of what it ranges over. Those of 128 are int8 without their zero."""
    weight, bias = W_prepack.unpack()
    by_row = weight.qscheme() == torch.per_channel_affine
    scales = weight.q_per_channel_scales().float() if by_row else weight.q_scale()
    zeros = weight.q_per_channel_zero_points()[:, None] if by_row else weight.q_zero_point()
    integers = weight.int_repr().int() - zeros
    most = 127 if reduce_range and not ignores_range(W_prepack, weight.shape[1]) else 255
    steps, scale = rounded(X, most)
    if most == 127 and torch.equal(integers, integers.to(torch.int8).int()):
        rows = steps.to(torch.int8).reshape(-1, X.shape[-1])
        sums = torch.ops.aten._int_mm(rows, integers.to(torch.int8).t().contiguous())
        sums = sums.float().reshape(*X.shape[:-1], len(integers))
    else:
        sums = F.linear(steps, integers.float())
    y = sums * (scale * scales)
    return y if bias is None else y + bias


@composite(ops.linear_relu_dynamic)
def linear_relu_dynamic(X, W_prepack, reduce_range=False):
    return ops.linear_dynamic(X, W_prepack, reduce_range).relu()


def ignores_range(packed, count):
    """Whether the kernels of a packed weight use all 256 steps in any case, as QNNPACK's do."""
    x = torch.linspace(-1.0, 1.0, 3 * count).reshape(3, count)
    return torch.equal(ops.linear_dynamic(x, packed, True), ops.linear_dynamic(x, packed, False))


def rounded(x, most):
    """Integers that 0 and `most` lie above and below, without a zero point, and their scale."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    wide = (high - low) / most
    zero_point = (-low / wide.clamp(min=1e-30)).round()  # a range below that is rounded to 0 anyhow
    scale = wide.clamp(min=SMALLEST)
    return ((x * (1.0 / scale)).round() + zero_point).clamp(0, most) - zero_point, scale


@composite(ops.linear_dynamic_fp16)
def linear_dynamic_fp16(X, W_prepack):
    return F.linear(X, *W_prepack.unpack())


@composite(ops.linear_relu_dynamic_fp16)
def linear_relu_dynamic_fp16(X, W_prepack):
    return F.linear(X, *W_prepack.unpack()).relu()


@composite(ops.embedding_byte, ops.embedding_4bit)
def embedding(weight, indices, pruned_weights=False):
    check(not pruned_weights, f"{pruned_weights=}")
    return F.embedding(indices, weight.unpack().dequantize())
