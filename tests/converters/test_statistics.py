import copy

import harness
import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, half, ints, parametrize
from torch.utils._pytree import tree_map_only

from torch2rt import TraceError, torch2rt

Tensor = torch.Tensor
Q = [0.1, 0.5, 0.77, 1.0]
INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")


class Holes(torch.nn.Module):
    """A function of an input whose elements below a bound are NaN."""

    def __init__(self, function, *args, bound=-0.5, **kwargs):
        super().__init__()
        self.function, self.args, self.bound, self.kwargs = function, args, bound, kwargs

    def forward(self, x):
        return self.function(torch.where(x < self.bound, torch.nan, x), *self.args, **self.kwargs)


def holes(function, *args, id=None, shape=(B, 3, S), **kwargs):
    name = id or f"holes-{function.__name__}{args}{kwargs}".replace(" ", "")
    return case(Holes(function, *args, **kwargs), [shape], id=name)


def chosen(function):
    """The values, and those at the places: which place a repeated value is found at is open."""

    def call(x, dim=-1, keepdim=False):
        values, places = function(x, dim, True)
        found = x.take_along_dim(places, dim) if x.dim() else x
        return function(x, dim, keepdim)[0], values, found

    call.__name__ = function.__name__
    return call


QUANTILES = [
    *[
        case(
            lambda x, q=Q, **kwargs: torch.quantile(x, x.new_tensor(q), -1, **kwargs),
            [(B, 3, S)],
            interpolation=i,
            id=f"quantile-{i}",
        )
        for i in INTERPOLATIONS
    ],
    case(torch.quantile, [(B, 3, S)], 0.3, 1),
    case(torch.quantile, [(B, 3, S)], 0.3, dim=0, keepdim=True),
    case(Tensor.quantile, [(B, S)], q=0.95),
    case(torch.quantile, [(B, 3, 2)], 0.3, None, True),
    case(lambda x: x.quantile(x.new_tensor(Q), keepdim=True), [(B, S)], id="quantile-all-keepdim"),
    case(lambda x: x.quantile(x.new_tensor(Q), 1, keepdim=True), [(B, 5, 2)], id="quantile-1-keepdim"),
    case(lambda x: x.quantile(x.new_tensor(Q), -2, keepdim=True), [(B, 5, 2)], id="quantile--2-keepdim"),
    case(lambda x: x.sum().quantile(0.3, 0, True), [(B, 3)], id="quantile-0d"),
    case(lambda x, q: torch.quantile(x, q.sigmoid(), 1), [(B, 9), (S,)], id="quantile-computed"),
    case(lambda x, q: torch.nanquantile(x, q.sum().sigmoid(), 1), [(B, 9), (S,)], id="nanquantile-computed"),
    *[holes(torch.nanquantile, 0.4, dim, keepdim) for dim in (1, -1, 0) for keepdim in (False, True)],
    *[holes(torch.nanquantile, 0.37, -1, interpolation=i) for i in INTERPOLATIONS],
    holes(Tensor.nanquantile, 0.7),
    holes(torch.nanquantile, 0.7, 1, bound=9, id="nanquantile-nothing"),
    case(lambda x: x.nanquantile(x.new_tensor(Q), 1, interpolation="higher"), [(B, 5, 2)], id="nanquantile-several"),
    *[holes(torch.quantile, 0.7, dim, shape=(B, 3, 2)) for dim in (1, None)],
]

MEDIANS = [
    case(torch.nanmedian, [(B, 3, S)], -1),
    case(torch.nanmedian, [(B, 3, S)], 1, True),
    case(torch.nanmedian, [(B, 3)]),
    case(Tensor.nanmedian, [(S, 3)], dim=0, keepdim=True),
    case(chosen(torch.nanmedian), [ints(B, 9)], -1),
    case(torch.nanmedian, [ints(B, 9)]),
    case(chosen(torch.nanmedian), [half(B, 9)]),
    case(lambda x: [*x.sum().nanmedian(0, True), x.sum().nanmedian()], [(B, 3)], id="nanmedian-0d"),
    *[holes(torch.nanmedian, dim, keepdim) for dim in (1, -1) for keepdim in (False, True)],
    holes(torch.nanmedian),
    *[holes(torch.median, dim, keepdim, shape=(B, 3, 2)) for dim in (1, -1) for keepdim in (False, True)],
    holes(torch.median),
    holes(torch.median, -1, bound=9, id="median-nothing"),
    holes(lambda x: torch.nanmedian(x, -1)[0], bound=9, id="nanmedian-nothing"),
    case(lambda x: torch.masked.median(x, 1, mask=x > -1), [(B, 9)], id="masked.median"),
    case(lambda x: torch.masked.median(x, -1, keepdim=True, mask=x < 9), [(B, S)], id="masked.median-all"),
]


MODES = [
    case(chosen(torch.mode), [ints(B, 9, low=0, high=4)]),
    case(chosen(torch.mode), [ints(B, 9, S, low=-2, high=2, dtype=torch.int32)], 1),
    case(chosen(torch.mode), [ints(B, 3, S, low=0, high=3)], -1, keepdim=True),
    case(chosen(torch.mode), [ints(B, 9, low=0, high=3, dtype=torch.uint8)]),
    case(chosen(torch.mode), [bools(B, 9)], 0),
    case(chosen(lambda x, *args: torch.mode(x.round(), *args)), [Data((B, S))], id="mode-float"),
    case(lambda x: [*x.sum().mode()], [(B, 3)], id="mode-0d"),
    case(lambda x: Tensor.mode(x, dim=0, keepdim=True).values, [ints(S, 3, low=0, high=3)], id="Tensor.mode"),
]


@parametrize(MODES)
def test_mode(row, mode, device, monkeypatch):
    """Of equally frequent elements the smallest one, as on the CPU; torch's CUDA kernel gives another."""

    def on_the_cpu(module, inputs):
        result = copy.deepcopy(module).cpu()(*(x.cpu() for x in inputs))
        return tree_map_only(torch.Tensor, lambda x: x.to(device), result)

    monkeypatch.setattr(harness, "eager", on_the_cpu)
    check_case(row, mode, device)


@parametrize([*QUANTILES, *MEDIANS])
def test_statistics(row, mode, device):
    check_case(row, mode, device)


def test_ranks_are_exact(device):
    """0.4 is a little more in float32, so its fifth is too, which float32 does not see and newer torch does."""
    for size, q, ways in ((6, 0.4, ("lower", "higher", "nearest", "linear")), (50_001, 1.0, ("higher",))):
        x = torch.arange(float(size), device=device)
        for interpolation in ways:
            call = Call(torch.quantile, (q,), {"interpolation": interpolation})
            model_trt = torch2rt(call, [x])
            compare((model_trt if device.type == "cuda" else model_trt.reference())(x), call(x), 1e-7, 0.0)


def test_infinities_are_values_like_others(device):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[nan, inf, inf], [nan, nan, -inf], [1.0, inf, nan], [nan, nan, nan]], device=device)
    for function in (lambda x: x.nanmedian(1)[0], lambda x: x.nanquantile(0.5, 1, interpolation="lower")):
        model_trt = torch2rt(Call(function), [x])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x))


ERRORS = [
    (lambda x: x.quantile(1.5), "the quantiles lie between 0 and 1"),
    (lambda x: x.nanquantile(x.new_tensor([0.5, -0.1])), "the quantiles lie between 0 and 1"),
    (lambda x: x.quantile(x.new_ones(2, 2)), "more than one dimension"),
    (lambda x: x.half().quantile(0.5), "takes float32"),
    (lambda x: x.quantile(0.5, interpolation="cubic"), "interpolation='cubic' is unknown"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_refused(function, message):
    with pytest.raises(TraceError, match=message):
        torch2rt(Call(function), [torch.randn(2, 9)])
