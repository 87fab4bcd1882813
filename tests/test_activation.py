import torch
import torch.nn.functional as F
from harness import B, S, case, check_case, half, parametrize

CASES = [
    case(F.relu, [(B, 3, S)]),
    case(F.leaky_relu, [(B, 3, 5)], negative_slope=0.2),
    case(F.gelu, [(B, 3, 5)]),
    case(F.gelu, [(B, 3, 5)], approximate="tanh"),
    case(torch.sigmoid, [half(B, 3, 5)]),
    case(F.silu, [(B, 3, 5)]),
    case(F.hardtanh, [(B, 3)], -0.5, 0.25),
    case(F.linear, [(B, 3, 4), (7, 4), (7,)]),
    case(lambda x, y: x + y * 2 - 1.5, [(B, 3, S), (S,)], id="arith"),
]


@parametrize(CASES)
def test_activation(row, mode, device):
    check_case(row, mode, device)
