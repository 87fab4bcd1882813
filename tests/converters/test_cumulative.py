import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import UnsupportedError, torch2rt

Tensor, aten = torch.Tensor, torch.ops.aten
INF = float("inf")
few = ints(B, 3, S, low=-2, high=3)
near_one = floats(B, 3, S, low=-1.5, high=1.5)

SUMS = [
    *[case(torch.cumsum, [(B, 3, S)], dim) for dim in (0, 1, -1)],
    *[case(torch.cumsum, [few], dim) for dim in (1, -1)],
    case(torch.cumsum, [half(B, 300)], 1, atol=2e-2),
    case(torch.cumsum, [Data((B, 300), torch.bfloat16)], 1, atol=0.2),
    case(torch.cumsum, [bools(B, 9)], 1),
    case(torch.cumsum, [ints(B, 9, low=0, high=200, dtype=torch.uint8)], 1),
    case(torch.cumsum, [ints(B, 9)], dim=1, dtype=torch.float32),
    case(Tensor.cumsum, [ints(B, 9, dtype=torch.int32)], 1, dtype=torch.int32),
    case(torch.cumsum, [(S,)], 0),
    case(lambda x: (x * 1).cumsum_(1), [(B, 3)], id="cumsum_"),
    case(lambda m: m.cumsum(-1) - 1, [bools(B, S)], id="positions"),
    case(aten.cumsum.default, [(B, 3)], 1, id="aten.cumsum"),
]
SCANS = [
    *[case(torch.cumprod, [near_one], dim) for dim in (0, 1, -1)],
    case(torch.cumprod, [few], -1),
    case(torch.cumprod, [bools(B, 9)], 1),
    case(torch.cumprod, [half(B, 9)], dim=1, dtype=torch.float32),
    case(Tensor.cumprod, [half(B, 9)], 1),
    *[case(f, [x], dim) for f in (torch.cummax, torch.cummin) for x in (near_one, few) for dim in (0, 1, -1)],
    *[case(f, [bools(B, 9)], 1) for f in (torch.cummax, torch.cummin)],
    *[case(f, [half(B, 9)], 1) for f in (torch.cummax, torch.cummin)],
    *[case(f, [ints(B, 9, low=0, high=256, dtype=torch.uint8)], 1) for f in (torch.cummax, torch.cummin)],
    case(torch.cummax, [(S,)], 0),
    *[case(torch.logcumsumexp, [(B, 3, S)], dim) for dim in (0, -1)],
    case(torch.logcumsumexp, [floats(B, 33, low=-300, high=300)], 1),
    case(torch.logcumsumexp, [half(B, 33)], 1),
    case(torch.logaddexp, [(B, 3, S), (S,)]),
    case(torch.logaddexp, [floats(B, 9, low=-300, high=300), floats(9, low=-300, high=300)]),
    case(Tensor.logaddexp, [half(B, 9), half(B, 9)]),
    case(torch.logaddexp2, [(B, 9), (9,)]),
    case(
        lambda x: [x.sum().cumsum(0), x.sum().cumprod(-1), *x.sum().cummax(0), x.sum().logcumsumexp(0)],
        [(B, 3)],
        id="0d",
    ),
]
DIFFERENCES = [
    case(torch.diff, [(B, 3, S)]),
    case(torch.diff, [(B, 3, S)], 2, 1),
    case(torch.diff, [ints(B, 9)], dim=-1),
    case(torch.diff, [bools(B, 9)]),
    case(lambda x, y: torch.diff(x, prepend=y, append=y * 2), [(B, 9), (B, 2)], id="diff-prepend"),
]


@parametrize(SUMS + SCANS + DIFFERENCES)
def test_cumulative(row, mode, device):
    check_case(row, mode, device)


@parametrize(SUMS)
def test_cumsum_where_there_is_no_such_layer(row, mode, device, monkeypatch):
    import torch2rt.converters.cumulative as module

    monkeypatch.setattr(module, "has_cumulative", lambda: False)
    check_case(row, mode, device)


@pytest.mark.parametrize("function", [torch.logaddexp, lambda a, b: a.logcumsumexp(0), lambda a, b: a.cummax(0)])
def test_infinities(function, device):
    a = torch.tensor([-INF, -INF, 1.0, -INF, INF, INF, 0.0], device=device)
    b = torch.tensor([-INF, 2.0, -INF, INF, INF, -INF, INF], device=device)
    model_trt = torch2rt(Call(function), [a, b])
    compare(tuple((model_trt if device.type == "cuda" else model_trt.reference())(a, b)), tuple(function(a, b)))


def test_refused():
    with pytest.raises(UnsupportedError, match=r"no arithmetic on torch\.uint8"):
        torch2rt(Call(torch.cumsum, (1,), {"dtype": torch.uint8}), [torch.ones(2, 3, dtype=torch.uint8)])
