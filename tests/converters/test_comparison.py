import operator

import pytest
import torch
from harness import B, Call, S, bools, case, check_case, compare, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

Tensor, aten = torch.Tensor, torch.ops.aten
BYTES = ints(B, 5, low=0, dtype=torch.uint8)
COMPARISONS = [torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge]
small = ints(B, 3, low=-2, high=3)
byte = ints(B, 3, low=0, high=4, dtype=torch.uint8)
int32 = ints(B, 3, low=-2, high=3, dtype=torch.int32)

CASES = [
    *[case(f, [BYTES, ints(low=-9, high=-3)]) for f in COMPARISONS],  # as a byte, -3 is 253
    *[case(f, [small, ints(B, 1, low=-2, high=3)]) for f in COMPARISONS],
    *[case(f, [(B, 3, S), (S,)]) for f in COMPARISONS],
    *[case(f, [byte], 2) for f in COMPARISONS],
    *[case(f, [bools(B, 3), bools(3)], modes=("static",)) for f in COMPARISONS],
    *[case(f, [half(B, 3)], 0.25) for f in (torch.le, torch.gt)],
    *[
        case(lambda x, y, f=f: f(x, y), [small, int32], id=f"operator-{f.__name__}")
        for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
    ],
    *[
        case(lambda x, f=f: f(1, x), [small], id=f"operator-{f.__name__}-reflected")
        for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
    ],
    case(torch.not_equal, [small], 1),
    case(Tensor.greater_equal, [small], 1),
    case(torch.less, [small, (3,)]),
    case(Tensor.eq, [bools(B, 3)], True),
    case(Tensor.lt, [small], 0.5),
    case(torch.gt, [byte, ints(3, dtype=torch.int32)]),
    case(lambda x: x.amax() > x, [(B, 3)], id="0d-left"),
    case(lambda x: (x * 1).ge_(0.5), [(B, 3)], id="ge_"),
    case(lambda x: x.size(0) == x.new_zeros(1, 2).add(2), [(B, 3)], id="size-left"),
    case(aten.ge.Scalar, [small], 1, id="aten.ge.Scalar"),
    case(aten.ne.Tensor, [small, small], id="aten.ne.Tensor"),
    case(torch.isclose, [small, small]),
    case(torch.isclose, [(B, 3), (B, 3)], rtol=0.5, atol=0.25, equal_nan=True),
    # choosing
    case(torch.where, [bools(B, 3), (B, 1), (3,)]),
    case(lambda c, x: torch.where(c, x, -1.5), [bools(B, 3), (B, 3)], id="where-number-right"),
    case(lambda c, x: torch.where(c, 2, x), [bools(B, 3), half(3)], id="where-number-left"),
    case(lambda c: torch.where(c, 2, 3), [bools(B, 3)], id="where-integers"),
    case(lambda c: torch.where(c, 2.0, 3), [bools(B, 3)], id="where-numbers"),
    case(lambda x, y: torch.where(x > y, x, y), [small, (3,)], id="where-promotes"),
    case(torch.where, [bools(B, 3), byte, byte]),
    case(torch.where, [bools(B, 3), bools(B, 1), bools(3)]),
    case(lambda x, c, y: x.where(c, y), [(B, 3), bools(3), (B, 1)], id="where-method"),
    case(lambda c, x: torch.where(condition=c, input=x, other=x * 2), [bools(B, 3), (B, 3)], id="where-keywords"),
    case(aten.where.self, [bools(B, 3), (B, 3), (B, 3)], id="aten.where"),
    case(torch.masked_fill, [(B, 3, S), bools(3, 1)], -1e9),
    case(Tensor.masked_fill, [half(B, 3), bools(B, 3)], float("-inf")),
    case(Tensor.masked_fill, [small, bools(3)], value=7),
    case(Tensor.masked_fill, [byte, bools(3)], 7),
    case(lambda x, m: x.masked_fill(m, x.sum()), [(B, 3), bools(B, 3)], id="masked_fill-0d"),
    case(lambda x, m: (x * 1).masked_fill_(~m, 2.5), [(B, 3), bools(B, 3)], id="masked_fill_"),
    case(aten.masked_fill.Scalar, [(B, 3), bools(B, 3)], 1, id="aten.masked_fill"),
    # logic
    *[case(f, [(B, 3), ints(B, 3, low=-1, high=2)]) for f in (torch.logical_and, torch.logical_or, torch.logical_xor)],
    *[case(f, [bools(B, 3), bools(3)]) for f in (torch.logical_and, Tensor.logical_or, Tensor.logical_xor)],
    case(torch.logical_not, [ints(B, 3, low=-1, high=2)]),
    case(Tensor.logical_not, [byte]),
    case(lambda a, b: (a & b) | (a ^ ~b), [bools(B, 3), bools(3)], id="operators-bool"),
    case(lambda a: (True & a) | (False ^ a), [bools(B, 3)], id="operators-reflected"),
    case(lambda a, b: (a.clone().__iand__(b)).__ior__(~a), [bools(B, 3), bools(B, 3)], id="operators-inplace"),
    case(torch.bitwise_and, [bools(B, 3), bools(3)]),
    case(Tensor.bitwise_or, [bools(B, 3), bools(3)]),
    case(torch.bitwise_xor, [bools(B, 3), bools(3)]),
    # bits of integers
    case(lambda x: x & 7, [ints(B, 3)], id="and-mask"),
    case(lambda x: 1 & x, [ints(B, 3, dtype=torch.int32)], id="and-mask-reflected"),
    case(lambda x: x & 1, [byte], id="and-mask-byte"),
    case(lambda x: x & 1, [bools(B, 3)], id="and-mask-bool"),
    *[
        case(torch.bitwise_not, [ints(B, 3, low=0, high=100, dtype=d)])
        for d in (torch.int64, torch.int32, torch.int8, torch.uint8)
    ],
    case(lambda x: (x << 3) - (x >> 1), [ints(B, 3)], id="shifts"),
    case(lambda x, y: (x | y) ^ (x & -y), [ints(B, 3), ints(S, 1, 1)], id="bits"),
    case(lambda x: x & x.shape[0], [ints(B, 3)], id="and-size"),
    case(operator.lshift, [ints(B, 3), ints(3, low=0, high=9, dtype=torch.int8)], id="shifts-by-bytes"),
    case(lambda x: (x << x.shape[0]) ^ (x >> (x.shape[0] - 1)), [ints(B, 3)], id="shifts-by-size"),
    case(torch.ops.aten.bitwise_xor.Tensor, [ints(B, 3, dtype=torch.int32), bools(3)], id="aten.bitwise_xor"),
    case(
        lambda x: torch.bitwise_right_shift(x, torch.tensor([0, 1, 30], device=x.device, dtype=x.dtype)),
        [int32],
        id="shifts-tensor",
    ),
    # kinds of numbers
    *[
        case(f, [(B, 3)])
        for f in (torch.isnan, torch.isinf, torch.isfinite, torch.isposinf, torch.isneginf, torch.isreal, torch.signbit)
    ],
    *[
        case(f, [small])
        for f in (torch.isnan, torch.isinf, torch.isfinite, torch.isposinf, torch.isreal, torch.signbit)
    ],
    *[case(f, [bools(B, 3)]) for f in (Tensor.isfinite, Tensor.isneginf, Tensor.signbit)],
    case(torch.nan_to_num, [small]),
]


@parametrize(CASES)
def test_comparison(row, mode, device):
    check_case(row, mode, device)


WHOLE = [torch.int64, torch.int32, torch.int8, torch.uint8]


def extremes(dtype, device):
    """Integers of all sizes and signs, and those at the ends of the range."""
    limits = torch.iinfo(dtype)
    ends = [limits.min, limits.max, 0, 1, limits.max // 2, limits.max - 1]
    inner = torch.randint(limits.min, limits.max, (30,), dtype=dtype)
    return torch.cat([inner, torch.tensor(ends, dtype=dtype)]).to(device)


def run(function, *inputs):
    model_trt = torch2rt(Call(function), inputs)
    return (model_trt if inputs[0].device.type == "cuda" else model_trt.reference())(*inputs)


def several(functions):
    """Calls of one input as one, so that one engine has them all."""
    return lambda *inputs: [function(*inputs) for function in functions]


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("function", [operator.and_, operator.or_, operator.xor])
def test_bits(function, dtype, device):
    a, b = extremes(dtype, device), extremes(dtype, device).flip(0)
    calls = [function, lambda x, y: function(x[:, None], y), lambda x, y: function(x, b)]
    for number in (0, 1, 5, 112, 127, *((-1, -4, -5, -128) if dtype.is_signed else (252, 255))):
        calls += [lambda x, y, n=number: function(x, n), lambda x, y, n=number: function(n, x)]
    compare(run(several(calls), a, b), several(calls)(a, b))


@pytest.mark.parametrize("dtype", WHOLE[:2])
@pytest.mark.parametrize("function", [operator.lshift, operator.rshift])
def test_shifts(function, dtype, device):
    bits = torch.iinfo(dtype).bits
    a, amount = extremes(dtype, device), torch.arange(36, device=device, dtype=dtype) % bits
    amount[-6:] = torch.tensor([bits - 1, bits - 1, bits - 2, bits - 1, 0, 1])
    calls = [function, lambda x, n: function(-37, n)]
    calls += [lambda x, n, number=number: function(x, number) for number in (0, 3, bits - 2, bits - 1)]
    compare(run(several(calls), a, amount), several(calls)(a, amount))


NAN, INF = float("nan"), float("inf")
SPECIAL = [
    *COMPARISONS,
    torch.isclose,
    lambda a, b: torch.isclose(a, b, equal_nan=True),
    *[
        lambda a, b, f=f: f(a)
        for f in (
            torch.isnan,
            torch.isinf,
            torch.isfinite,
            torch.isposinf,
            torch.isneginf,
            torch.nan_to_num,
            torch.logical_not,
        )
    ],
    lambda a, b: torch.nan_to_num(a, 1.5, 7.0, -8.0),
    lambda a, b: torch.nan_to_num(a, nan=NAN, neginf=2.0),
    lambda a, b: torch.signbit(torch.where(a == a, a, 1.0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", SPECIAL)
def test_special_values(function, dtype, device):
    a = torch.tensor([NAN, NAN, INF, -INF, INF, 0.0, -0.0, 1.0], dtype=dtype, device=device)
    b = torch.tensor([NAN, 1.0, INF, INF, 1.0, -0.0, 2.0, 1.0], dtype=dtype, device=device)
    model_trt = torch2rt(Call(function), [a, b])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(a, b), function(a, b))


ERRORS = [
    (lambda x: x >> 64, "from 0 to 63"),
    (lambda x: x << -1, "from 0 to 63"),
    (lambda x: x.to(torch.uint8) << 1, "shifts of torch.uint8 are not supported"),
    (lambda x: torch.where(x > 1), "how many elements a computed mask selects depends on data"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.arange(6).reshape(2, 3)])
