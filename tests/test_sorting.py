import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, half, ints, parametrize

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
        [(B, 3)], id="0d",
    ),
    case(lambda x: x.sort(1).values + x.sort(1)[1], [(B, 3)], id="named"),
    case(aten.topk.default, [(B, 9)], 2, id="aten.topk"),
    case(aten.sort.default, [(B, 9)], -1, True, id="aten.sort"),
    case(aten.sort.stable, [(B, 9)], stable=False, dim=1, id="aten.sort.stable"),
    # equal elements in order
    *[case(torch.sort, [ints(B, 9, S, low=0, high=4)], dim=d, descending=down, stable=True)
      for d in (1, -1) for down in (False, True)],
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
]  # fmt: skip


@parametrize(CASES)
def test_sorting(row, mode, device):
    check_case(row, mode, device)


ERRORS = [
    (lambda x: x.sort(stable=True), "stable=True: TensorRT leaves the order of equal elements open"),
    (lambda x: x.topk(3841), "orders 3840 elements at most, here up to 3841"),
    (lambda x: x.sort(), "orders 3840 elements at most, here up to 17000"),
    (lambda x: x.argsort(), "orders 3840 elements at most, here up to 17000"),
    (lambda x: x.median(), "orders 3840 elements at most, here up to 17000"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_refused(function, message):
    with pytest.raises(UnsupportedError, match=message):
        torch2rt(Call(function), [torch.randn(2, 17000)])


def test_a_dynamic_size_beyond_the_limit_is_refused():
    with pytest.raises(UnsupportedError, match="orders 3840 elements at most"):
        torch2rt(Call(torch.sort), [torch.randn(2, 9)], min_shapes=[(2, 4)], max_shapes=[(2, 4000)])


def test_the_largest_of_many(device):
    x = torch.randperm(9000).float().reshape(2, 4500).to(device)
    for function, args in ((torch.kthvalue, (4400,)), (torch.topk, (5,)), (torch.median, (1,))):
        model_trt = torch2rt(Call(function, args), [x])
        actual = (model_trt if device.type == "cuda" else model_trt.reference())(x)
        for ours, theirs in zip(actual, function(x, *args), strict=True):
            torch.testing.assert_close(ours, theirs)
