import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import UnsupportedError, torch2rt

Tensor, special, aten = torch.Tensor, torch.special, torch.ops.aten
UNIT = {"low": -0.95, "high": 0.95}
POSITIVE = {"low": 0.1, "high": 5}
NEAR_ZERO = {"low": -1e-3, "high": 1e-3}

ANYWHERE = [
    torch.exp,
    torch.exp2,
    torch.expm1,
    torch.sin,
    torch.cos,
    torch.tan,
    torch.sinh,
    torch.cosh,
    torch.atan,
    torch.asinh,
    torch.erf,
    torch.erfc,
    torch.sinc,
    torch.deg2rad,
    torch.rad2deg,
    torch.abs,
    torch.neg,
    torch.sign,
]
WITHIN = [torch.asin, torch.acos, torch.atanh, torch.log1p]
ABOVE = [torch.log, torch.log2, torch.log10, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log1p]

CASES = [
    *[case(f, [(B, 3, S)]) for f in ANYWHERE],
    *[case(f, [floats(B, 3, **UNIT)]) for f in WITHIN],
    *[case(f, [floats(B, 3, **POSITIVE)]) for f in ABOVE],
    case(torch.acosh, [floats(B, 3, low=1, high=9)]),
    *[case(f, [half(B, 9)], modes=("static",)) for f in ANYWHERE],
    *[case(f, [floats(B, 9, **UNIT, dtype=torch.float16)], modes=("static",)) for f in WITHIN],
    *[case(f, [floats(B, 9, **POSITIVE, dtype=torch.float16)], modes=("static",)) for f in ABOVE],
    *[
        case(f, [Data((B, 9), torch.bfloat16)], modes=("static",))
        for f in (torch.exp, torch.expm1, torch.sin, torch.neg, torch.sinc)
    ],
    # integers are promoted
    *[
        case(f, [ints(B, 3, low=1, high=4)])
        for f in (*ABOVE, torch.exp, torch.sin, torch.erfc, torch.sinc, torch.deg2rad, torch.logit)
    ],
    *[case(f, [bools(B, 3)], modes=("static",)) for f in (torch.exp, torch.sqrt, torch.expm1, torch.sign, torch.sgn)],
    *[
        case(f, [ints(B, 3, dtype=d)])
        for f in (torch.abs, torch.neg, torch.sign)
        for d in (torch.int64, torch.int32, torch.int8)
    ],
    *[
        case(f, [ints(B, 9, low=0, high=256, dtype=torch.uint8)])
        for f in (torch.abs, torch.neg, torch.sign, torch.sqrt)
    ],
    # where a sum would lose the argument, and far out
    *[
        case(f, [floats(B, 9, **NEAR_ZERO)], rtol=1e-5, atol=1e-9)
        for f in (torch.expm1, torch.log1p, torch.erfc, torch.sinc)
    ],
    case(torch.expm1, [floats(B, 64, low=-90, high=80)], rtol=1e-5),
    case(torch.log1p, [floats(B, 64, low=-0.99, high=9)], rtol=1e-5, atol=1e-7),
    case(torch.log1p, [floats(B, 64, low=1, high=1e9)], rtol=1e-5),
    case(torch.erfc, [floats(B, 64, low=-4, high=9)], rtol=5e-5, atol=1e-37),
    case(torch.erfc, [floats(B, 64, low=-4, high=4, dtype=torch.float16)]),
    # spellings
    *[
        case(f, [floats(B, 3, **UNIT)], modes=("static",))
        for f in (torch.arcsin, Tensor.arccos, torch.arctan, Tensor.arctanh, torch.arcsinh)
    ],
    *[
        case(f, [(B, 3)], modes=("static",))
        for f in (torch.absolute, torch.negative, Tensor.sgn, torch.positive, Tensor.exp, Tensor.erf)
    ],
    *[
        case(f, [(B, 3)], modes=("static",))
        for f in (special.erf, special.erfc, special.exp2, special.expm1, special.sinc)
    ],
    case(special.log1p, [floats(B, 3, **POSITIVE)]),
    case(lambda x: abs(-x), [(B, 3)], id="operators"),
    case(lambda x: (x * 1).exp_().log1p_().neg_(), [(B, 3)], id="inplace"),
    case(lambda x: torch.sin(x, out=torch.empty_like(x)), [(B, 3)], id="out"),
    case(lambda x: torch.exp(x.mean()), [(B, 3)], id="0d"),
    case(aten.rsqrt.default, [floats(B, 3, **POSITIVE)], id="aten.rsqrt"),
    case(torch.logit, [floats(B, 9, low=0.01, high=0.99)]),
    case(torch.logit, [floats(B, 9, low=-1, high=2)], eps=0.1),
    case(special.logit, [floats(B, 9, low=0.01, high=0.99, dtype=torch.float16)], 0.2),
    # two operands
    case(torch.atan2, [(B, 3, S), (S,)]),
    case(Tensor.arctan2, [ints(B, 9, low=-2, high=3), ints(B, 9, low=-2, high=3)]),
    case(torch.atan2, [half(B, 9), half(B, 9)]),
    case(torch.xlogy, [ints(B, 9, low=0, high=3), ints(9, low=0, high=3)]),
    case(torch.xlogy, [(B, 3)], 2.5),
    case(lambda x: torch.xlogy(2.5, x), [floats(B, 3)], id="xlogy-number-left"),
    case(lambda x: torch.xlogy(2.5, x.half()), [floats(B, 3)], id="xlogy-number-left-half"),
    case(lambda x: torch.xlogy(0, x), [floats(B, 3)], id="xlogy-zero-left"),
    case(special.xlog1py, [half(B, 3), floats(B, 3, dtype=torch.float16)]),
    case(torch.heaviside, [ints(B, 9, low=-2, high=3), ints(1)]),
    case(torch.heaviside, [(B, 9), (9,)]),
    case(torch.copysign, [(B, 9), (9,)]),
    case(torch.copysign, [ints(B, 9), ints(9)]),
    case(Tensor.copysign, [half(B, 9)], -0.0),
    case(torch.copysign, [(B, 9)], 2),
]


@parametrize(CASES)
def test_elementary(row, mode, device):
    check_case(row, mode, device)


NAN, INF = float("nan"), float("inf")
ONE = [
    torch.expm1,
    torch.log1p,
    torch.exp2,
    torch.log2,
    torch.erfc,
    torch.rsqrt,
    torch.logit,
    torch.exp,
    torch.sqrt,
    torch.sinc,
]
TWO = [torch.xlogy, special.xlog1py, torch.copysign, lambda a, b: torch.heaviside(b, a)]


@pytest.mark.parametrize("function", [*[lambda a, b, f=f: f(a) for f in ONE], *TWO])
def test_special_values(function, device):
    a = torch.tensor([0.0, -0.0, 0.0, 1.0, 2.0, -1.0, 0.0, -1.0, 9.0], device=device)
    b = torch.tensor([NAN, 1.0, INF, -0.0, NAN, -INF, 0.0, -1.0, 2.0], device=device)
    for x, y in ((a, b), (b, a)):
        y = y.nan_to_num(1.0) if function is torch.copysign else y
        model_trt = torch2rt(Call(function), [x, y])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x, y), function(x, y))


def test_atan2_of_axes(device):
    y = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 1.0, -1.0], device=device)
    x = torch.tensor([0.0, -2.0, 0.0, 0.0, 2.0, -INF, -INF], device=device)
    model_trt = torch2rt(Call(torch.atan2), [y, x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(y, x), torch.atan2(y, x))


def test_refused():
    with pytest.raises(UnsupportedError, match=r"eps=0\.6 puts the lower bound above"):
        torch2rt(Call(torch.logit, (0.6,)), [torch.rand(2, 3)])
