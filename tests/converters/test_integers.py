import torch
from harness import B, Call, S, case, check_case, compare, ints, parametrize

from torch2rt import torch2rt

Tensor = torch.Tensor

# how often the loop runs depends on data, which TensorRT for RTX gets wrong with dynamic shapes
STATIC = {"modes": ("static",)}
CASES = [
    case(torch.gcd, [ints(B, 9, low=-90, high=90), ints(9, low=-90, high=90)], **STATIC),
    case(torch.gcd, [ints(B, 1, low=-9, high=9), ints(S, low=-9, high=9)], **STATIC),
    case(Tensor.gcd, [ints(B, 9, low=-90, high=90, dtype=torch.int32), ints(B, 9, dtype=torch.int32)], **STATIC),
    case(torch.lcm, [ints(B, 9, low=-90, high=90), ints(9, low=-90, high=90)], **STATIC),
    case(Tensor.lcm, [ints(B, S, low=-5, high=5), ints(B, S, low=-5, high=5)], **STATIC),
    case(torch.lcm, [ints(B, 9, low=-90, high=90), ints(9, low=-90, high=90, dtype=torch.int32)], **STATIC),
]


@parametrize(CASES)
def test_integers(row, mode, device):
    check_case(row, mode, device)


def test_the_longest_way(device):
    """Neighbouring Fibonacci numbers take the most steps."""
    fibonacci = [0, 1]
    while fibonacci[-1] < 2**61:
        fibonacci.append(sum(fibonacci[-2:]))
    x = torch.tensor(fibonacci, device=device)
    model_trt = torch2rt(Call(torch.gcd), [x[1:], x[:-1]])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x[1:], x[:-1]), torch.ones_like(x[1:]))
