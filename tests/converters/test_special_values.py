"""NaN, infinities, signed zeros, subnormal and largest numbers through every call that goes element by element, pools,
reduces or orders.

Many calls share an engine, so that the table stays quick. A result is right if it is NaN where torch's is, infinite
where torch's is, and else as close as in any other test. Two things are left open: which of 0.0 and -0.0 a result is,
except for the calls in `SIGNED`, and whether a result below the smallest normal number is 0.

`but` names the elements that are not compared, and `why` says why: mostly since torch's own CPU and CUDA kernels
differ there.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import TOLERANCES, Call

from torch2rt import InputError, converters, torch2rt

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Tensor, special = torch.Tensor, torch.special


@dataclasses.dataclass
class Row:
    name: str
    function: Callable
    but: Callable | None = None  # of the inputs: which elements of the result are not compared
    why: str = ""


def row(function, name=None, but=None, why=""):
    return Row(name or getattr(function, "__name__", repr(function)), function, but, why)


def beyond(limit):
    """What is beyond this part of the largest number."""
    return lambda x: x.abs() > limit * torch.finfo(x.dtype).max


def everywhere(*xs):
    return torch.ones((), dtype=torch.bool)


DOUBLES = "the product with 2 on the way is infinite"
SQUARES = "TensorRT squares on the way, torch's CPU and CUDA kernels differ"
NAMES_ONE = """
    relu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal abs neg sign sgn floor ceil round trunc
    frac sin cos tan sinh cosh asin acos atan asinh acosh atanh erf erfc square sinc logit isnan isinf isfinite
    isposinf isneginf nan_to_num signbit positive deg2rad logical_not
"""
ONE = [
    *[row(getattr(torch, name)) for name in NAMES_ONE.split() if name != "signbit"],
    row(torch.signbit, but=torch.isnan, why="the sign of a NaN is not defined"),
    *[row(f) for f in (F.leaky_relu, F.elu, F.selu, F.silu, F.mish, F.softsign, F.logsigmoid, F.tanhshrink)],
    *[row(f) for f in (F.hardtanh, F.relu6, F.hardsigmoid, F.hardshrink, F.softshrink, F.softplus)],
    row(F.hardswish, but=beyond(0.1), why="torch multiplies before it divides by 6, which may be infinite"),
    row(F.gelu, but=beyond(0.4), why=DOUBLES + ", and torch's CPU kernel makes NaN of infinity"),
    row(lambda x: F.gelu(x, approximate="tanh"), "gelu-tanh", beyond(0.4), DOUBLES),
    row(lambda x: F.leaky_relu(x, 0.0), "leaky_relu-0"),
    row(lambda x: F.leaky_relu(x, -0.5), "leaky_relu-negative"),
    row(lambda x: F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype, device=x.device)), "prelu"),
    row(lambda x: F.elu(x, 0.5), "elu-0.5"),
    row(lambda x: F.softplus(x, 2.5), "softplus-2.5"),
    row(lambda x: F.leaky_relu(x, 0.3), "leaky_relu-0.3"),
    row(lambda x: F.celu(x, 2.0), "celu-2"),
    row(lambda x: F.threshold(x, 0.1, 2.0), "threshold"),
    row(lambda x: F.hardtanh(x, -0.25, 9.0), "hardtanh-bounds"),
    row(lambda x: torch.logit(x, 0.1), "logit-eps"),
    row(lambda x: x.clamp(-1, 2), "clamp"),
    row(lambda x: x.clamp(2, -1), "clamp-crossed"),
    row(lambda x: x.clamp(-INF, 3), "clamp-infinite"),
    row(lambda x: x.clamp(min=0.5), "clamp-min"),
    row(lambda x: x.clamp_min(0.5), "clamp_min"),
    row(lambda x: x.clamp(min=0), "clamp-min-0"),
    row(lambda x: x.clamp_max(0.5), "clamp_max"),
    row(lambda x: x.clip(-1.5, 1.5), "clip"),
    row(lambda x: torch.maximum(x, torch.ones_like(x)), "maximum-one"),
    row(lambda x: torch.minimum(torch.full_like(x, NAN), x), "minimum-nan"),
    row(lambda x: torch.nan_to_num(x, 1.5, 7.0, -8.0), "nan_to_num-numbers"),
    *[row(lambda x, n=n: x**n, f"pow-{n}") for n in (2, 3, -1, -2, 2.5, 3.5, 0)],
    *[
        row(lambda x, n=n: x**n, f"pow-{n}", lambda x: (x == -INF) | (x == 0), "torch's CPU and CUDA kernels differ")
        for n in (0.5, -0.5)
    ],
    *[row(lambda x, n=n: x % n, f"remainder-{n}") for n in (1.3, -2.5, 1, INF, -INF, 0.0)],
    *[row(lambda x, n=n: torch.fmod(x, n), f"fmod-{n}") for n in (1.3, -2.5, 1, INF, 0.0)],
    *[row(lambda x, n=n: x // n, f"floor_divide-{n}") for n in (1.3, -2.5, 1, INF, 0.0)],
    row(lambda x: torch.div(x, 1.3, rounding_mode="trunc"), "div-trunc"),
    row(lambda x: torch.where(x > 0, x, -1.0), "where"),
    row(lambda x: x.masked_fill(x == 1, NAN), "masked_fill"),
    row(lambda x: torch.copysign(x, -1.0), "copysign-number"),
    row(lambda x: x.cumsum(0), "cumsum", everywhere, "the order of the sums is open, as torch's is"),
]
NAMES_TWO = """
    add sub mul div maximum minimum fmax fmin atan2 hypot fmod remainder floor_divide heaviside logaddexp xlogy pow eq
    ne lt le gt ge isclose logical_xor
"""


def quotient_is_huge(a, b):
    """Where torch's vectorised CPU kernel gives NaN for the remainder, which is a number; and subnormal divisors."""
    quotient = (a.double() / b.double()).abs()
    huge = (quotient > 1e30) & b.isfinite() & (b != 0) & (a.device.type == "cpu")
    return huge | (b.abs() < torch.finfo(b.dtype).smallest_normal) & (b != 0)


HUGE = dict.fromkeys(("fmod", "remainder", "floor_divide"), quotient_is_huge)
TWO = [
    *[row(getattr(torch, name), but=HUGE.get(name), why="see quotient_is_huge") for name in NAMES_TWO.split()],
    row(torch.copysign, but=lambda a, b: b.isnan(), why="the sign of a NaN is not defined"),
    row(lambda a, b: torch.max(a, b), "max"),
    row(lambda a, b: a.clamp(b, b + 1), "clamp"),
    row(lambda a, b: a.clamp(max=b), "clamp-max"),
    row(lambda a, b: a.clamp_min(b), "clamp_min"),
    row(lambda a, b: torch.lerp(a, b, 0.25), "lerp"),
    row(lambda a, b: torch.where(a > b, a, b), "where"),
    row(lambda a, b: torch.isclose(a, b, equal_nan=True), "isclose-nan"),
    row(lambda a, b: torch.div(a, b, rounding_mode="trunc"), "div-trunc"),
]


def overflowing(x):
    """Rows in which sums or squares of the largest numbers depend on their order."""
    return (x.abs() > torch.finfo(x.dtype).max / 4).any(-1, keepdim=True)


ORDER = "sums of the largest numbers depend on the order"
EXTREMES = [torch.amax, torch.amin, torch.logsumexp, torch.argmax, torch.argmin, torch.softmax, torch.log_softmax]
SUMMED = [torch.sum, torch.mean, torch.nansum, torch.prod, torch.var, torch.std]
PAIRS = [torch.max, torch.min, torch.cummax, torch.cummin]
ROWS = [
    *[row(lambda x, f=f: f(x, -1), f.__name__) for f in EXTREMES],
    *[row(lambda x, f=f: f(x, -1), f.__name__, overflowing, ORDER) for f in SUMMED],
    *[row(lambda x, f=f: f(x, -1)[0], f.__name__) for f in [*PAIRS, torch.median]],
    *[row(lambda x, f=f: f(x, -1)[1], f.__name__ + "-places") for f in PAIRS],
    *[row(lambda x, i=i: torch.aminmax(x, dim=-1)[i], f"aminmax-{i}") for i in (0, 1)],
    row(lambda x: x.amax((0, 1)), "amax-all"),
    row(lambda x: x.min(), "min-all"),
    row(lambda x: x.amax(0), "amax-columns"),
    row(lambda x: x.amax(-1, keepdim=True) - x, "amax-keepdim"),
    row(lambda x: x.topk(2, -1)[0], "topk"),
    row(lambda x: x.topk(2, -1, largest=False)[0], "topk-smallest"),
    row(lambda x: x.sort(-1)[0], "sort"),
    row(lambda x: x.sort(-1, descending=True)[0], "sort-descending"),
    row(lambda x: x.gather(-1, x.argsort(-1)), "argsort"),
    row(lambda x: x.kthvalue(2, -1)[0], "kthvalue"),
    row(lambda x: x.nanmedian(-1)[0], "nanmedian"),
    row(lambda x: torch.linalg.vector_norm(x, INF, -1), "norm-inf"),
    row(lambda x: torch.linalg.vector_norm(x, -INF, -1), "norm-minus-inf"),
    row(lambda x: torch.linalg.vector_norm(x, 1, -1), "norm-1", overflowing, ORDER),
    row(lambda x: x.logcumsumexp(-1), "logcumsumexp"),
    row(lambda x: (x == 1).any(-1), "any"),
    row(lambda x: (x == x).all(-1), "all"),
    row(lambda x: F.normalize(x, dim=-1), "normalize", overflowing, ORDER),
    row(lambda x: F.layer_norm(x, (3,)), "layer_norm", overflowing, ORDER),
]
PLANES = [
    row(lambda x: F.max_pool2d(x, 3, 2, 1), "max_pool2d"),
    row(lambda x: F.max_pool2d(x, 2), "max_pool2d-2"),
    row(lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), 1, True), "max_pool2d-ceil"),
    row(lambda x: F.max_pool2d(x, 2, 1, 0, 2), "max_pool2d-dilation"),
    row(lambda x: F.max_pool2d(x, 9, 1, 4), "max_pool2d-large"),
    row(lambda x: F.max_pool2d(x, 2, return_indices=True)[1], "max_pool2d-indices"),
    row(lambda x: F.max_pool2d(F.relu(x), 3, 2, 1), "max_pool2d-relu"),
    row(lambda x: F.max_pool1d(x.flatten(2), 3, 2), "max_pool1d"),
    row(lambda x: F.max_pool3d(x[None], (2, 3, 2)), "max_pool3d"),
    row(lambda x: F.adaptive_max_pool2d(x, 1), "adaptive_max_pool2d-1"),
    row(lambda x: F.adaptive_max_pool2d(x, (2, 7)), "adaptive_max_pool2d-equal"),
    row(lambda x: F.adaptive_max_pool2d(x, (5, 3)), "adaptive_max_pool2d"),
    row(lambda x: F.adaptive_max_pool2d(x, (5, 3), True)[1], "adaptive_max_pool2d-indices"),
    row(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), "adaptive_avg_pool2d"),
    row(lambda x: F.avg_pool2d(x, 3, 2, 1), "avg_pool2d"),
    row(lambda x: F.relu6(x * 2 - 1), "relu6"),
    row(lambda x: F.hardtanh(x).sum(-1), "hardtanh-sum"),
    row(lambda x: F.hardsigmoid(x) * x, "hardsigmoid-gate"),
    row(lambda x: F.glu(x, -1), "glu"),
    row(lambda x: F.softmax(x, 1), "softmax"),
    row(lambda x: F.softmin(x, -1), "softmin"),
]
SIGNED = {
    "neg",
    "abs",
    "atan2",
    "copysign",
    "copysign-number",
    "floor",
    "ceil",
    "trunc",
    "round",
    "mul",
    "div",
    "reciprocal",
    *(f"fmod-{n}" for n in (1.3, -2.5, 1, INF)),
    "fmod",
}


def numbers(dtype, short=False):
    """The values of the table."""
    limits = torch.finfo(dtype)
    kinds = [NAN, INF, -INF, 0.0, -0.0, limits.smallest_normal / 2, limits.smallest_normal, -limits.max, limits.max]
    ordinary = [1.0, -1.3, 3.0, -6.5]
    if not short:
        ordinary += [-1.0, 0.5, -0.5, 1.3, 2.0, -3.0, -7.0, 300.0, -300.0]
    return torch.tensor(kinds + ordinary, dtype=torch.float64).to(dtype)


def inputs_one(dtype):
    return (numbers(dtype),)


def inputs_two(dtype):
    x = numbers(dtype, short=True)
    return x.repeat_interleave(len(x)), x.repeat(len(x))


def inputs_rows(dtype):
    x = torch.tensor([NAN, INF, -INF, 0.0, torch.finfo(dtype).max, 1.0, -1.5], dtype=torch.float64).to(dtype)
    return (torch.tensor(list(itertools.product(x.tolist(), repeat=3)), dtype=torch.float64).to(dtype),)


def inputs_planes(dtype):
    x = torch.randn(2, 3, 8, 14, generator=torch.Generator().manual_seed(1))
    places = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))
    for kind, value in enumerate((NAN, INF, -INF)):
        x.view(-1)[places[9 * kind : 9 * kind + 9]] = value
    return (x.to(dtype),)


SMOOTH = """
    softmax log_softmax logsumexp logaddexp logcumsumexp avg_pool2d adaptive_avg_pool2d lerp gelu gelu-tanh silu
    mish tanhshrink sin cos tan elu elu-0.5 celu-2 selu erfc logsigmoid softplus softplus-2.5 exp sigmoid
    hardswish hardsigmoid hardtanh-sum softmin hardsigmoid-gate layer_norm glu log1p expm1 logit log log2 log10
    acosh acos sinc
""".split()

TABLES = {
    "one": (ONE, inputs_one),
    "two": (TWO, inputs_two),
    "rows": (ROWS, inputs_rows),
    "planes": (PLANES, inputs_planes),
}


class Together(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, *inputs):
        return tuple(row.function(*inputs) for row in self.rows)


def difference(row, ours, theirs, inputs):
    """Where the two differ, in words, or nothing."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, row.name
    if not theirs.dtype.is_floating_point:
        wrong = ours != theirs
    else:
        rtol, _ = TOLERANCES[theirs.dtype]
        limits = torch.finfo(theirs.dtype)
        a, b = ours.double(), theirs.double()
        kind = lambda x: x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()  # noqa: E731
        atol = 4 * limits.eps if row.name in SMOOTH else 2 * limits.smallest_normal
        near = (a - b).abs() <= atol + rtol * b.abs()
        wrong = (kind(a) != kind(b)) | (b.isfinite() & ~near)
        if row.name in SIGNED:
            wrong |= (a == 0) & (b == 0) & (a.signbit() != b.signbit())
    if row.but is not None:
        skipped = row.but(*inputs)
        wrong &= ~(skipped.squeeze(-1) if skipped.dim() > wrong.dim() else skipped)
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    wrongs, total = int(wrong.sum()), wrong.numel()
    return f"{row.name}: {wrongs} of {total}, at {place} {ours[place].item()} for {theirs[place].item()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", TABLES)
def test_special_values(table, dtype, device):
    rows, make = TABLES[table]
    inputs = [x.to(device) for x in make(dtype)]
    model_trt = torch2rt(Together(rows), inputs, verify=False)
    results = (model_trt if device.type == "cuda" else model_trt.reference())(*inputs)
    found = [difference(r, y, r.function(*inputs), inputs) for r, y in zip(rows, results, strict=True)]
    assert not any(found), "\n".join(filter(None, found))


def test_nan_may_be_ignored(device):
    """One layer each, and the network evaluated as some kernels of TensorRT treat a NaN."""
    x = torch.tensor([[[[NAN, 1.0, 2.0, 7.0], [0.5, -1.0, 7.0, NAN]]]], device=device)
    for function, expected in (
        (F.relu6, [[0, 1, 2, 6], [0.5, 0, 6, 0]]),
        (lambda x: x.clamp_min(0.75), [[0.75, 1, 2, 7], [0.75, 0.75, 7, 0.75]]),
        (lambda x: F.max_pool2d(x, 2), [[1.0, 7.0]]),
        (lambda x: x.amax(2), [0.5, 1, 7, 7]),
    ):
        ignoring, keeping = (torch2rt(Call(function), [x], nan=nan, verify=False) for nan in ("ignore", "keep"))
        assert ignoring.network.num_layers < keeping.network.num_layers
        lost = ignoring.reference()(x)
        assert lost.reshape(-1).tolist() == torch.tensor(expected).reshape(-1).tolist()
        torch.testing.assert_close(keeping.reference()(x), function(x), equal_nan=True)
    with pytest.raises(InputError, match="nan='maybe' is not one of 'keep', 'ignore'"):
        torch2rt(Call(F.relu6), [x], nan="maybe")


def test_converters_leave_extremes_to_the_vocabulary():
    """No converter adds a layer by itself that may lose a NaN."""
    for path in Path(converters.__path__[0]).glob("*.py"):
        found = re.findall(r"add_(?:activation|elementwise|reduce|topk|pooling_nd)\(", path.read_text())
        allowed = {"sorting.py": ["add_topk("], "pooling.py": ["add_pooling_nd("]}
        assert found == allowed.get(path.name, []), path.name
