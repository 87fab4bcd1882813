from torch2rt.vocabulary import composite, torch

Tensor = torch.Tensor


@composite(torch.gcd, Tensor.gcd)
def gcd(input, other):
    """Euclid's algorithm, for all pairs at once and as long as one of them goes on."""
    dtype = torch.result_type(input, other)
    pair = torch.broadcast_tensors(input.long().abs(), other.long().abs())
    going_on = lambda a, b: (b != 0).any()  # noqa: E731
    step = lambda a, b: (torch.where(b == 0, a, b), torch.where(b == 0, b, a % b.clamp(min=1)))  # noqa: E731
    return torch.ops.higher_order.while_loop(going_on, step, tuple(pair), ())[0].to(dtype)


@composite(torch.lcm, Tensor.lcm)
def lcm(input, other):
    divisor = torch.gcd(input, other)
    product = torch.div(input, divisor.clamp(min=1), rounding_mode="trunc") * other
    return product.abs().to(divisor.dtype)
