import math

import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, floats, ints, parametrize

from torch2rt import TraceError, torch2rt

Tensor, special, aten = torch.Tensor, torch.special, torch.ops.aten


def trigamma(x):
    return torch.polygamma(1, x)


# where each is well conditioned: between its poles and away from its zeros, which no float32 argument meets
RANGES = {
    torch.erfinv: [(-0.999, 0.999), (-1e-3, 1e-3), (0.99, 1.0)],
    special.ndtri: [(1e-3, 0.999), (0.49, 0.51), (1e-9, 1e-6)],
    special.erfcx: [(-9, -1), (-1, 1), (1, 50)],
    special.log_ndtr: [(-40, -5), (-5, 2), (2, 5)],
    torch.lgamma: [(1e-3, 0.9), (0.99, 1.01), (1.99, 2.01), (2.5, 9), (9, 1e5), (-0.99, -0.01), (-1.9, -1.1)],
    torch.digamma: [(1e-3, 1.3), (1.6, 9), (9, 1e5), (-0.4, -0.01)],
    trigamma: [(1e-3, 3), (3, 1e5), (-2.9, -2.1)],
    torch.i0: [(-4, 4), (4, 80)],
    special.i0e: [(-4, 4), (4, 1e5)],
    special.i1: [(-1e-2, 1e-2), (-9, 4), (4, 80)],
    special.i1e: [(-1e-2, 1e-2), (-9, 4), (4, 1e5)],
}
ONE = list(RANGES)
HALF = [f for f in ONE if f not in (special.ndtri, special.erfcx, special.log_ndtr)]  # torch has no others
INSIDE = {torch.erfinv: (-0.9, 0.9), special.ndtri: (0.1, 0.9)}
TIGHT = {"rtol": 5e-6, "atol": 1e-37}

CASES = [
    *[case(f, [floats(B, 64, low=low, high=high)], **TIGHT) for f, ranges in RANGES.items() for low, high in ranges],
    *[
        case(f, [floats(B, 3, S, low=low, high=high, dtype=d)], modes=("static",))
        for f in HALF
        for low, high in [INSIDE.get(f, (2.5, 4))]
        for d in (torch.float16, torch.bfloat16)
    ],
    *[case(f, [ints(B, 9, low=3, high=9)], modes=("static",)) for f in ONE if f not in INSIDE],
    *[case(f, [ints(B, 9, low=0, high=2, dtype=torch.int32)], modes=("static",)) for f in INSIDE],
    case(special.i0e, [bools(B, 9)]),
    case(torch.erfinv, [bools(B, 9)]),
    # spellings
    *[
        case(f, [floats(B, 3)], modes=("static",))
        for f in (
            Tensor.lgamma,
            special.gammaln,
            Tensor.digamma,
            special.digamma,
            special.psi,
            Tensor.i0,
            special.i0,
            aten.lgamma.default,
            aten.digamma.default,
            aten.special_i1e.default,
            aten.special_erfcx.default,
        )
    ],
    *[
        case(f, [floats(B, 3, low=-0.9, high=0.9)], modes=("static",))
        for f in (Tensor.erfinv, special.erfinv, aten.erfinv.default)
    ],
    *[case(Tensor.polygamma, [floats(B, 3)], n) for n in (0, 1)],
    case(lambda x: special.polygamma(1, x), [floats(B, 3)], id="special.polygamma"),
    case(lambda x: aten.polygamma.default(1, x), [floats(B, 3)], id="aten.polygamma"),
    case(torch.mvlgamma, [floats(B, 9, low=1.1, high=9)], 3),
    case(Tensor.mvlgamma, [floats(B, 9, low=3.1, high=9, dtype=torch.float16)], p=1),
    case(special.multigammaln, [ints(B, 9, low=3, high=9)], p=5),
    case(lambda x: (x + 0.1).lgamma_().clone().digamma_(), [floats(B, 3, low=2.5, high=9)], id="inplace"),
    case(lambda x: torch.lgamma(x, out=torch.empty_like(x)), [floats(B, 3)], id="out"),
    case(lambda x: torch.lgamma(x.sum()), [floats(B, 3)], id="0d"),
    case(torch.frexp, [(B, 3, S)]),
    case(lambda x: torch.frexp(torch.exp(x * 20)), [(B, 64)], id="frexp-far"),
    *[case(Tensor.frexp, [Data((B, 9), d)], modes=("static",)) for d in (torch.float16, torch.bfloat16)],
    # distributions
    case(
        lambda x: torch.distributions.Normal(x.new_zeros(()), x.new_ones(()), validate_args=False).icdf(x),
        [floats(B, 9, low=0.01, high=0.99)],
        id="Normal.icdf",
    ),
    case(
        lambda a, x: torch.distributions.Beta(a, a + 1, validate_args=False).log_prob(x),
        [floats(B, 9), floats(B, 9, low=0.1, high=0.9)],
        id="Beta.log_prob",
    ),
    case(
        lambda a: torch.distributions.Dirichlet(a, validate_args=False).entropy(),
        [floats(B, 9)],
        id="Dirichlet.entropy",
    ),
]


@parametrize(CASES)
def test_special(row, mode, device):
    check_case(row, mode, device)


INF, NAN = math.inf, math.nan
VALUES = [0.0, -0.0, 1.0, -1.0, 2.0, -2.5, 1.5, 3.0, 8.0, -8.0, INF, -INF, NAN, 1e30, 1e-37, -1e-37]


@pytest.mark.parametrize("function", ONE)
def test_special_values(function, device):
    values = [v for v in VALUES if function is not trigamma or v >= 0 or v != v]
    x = torch.tensor(values, device=device)
    model_trt = torch2rt(Call(function), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x))


def test_trigamma_at_its_poles(device):
    """Infinite, where torch has what the sine of a rounded multiple of pi makes of it."""
    x = torch.tensor([0.0, -1.0, -7.0], device=device)
    model_trt = torch2rt(Call(trigamma), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), torch.full_like(x, INF))


def test_frexp_of_special_values(device):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 3.4e38, 1.2e-38, -INF, INF, NAN, 2.0**64, 2.0**-64], device=device)
    model_trt = torch2rt(Call(torch.frexp), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), torch.frexp(x))


def test_higher_derivatives_are_refused():
    with pytest.raises(TraceError, match=r"polygamma: n=2: digamma \(0\) and its first derivative \(1\)"):
        torch2rt(Call(Tensor.polygamma, (2,)), [torch.rand(3)])


CHEBYSHEV = [
    case(special.chebyshev_polynomial_t, [floats(B, 3, S, low=-1.5, high=1.5)], n) for n in (-1, 0, 1, 2, 5, 9, 12)
] + [
    case(lambda x: special.chebyshev_polynomial_t(x.sign(), 7), [(B, 5)], id="chebyshev-ones"),
    case(lambda x: special.chebyshev_polynomial_t(x, 3), [ints(B, 5, dtype=torch.int32)], id="chebyshev-ints"),
]


@parametrize(CHEBYSHEV)
def test_chebyshev_polynomials(row, mode, device):
    check_case(row, mode, device)


def test_degrees_of_chebyshev_polynomials_are_bounded():
    with pytest.raises(TraceError, match="n=65: degrees up to 64"):
        torch2rt(Call(special.chebyshev_polynomial_t, (65,)), [torch.ones(2)])
