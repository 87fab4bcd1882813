"""Special functions without a layer, in float32 for half precision too.

Where a function bends, a polynomial in float32 follows it: one through values that torch itself computes in float64.
"""

import math

from torch2rt.vocabulary import check, composite, named, torch

Tensor, aten, special = torch.Tensor, torch.ops.aten, torch.special


def curve(low, high, degree):
    """A function of float64 as the polynomial that meets it at Chebyshev's points between `low` and `high`."""
    centre, half = (high + low) / 2, (high - low) / 2

    def fit(function):
        points = torch.arange(degree + 1, dtype=torch.float64, device="cpu") + 0.5
        points = torch.cos(points * (math.pi / (degree + 1)))
        values = function(points * half + centre)
        first, *rest = torch.linalg.solve(torch.vander(points), values).tolist()

        def polynomial(x):
            x = x if (centre, half) == (0, 1) else x * (1 / half) - centre / half
            result = first * x + rest[0]
            for coefficient in rest[1:]:
                result = result * x + coefficient
            return result

        return polynomial

    return fit


def of_float32(*names):
    """Register a function of one float32 tensor, through which the other types go."""

    def register(function):
        def body(input):
            dtype = input.dtype if input.is_floating_point() else torch.get_default_dtype()
            return function(input.float()).to(dtype)

        composite(*named(*names))(body)
        return function

    return register


# The error function and the normal distribution ----------------------------------------------------------------------


def erfinv_ratio(w):
    """erfinv(x) / x by w = -log(1 - x^2), which stays known where x nears 1; `ndtri` is known for more of them."""
    x = torch.sqrt(-torch.expm1(-w))
    return special.ndtri(torch.exp(-w) / (2 + 2 * x)) / (x * -math.sqrt(2))


CENTRE = curve(0, 5, 9)(erfinv_ratio)
TAIL = curve(0.097, 0.4473, 12)(lambda s: erfinv_ratio(s**-2) * s)


def inverse(x, w):
    """Giles' way to erfinv(x), in "Approximating the erfinv function" (2011)."""
    root = w.sqrt()
    return x * torch.where(w < 5, CENTRE(w), root * TAIL(1 / root))


@of_float32("erfinv")
def erfinv(x):
    return torch.where(x.abs() == 1, x * math.inf, inverse(x, -torch.log((1 - x) * (1 + x))))


@of_float32("ndtri")
def ndtri(x):
    y = 2 * x - 1
    value = math.sqrt(2) * inverse(y, -torch.log(4 * x * (1 - x)))
    return torch.where((x == 0) | (x == 1), y * math.inf, value)


@curve(0, 1, 12)
def SCALED_ERFC(t):
    return special.erfcx(2 / t - 2) / t


@of_float32("erfcx")
def erfcx(x):
    """On the left 2 * exp(x^2) takes over, whose exponent needs more digits than float32 has: its head is exact."""
    size = x.abs()
    t = 2 / (size + 2)
    right = t * SCALED_ERFC(t)
    near = size.clamp(max=10)
    head = torch.round(near * 16) / 16
    square = torch.exp(head * head) * torch.exp((near - head) * (near + head))
    return torch.where(x < 0, 2 * square - right, right)


@of_float32("log_ndtr")
def log_ndtr(x):
    left = torch.log(special.erfcx(x * -math.sqrt(0.5)) / 2) - x * x / 2
    right = torch.log1p(torch.erfc(x * math.sqrt(0.5)) / -2)
    return torch.where(x < -1, left, right)


# The gamma function --------------------------------------------------------------------------------------------------


@curve(-1, 1, 13)
def BETWEEN_ZEROS(t):
    return torch.lgamma(t + 2) / (t * (t + 1))


@curve(0.005, 1 / 3, 5)
def STIRLING(r):
    return (torch.lgamma(1 / r) - (1 / r - 0.5) * (-torch.log(r) - 1) - (math.log(2 * math.pi) - 1) / 2) / r


@of_float32("lgamma", "gammaln")
def lgamma(x):
    """Up to 3 around the zeros at 1 and 2, then Stirling's formula; below 0 the reflection."""
    size = x.abs()
    t = torch.where(size < 1, size - 1, size - 2)
    shift = torch.where(size < 0.5, size.log(), torch.log1p(t))
    near = t * (t + 1) * BETWEEN_ZEROS(t) - torch.where(size < 1, shift, 0.0)
    far = (size - 0.5) * (size.log() - 1) + (math.log(2 * math.pi) - 1) / 2 + STIRLING(1 / size) / size
    value = torch.where(size < 3, near, far)
    mirrored = torch.log(math.pi / torch.sin(math.pi * (x - x.round())).abs()) - size.log() - value
    return torch.where((x < 0) & (x > -math.inf), mirrored, value)


@of_float32("digamma", "psi")
def digamma(x):
    """Six steps up, then the asymptotic series; below 0 the reflection."""
    y = torch.where(x < 0, 1 - x, x)
    steps = sum((1 / (y + i) for i in range(1, 6)), 1 / y)
    z = y + 6
    r = 1 / (z * z)
    value = z.log() - 0.5 / z - r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r / 240))) - steps
    turn = x - x.round()
    mirrored = torch.where(turn == 0, math.nan, value - math.pi / torch.tan(math.pi * turn))
    return torch.where(x < 0, mirrored, value)


def trigamma(x):
    """Six steps up, then the asymptotic series; below 0 the reflection, with an infinite value at the integers."""
    y = torch.where(x < 0, 1 - x, x)
    steps = sum(1 / torch.square(y + i) for i in range(6))
    z = y + 6
    r = 1 / (z * z)
    value = (1 + 0.5 / z + r * (1 / 6 - r * (1 / 30 - r * (1 / 42 - r / 30)))) / z + steps
    return torch.where(x < 0, torch.square(math.pi / torch.sin(math.pi * (x - x.round()))) - value, value)


@composite(torch.polygamma, special.polygamma, aten.polygamma.default)
def polygamma(n, input):
    check(n <= 1, f"{n=}: digamma (0) and its first derivative (1) are supported")
    if n == 0:
        return torch.digamma(input)
    dtype = input.dtype if input.is_floating_point() else torch.get_default_dtype()
    return trigamma(input.float()).to(dtype)


@composite(Tensor.polygamma)
def polygamma_method(input, n):
    return torch.polygamma(n, input)


@composite(*named("mvlgamma", "multigammaln"))
def mvlgamma(input, p):
    dtype = input.dtype if input.is_floating_point() else torch.get_default_dtype()
    x = input.float()
    result = sum(torch.lgamma(x - i / 2) for i in range(p))
    return (result + p * (p - 1) / 4 * math.log(math.pi)).to(dtype)


# Modified Bessel functions -------------------------------------------------------------------------------------------


@curve(0, 1, 18)
def I0(t):
    return special.i0e(3 / t - 3) * torch.sqrt(3 / t)


@curve(0, 8, 17)
def I1_NEAR(x):
    return special.i1e(x) / x * (1 + x)


@curve(0, 1 / 8, 6)
def I1_FAR(r):
    return special.i1e(1 / r) / torch.sqrt(r)


@of_float32("i0e")
def i0e(x):
    t = 3 / (x.abs() + 3)
    return torch.sqrt(t / 3) * I0(t)


@of_float32("i0")
def i0(x):
    return torch.exp(x.abs()) * special.i0e(x)


@of_float32("i1e")
def i1e(x):
    size = x.abs()
    far = torch.sign(x) * I1_FAR(1 / size) / torch.sqrt(size)
    return torch.where(size < 8, x * I1_NEAR(size) / (1 + size), far)


@of_float32("i1")
def i1(x):
    return torch.exp(x.abs()) * special.i1e(x)


# Digits --------------------------------------------------------------------------------------------------------------

DOWN = [(2.0**k, k) for k in (64, 32, 16, 8, 4, 2, 1)] + [(1.0, 1)]
UP = [(2.0**-k, k) for k in (64, 64, 32, 16, 8, 4, 2, 1)]


@composite(torch.frexp, Tensor.frexp, aten.frexp.Tensor)
def frexp(input):
    """Powers of two, by which a product is exact, bring the size between 0.5 and 1."""
    x = input.float()
    mantissa, exponent = x, torch.zeros_like(x)
    for limit, k in DOWN:
        large = mantissa.abs() >= limit
        mantissa = torch.where(large, mantissa * 2.0**-k, mantissa)
        exponent = torch.where(large, exponent + k, exponent)
    for limit, k in UP:
        small = mantissa.abs() < limit
        mantissa = torch.where(small, mantissa * 2.0**k, mantissa)
        exponent = torch.where(small, exponent - k, exponent)
    exponent = torch.where(x.isfinite() & (x != 0), exponent, 0.0)
    return torch.return_types.frexp((mantissa.to(input.dtype), exponent.int()))


@composite(special.chebyshev_polynomial_t)
def chebyshev_polynomial_t(input, n):
    """By torch's rules: an angle between -1 and 1 for degrees above 6, else the recurrence."""
    check(isinstance(n, int), "the degree must be a number")
    check(n <= 64, f"{n=}: degrees up to 64 are written out")
    x = input if input.is_floating_point() else input.to(torch.get_default_dtype())
    if n < 0:
        return torch.zeros_like(x)
    before, result = torch.ones_like(x), x
    if n == 0:
        return before
    for _ in range(n - 1):
        before, result = result, 2 * x * result - before
    if n > 6:
        result = torch.where(x.abs() < 1, torch.cos(n * torch.acos(x)), result)
    return torch.where(x.abs() == 1, x if n % 2 else torch.ones_like(x), result)
