import itertools
import math
from functools import partial

import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, half, ints, parametrize
from torch2rt.converters.sorting import LIMIT, rounds

from torch2rt import UnsupportedError, torch2rt

Tensor, aten = torch.Tensor, torch.ops.aten


def distinct(*shape):
    """float32, in which equal elements, whose order is open, do not happen."""
    return Data(shape)


def values(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs)[0]

    call.__name__ = f"{function.__name__}.values"
    return call


CASES = [
    *[case(torch.topk, [(B, 3, S)], k) for k in (1, 3)],
    case(torch.topk, [(B, 5, S)], 2, 1, False),
    case(torch.topk, [(B, 3, S)], k=2, dim=-1, largest=False, sorted=True),
    case(torch.topk, [(S,)], 3),
    case(Tensor.topk, [(B, 2, 2, 2, S)], 2, -1),
    case(torch.topk, [(3, 5)], 0),
    case(values(torch.topk), [half(B, 9)], 4),
    *[case(values(torch.topk), [ints(B, 9, low=0, dtype=d)], 4) for d in (torch.int64, torch.int32, torch.uint8)],
    case(lambda x: x.topk(x.shape[1] - 1, 1), [(B, S)], id="topk-size"),
    case(torch.sort, [(B, 3, S)]),
    case(torch.sort, [(B, 5, S)], 1, True),
    case(Tensor.sort, [(S,)], descending=True),
    case(Tensor.sort, [(S, 3)], dim=0),
    case(values(torch.sort), [ints(B, 9)], -1),
    case(values(torch.sort), [bools(B, 9)], -1, True),
    case(values(torch.sort), [half(B, 9)], -1),
    case(torch.argsort, [(B, 3, S)]),
    case(torch.argsort, [(B, 3, S)], 1, descending=True),
    case(Tensor.argsort, [(B, S)], -1, True),
    case(torch.msort, [(S, 3)]),
    case(torch.msort, [ints(S, 3)]),
    case(torch.kthvalue, [(B, 9)], 2),
    case(torch.kthvalue, [(B, 9)], 8),
    case(torch.kthvalue, [(B, 5, S)], 4, 1, True),
    case(torch.kthvalue, [(B, S)], k=3, dim=-1),
    case(values(torch.kthvalue), [ints(B, 9)], 4),
    case(torch.median, [(B, 9)]),
    case(torch.median, [(B, 8)], 1),
    case(torch.median, [(B, 3, S)], -1, True),
    case(torch.median, [(S,)], dim=0),
    case(Tensor.median, [(3, 5)]),
    case(values(torch.median), [ints(B, 9)], 1),
    case(
        lambda x: [*x.sum().sort(), *x.sum().topk(1), *x.sum().kthvalue(1), x.sum().median(), x.sum().argsort(0)],
        [(B, 3)],
        id="0d",
    ),
    case(lambda x: x.sort(1).values + x.sort(1)[1], [(B, 3)], id="named"),
    case(aten.topk.default, [(B, 9)], 2, id="aten.topk"),
    case(aten.sort.default, [(B, 9)], -1, True, id="aten.sort"),
    case(aten.sort.stable, [(B, 9)], stable=False, dim=1, id="aten.sort.stable"),
    # equal elements in order
    *[
        case(torch.sort, [ints(B, 9, S, low=0, high=4)], dim=d, descending=down, stable=True)
        for d in (1, -1)
        for down in (False, True)
    ],
    *[case(Tensor.sort, [ints(B, 9, low=0, high=4, dtype=d)], stable=True) for d in (torch.int32, torch.uint8)],
    case(torch.sort, [bools(B, 9)], stable=True, descending=True),
    case(lambda x: x.round().sort(stable=True), [(B, S)], id="sort-stable-float"),
    case(lambda x: x.round().sort(dim=0, stable=True), [half(S, 3)], id="sort-stable-half"),
    case(torch.argsort, [ints(B, 9, low=0, high=4)], stable=True, dim=1, descending=True),
    case(Tensor.argsort, [ints(S, 3, low=0, high=3)], dim=0, stable=True),
    case(aten.sort.stable, [ints(B, 9, low=0, high=4)], stable=True, dim=1, id="aten.sort.stable-True"),
    case(aten.argsort.stable, [ints(B, 9, low=0, high=4)], stable=True, dim=1, id="aten.argsort.stable"),
    case(torch.msort, [(39, B)]),
    case(lambda x: [*x.sum().sort(stable=True), *x[:1].sort(dim=0, stable=True)], [(B, 3)], id="stable-of-one"),
]


@parametrize(CASES)
def test_sorting(row, mode, device):
    check_case(row, mode, device)


def special(*shape, dtype=torch.float32):
    """NaNs, infinities, the largest numbers there are, and few others, so that all have equals."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -2.0, 0.5], dtype=dtype)
    values = torch.cat([values, values.new_tensor([torch.finfo(dtype).max, torch.finfo(dtype).min])])
    return values[torch.randint(len(values), shape)]


def run(function, x, device, **shapes):
    model_trt = torch2rt(Call(function), [x.to(device)], **shapes)
    return model_trt if device.type == "cuda" else model_trt.reference()


def places_too(function):
    """Where the order of equals is open: the values, and those at the places."""

    def call(x):
        value, place = function(x)
        return value, x.gather(-1, place)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("descending", [False, True])
def test_special_values(dtype, descending, device):
    """A NaN is above everything, and above the infinity that it might be taken for."""
    for function in (
        lambda x: x.sort(-1, descending),
        lambda x: x.topk(7, -1, descending),
        lambda x: x.kthvalue(21 if descending else 11, keepdim=True),
        lambda x: x.median(-1, True),
    ):
        x = special(3, 24, dtype=dtype)
        compare(run(places_too(function), x, device)(x.to(device)), places_too(function)(x.to(device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("descending", [False, True])
def test_more_than_one_layer_orders(dtype, descending, device):
    """In blocks, of which the last is not full; equal elements, such as these with the filling, in their order."""
    if dtype.is_floating_point:
        x = special(2, 2 * LIMIT + 99, dtype=dtype)
    else:
        low, high = (0, 2) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        x = torch.tensor([low, high, 1], dtype=dtype)[torch.randint(3, (2, 2 * LIMIT + 99))]
    stable = partial(torch.sort, dim=-1, descending=descending, stable=True)
    compare(run(stable, x, device)(x.to(device)), tuple(stable(x.to(device))))


def test_a_dynamic_number_beyond_one_layer(device):
    shapes = dict(min_shapes=[(2, 1, 1)], opt_shapes=[(2, 5000, 2)], max_shapes=[(2, 3 * LIMIT + 1, 2)])
    function = partial(torch.argsort, dim=1, descending=True, stable=True)
    engine = run(function, special(2, 5000, 2), device, **shapes)
    for size in (1, 2, 300, LIMIT, 3 * LIMIT + 1):
        x = special(2, size, 2).to(device)
        compare(engine(x), function(x))


MANY = {
    "sort": lambda x: x.sort(),
    "argsort": lambda x: x.argsort(0, True),
    "msort": lambda x: x.msort(),
    "topk": lambda x: x.topk(4000, 0, False),
    "kthvalue": lambda x: x.kthvalue(4444, 0),
    "median": lambda x: x.median(),
    "median-dim": lambda x: x.median(0),
    "quantile": lambda x: x.quantile(torch.tensor([0.2, 0.7], device=x.device)),
    "aten.sort.stable": lambda x: aten.sort.stable(x, stable=False, dim=0, descending=True),
}


@pytest.mark.parametrize("function", MANY.values(), ids=MANY)
def test_everything_that_orders_orders_many(function, device):
    x = torch.randperm(9000).float()
    expected = function(x.to(device))
    compare(run(function, x, device)(x.to(device)), tuple(expected) if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("count", range(1, 20))
def test_the_network_of_blocks(count):
    """Sequences of zeros and ones suffice: a network that orders all of them orders everything."""
    rows = torch.tensor(list(itertools.product((0, 1), repeat=count))) if count < 12 else torch.rand(500, count)
    for pairs in rounds(count):
        assert len({*itertools.chain(*pairs)}) == 2 * len(pairs)
        low, high = torch.tensor(pairs).T
        a, b = rows[:, low], rows[:, high]
        rows[:, low], rows[:, high] = torch.minimum(a, b), torch.maximum(a, b)
    assert (rows.diff(dim=1) >= 0).all()


ERRORS = [
    lambda x: x.sort(stable=True),
    lambda x: x.topk(3841),
    lambda x: x.sort(),
    lambda x: x.argsort(),
    lambda x: x.median(),
]


@pytest.mark.parametrize("function", ERRORS)
def test_refused(function):
    with pytest.raises(UnsupportedError, match="983040 elements at most are put in order, here up to 1000000"):
        torch2rt(Call(function), [torch.empty(1, 1000000)])


def test_the_largest_of_many(device):
    x = torch.randperm(9000).float().reshape(2, 4500).to(device)
    for function, args in ((torch.kthvalue, (4400,)), (torch.topk, (5,)), (torch.median, (1,))):
        model_trt = torch2rt(Call(function, args), [x])
        actual = (model_trt if device.type == "cuda" else model_trt.reference())(x)
        for ours, theirs in zip(actual, function(x, *args), strict=True):
            torch.testing.assert_close(ours, theirs)
