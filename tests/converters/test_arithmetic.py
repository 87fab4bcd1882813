import operator

import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import torch2rt

Tensor, aten = torch.Tensor, torch.ops.aten
INT32, BYTE, CHAR = torch.int32, torch.uint8, torch.int8
positive = floats(B, 3, low=0.5, high=3.0)
nonzero = ints(B, 3, low=1, high=6)
byte = ints(B, 3, low=0, high=256, dtype=BYTE)
char = ints(B, 3, low=-128, high=128, dtype=CHAR)


def bfloat16(*shape):
    return Data(shape, torch.bfloat16)


ADD = [
    case(torch.add, [(B, 3, S), (S,)]),
    case(torch.add, [(B, 3), (B, 1)], alpha=2.5),
    case(torch.add, [ints(B, 3), ints(3)], alpha=-2),
    case(torch.add, [half(B, 3), half(B, 3)], alpha=3),
    case(torch.sub, [half(B, 3), (B, 3)]),
    case(torch.sub, [(B, 3), ints(3)], alpha=2),
    case(torch.subtract, [ints(B, 3, dtype=INT32), ints(3)]),
    case(torch.rsub, [(B, 3)], 2.5, alpha=3),
    case(torch.rsub, [(B, 3), (B, 3)]),
    case(torch.mul, [(B, 1, S), (3, 1)]),
    case(torch.multiply, [ints(B, 3), (B, 3)]),
    case(Tensor.add, [(B, 3)], 1, alpha=2),
    case(Tensor.mul, [bools(B, 3), (B, 3)]),
    case(lambda x, y: x + y * 2 - 1.5, [(B, 3, S), (S,)], id="operators"),
    case(lambda x: 1 - x + 2 * x - (3 + x), [ints(B, 3)], id="operators-reflected"),
    case(lambda x: (x * 1).add_(2).mul_(3).sub_(1), [(B, 3)], id="inplace-methods"),
    case(lambda x: torch.add(x, 1, out=torch.empty_like(x)) + x, [(B, 3)], id="out"),
    case(lambda x: -(+x), [ints(B, 3, dtype=INT32)], id="signs"),
    case(lambda x: x + x.sum() * 2, [(B, 3)], id="0d-right"),
    case(lambda x: x.sum() - x, [half(B, 3)], id="0d-left"),
    case(lambda x: x.sum() + 1, [ints(B, 3)], id="0d-alone"),
    case(lambda x: x * x.shape[0] + x.shape[1] / 2, [(B, S)], id="sizes"),
    case(lambda x: x * torch.tensor(2.5, device=x.device, dtype=torch.float64), [(B, 3)], id="0d-float64"),
    # types
    case(torch.add, [bools(B, 3), bools(3)]),
    case(torch.mul, [bools(B, 3), bools(3)]),
    case(torch.maximum, [bools(B, 3), bools(3)]),
    case(lambda x: (x + 1) * 2.5, [bools(B, 3)], id="bool-numbers"),
    case(lambda x: x + True, [bools(B, 3)], id="bool-bool"),
    case(lambda x: x + 0.5, [ints(B, 3)], id="int-float"),
    *[case(f, [byte, ints(3, low=0, high=256, dtype=BYTE)]) for f in (torch.add, torch.sub, torch.mul, torch.maximum)],
    *[
        case(f, [char, ints(3, low=-128, high=128, dtype=CHAR)])
        for f in (torch.add, torch.sub, torch.mul, torch.minimum)
    ],
    case(torch.add, [byte, ints(3, low=0, high=256, dtype=BYTE)], alpha=3),
    case(lambda x: x / 255, [byte], id="byte-scaled"),
    case(lambda x: x * 2.5 + 300, [byte], id="byte-numbers"),
    case(torch.add, [bfloat16(B, 3), bfloat16(3)]),
    # numbers that half precision does not hold
    *[
        case(lambda x, f=f, n=n: f(x, n), [half(B, 9)], id=f"half-{f.__name__}-{n}")
        for f, numbers in (
            (operator.mul, (1e5, 1e-8)),
            (operator.add, (1e-8,)),
            (operator.truediv, (1e5,)),
            (operator.pow, (1e-6,)),
        )
        for n in numbers
    ],
    case(lambda x: 1e5 / x, [half(B, 9)], id="half-reflected"),
    case(lambda x: x * torch.tensor(3e4, device=x.device), [half(B, 9)], id="half-0d"),
    case(aten.add.Tensor, [(B, 3), (3,)], alpha=2, id="aten.add.Tensor"),
    case(aten.mul.Scalar, [(B, 3)], 2.5, id="aten.mul.Scalar"),
    case(aten.rsub.Scalar, [(B, 3)], 2, 3, id="aten.rsub.Scalar"),
]

DIVIDE = [
    case(torch.maximum, [ints(B, 3, low=0, dtype=torch.uint8), ints(low=-9, high=-3, dtype=torch.int8)]),
    case(lambda x: [-1 % x, x // -1, x % -3], [ints(B, 3, low=1, dtype=torch.uint8)], id="bytes-by-numbers"),
    case(torch.ops.prims.div.default, [(B, 3), floats(B, 3)], id="prims.div"),
    case(torch.div, [(B, 3), (3,)]),
    case(torch.div, [ints(B, 3), nonzero]),
    case(torch.true_divide, [ints(B, 3)], 4),
    case(torch.divide, [half(B, 3)], 3),
    case(lambda x: 2 / x, [positive], id="reflected"),
    case(lambda x: 2 / x, [nonzero], id="reflected-int"),
    *[case(torch.div, [(B, 3, S), floats(S)], rounding_mode=m) for m in ("floor", "trunc", None)],
    *[case(torch.div, [half(B, 3)], 0.3, rounding_mode=m) for m in ("floor", "trunc")],
    *[case(torch.div, [ints(B, 9), ints(1, low=2, high=5)], rounding_mode=m) for m in ("floor", "trunc")],
    *[case(torch.div, [ints(B, 9, dtype=INT32)], n, rounding_mode=m) for m in ("floor", "trunc") for n in (-4, 3)],
    *[case(torch.div, [ints(B, 9)], 2.5, rounding_mode=m) for m in ("floor", "trunc")],
    case(torch.div, [byte], 7, rounding_mode="floor"),
    case(torch.div, [char], 7, rounding_mode="trunc"),
    case(lambda x: x // 4, [ints(B, 9)], id="floordiv"),
    case(lambda x: x // -2.5, [(B, 9)], id="floordiv-float"),
    case(lambda x: 20 // x, [nonzero], id="floordiv-reflected"),
    case(lambda x: (x * 1).floor_divide_(0.7), [(B, 9)], id="floor_divide_"),
    *[case(f, [(B, 3, S), floats(S)]) for f in (torch.remainder, torch.fmod)],
    *[case(f, [(B, 9), floats(B, 9, low=-2, high=-0.1)]) for f in (torch.remainder, torch.fmod)],
    *[case(f, [(B, 9)], n) for f in (torch.remainder, torch.fmod) for n in (0.75, -0.75)],
    *[case(f, [ints(B, 9)], n) for f in (torch.remainder, torch.fmod) for n in (4, -4)],
    *[case(f, [ints(B, 9, dtype=INT32), ints(1, low=2, high=5, dtype=INT32)]) for f in (torch.remainder, torch.fmod)],
    *[case(f, [half(B, 9)], 0.75) for f in (torch.remainder, torch.fmod)],
    *[case(f, [char], 7) for f in (torch.remainder, torch.fmod)],
    case(lambda x: x % 3, [byte], id="mod-byte"),
    case(lambda x: 7 % x, [nonzero], id="mod-reflected"),
    case(lambda x: x % x.shape[0], [ints(S, 2)], id="mod-size"),
    case(lambda x: (x * 1).remainder_(0.7), [(B, 9)], id="remainder_"),
    case(aten.div.Tensor_mode, [ints(B, 9), ints(1, low=2, high=5)], rounding_mode="floor", id="aten.div.Tensor_mode"),
]

POWER = [
    *[case(torch.pow, [floats(B, 3, low=-2, high=2)], n) for n in (0, 1, 2, 3, 4, 5.0, -3)],
    *[case(torch.pow, [positive], n) for n in (0.5, -0.5, -1, -2, 2.5, -1.5, 1 / 3)],
    *[case(torch.pow, [floats(B, 3, low=0.5, high=3, dtype=torch.float16)], n) for n in (2, 3, 0.5, -0.5, -2, 2.5)],
    *[case(torch.pow, [ints(B, 9)], n) for n in (0, 1, 2, 3, 7)],
    *[case(torch.pow, [ints(B, 9)], n) for n in (2.0, 3.0)],
    case(torch.pow, [ints(B, 9, low=1)], 0.5),
    case(torch.pow, [ints(B, 9, dtype=INT32)], 5),
    case(torch.pow, [byte], 3),
    case(torch.pow, [bools(B, 9)], 2),
    case(torch.pow, [positive, (B, 3)]),
    case(torch.pow, [ints(B, 9), ints(9, low=0, high=5)]),
    case(lambda x: 2**x, [(B, 3)], id="scalar-base"),
    case(lambda x: 2.5**x, [ints(B, 3)], id="scalar-base-int"),
    case(lambda x: 2**x, [ints(B, 3, low=0)], id="int-base-int"),
    case(torch.pow, [half(B, 3)], torch.tensor(2.0), id="0d-exponent"),
    case(lambda x: x**2 + (x * 1).pow_(3), [(B, 3)], id="operators"),
    case(lambda x: x.__pow__(2) + x.square(), [(B, 3)], id="__pow__"),
    case(torch.square, [bools(B, 3)]),
    case(Tensor.square, [half(B, 3)]),
    case(aten.pow.Tensor_Scalar, [(B, 3)], 2, id="aten.pow"),
]

ROUND = [
    *[
        case(f, [floats(B, 9, low=-4, high=4)])
        for f in (torch.floor, torch.ceil, torch.round, torch.trunc, torch.fix, torch.frac)
    ],
    *[case(f, [half(B, 9)]) for f in (Tensor.floor, Tensor.ceil, Tensor.round, Tensor.trunc, Tensor.frac)],
    *[case(f, [ints(B, 9)]) for f in (torch.floor, torch.ceil, torch.round, torch.trunc)],
    case(lambda x: torch.round(x / 2), [ints(B, 9)], id="round-ties"),
    case(torch.round, [(B, 9)], decimals=2),
    case(Tensor.round, [floats(B, 9, low=-500, high=500)], decimals=-1),
    case(torch.special.round, [half(B, 9)], decimals=1),
]

BOUND = [
    case(torch.clamp, [(B, 3)], -0.5, 0.25),
    case(torch.clamp, [(B, 3)], min=-0.5),
    case(torch.clamp, [(B, 3)], max=0.5),
    case(torch.clip, [(B, 3)], 0.5, -0.25),
    case(torch.clamp, [half(B, 9)], -0.1, 0.1),
    case(torch.clamp, [ints(B, 9)], -2, 3),
    case(torch.clamp, [ints(B, 9)], 0.5, 3),
    case(torch.clamp, [byte], 20, 200),
    case(torch.clamp, [(B, 3), (3,), (B, 1)]),
    case(lambda x, y: torch.clamp(x, max=y), [(B, 3), ints(3)], id="clamp-max-tensor"),
    case(Tensor.clamp, [(B, 3)], 0.0, float("inf")),
    case(lambda x: (x * 1).clamp_(max=0.5) + x.clamp_min(0) + torch.clamp_max(x, 1), [(B, 3)], id="clamp_"),
    case(Tensor.clamp_min, [(B, 3), (3,)]),
    case(lambda x: x.clamp(0, x.shape[0]), [ints(S, 2)], id="clamp-size"),
    case(aten.clamp.Tensor, [(B, 3), (3,)], id="aten.clamp.Tensor"),
    *[case(f, [(B, 3, S), (S,)]) for f in (torch.maximum, torch.minimum, torch.fmax, torch.fmin)],
    *[case(f, [ints(B, 3), ints(3, dtype=INT32)]) for f in (torch.maximum, torch.minimum, torch.fmax, torch.fmin)],
    *[case(f, [half(B, 3), half(3)]) for f in (torch.maximum, torch.fmin)],
]

SEVERAL = [
    *[case(torch.lerp, [(B, 3), (B, 1)], w) for w in (0.3, 0.7, 0.0, 1.0, 1.5)],
    case(torch.lerp, [(B, 3), (3,), (B, 1)]),
    case(Tensor.lerp, [half(B, 3), half(B, 3)], weight=0.6),
    case(torch.addcmul, [(B, 3), (3,), (B, 1)]),
    case(torch.addcmul, [ints(B, 3), ints(3), ints(B, 1)], value=-2),
    case(Tensor.addcmul, [half(B, 3), half(3), half(B, 1)], value=0.5),
    case(torch.addcdiv, [(B, 3), (3,), floats(B, 1)], value=2.5),
    case(torch.addcdiv, [half(B, 3), half(3), floats(B, 1, dtype=torch.float16)]),
    case(torch.hypot, [(B, 3), (3,)]),
    case(torch.hypot, [half(B, 3), half(3)]),
    case(lambda x: torch.hypot(x * 1e25, x * -1e24), [(B, 3)], id="hypot-large"),
    case(lambda x, y: (x * 1).addcmul_(x, y).lerp_(y, 0.25), [(B, 3), (B, 3)], id="inplace"),
]


@parametrize(ADD + DIVIDE + POWER + ROUND + BOUND + SEVERAL)
def test_arithmetic(row, mode, device):
    check_case(row, mode, device)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("function", [torch.fmax, torch.fmin, torch.hypot, lambda a, b: torch.trunc(a)])
def test_special_values(function, device):
    a = torch.tensor([NAN, NAN, INF, -INF, INF, 0.0, -0.5, 1.0], device=device)
    b = torch.tensor([NAN, 1.0, INF, INF, NAN, 0.0, 2.0, 1.0], device=device)
    model_trt = torch2rt(Call(function), [a, b])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(a, b), function(a, b))


def test_remainder_of_a_quotient_that_rounds_up(device):
    """5.9999995 / 2 is 3 to a float, and the remainder must not be negative for that."""
    a = torch.tensor([5.9999995, -5.9999995, 1e-9, -1e-9, 8388607.5], device=device)
    for function in (torch.remainder, torch.fmod):
        model_trt = torch2rt(Call(function, (2,)), [a])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(a), function(a, 2))


ROUNDED = {
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "remainder": torch.remainder,
    "fmod": torch.fmod,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", ROUNDED.values(), ids=ROUNDED)
def test_quotients_of_half_precision_near_integers(function, dtype, device):
    """By a tensor, and by numbers that half precision holds and does not hold; as torch computes on the CPU."""
    numerators = torch.linspace(-40, 40, 4001).to(dtype)
    divisors = torch.tensor([0.3, -0.7, 3.3, 7.0, 0.0999]).repeat_interleave(9)[: numerators.numel()].to(dtype)
    multiples = torch.cat([(divisors.float() * k).to(dtype) for k in range(-30, 31)])
    pairs = (multiples, divisors.repeat(61))
    for inputs, call in [(pairs, function)] + [((numerators,), lambda a, s=s: function(a, s)) for s in (3.3, -0.1, 4)]:
        model_trt = torch2rt(Call(call), [i.to(device) for i in inputs])
        result = (model_trt if device.type == "cuda" else model_trt.reference())(*[i.to(device) for i in inputs])
        compare(result.cpu(), call(*inputs))


def test_a_number_divided_by_half_precision(device):
    x = torch.linspace(0.05, 9, 4001, dtype=torch.float16)
    for function in (lambda x: 7.7 // x, lambda x: 7.7 % x):
        model_trt = torch2rt(Call(function), [x.to(device)])
        run = model_trt if device.type == "cuda" else model_trt.reference()
        compare(run(x.to(device)).cpu(), function(x))


def test_a_square_is_a_product():
    assert torch2rt(Call(torch.pow, (2,)), [torch.randn(2, 3)]).network.num_layers == 1
