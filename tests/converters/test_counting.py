import pytest
import torch
from harness import B, Call, S, bools, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

few = ints(B, S, low=0, high=6)


def ordered(function):
    """A function of edges in order, and of what else it takes."""
    return lambda edges, *rest: function(edges.sort(-1)[0], *rest)


SEARCHED = [
    case(ordered(torch.searchsorted), [(9,), (B, S)], id="searchsorted"),
    case(ordered(torch.searchsorted), [(B, 3, 9), (B, 3, S)], id="searchsorted-rows"),
    case(ordered(torch.searchsorted), [ints(S), ints(B, 4)], id="searchsorted-dynamic-int64"),
    *[
        case(ordered(lambda e, v, k=k: torch.searchsorted(e, v, **k)), [ints(9), ints(B, S)], id=f"searchsorted-{k}")
        for k in ({"right": True}, {"side": "left"}, {"side": "right", "right": True}, {"out_int32": True})
    ],
    case(ordered(lambda e: torch.searchsorted(e, 0.25)), [(S,)], id="searchsorted-number"),
    case(lambda e, v: torch.searchsorted(e, v, sorter=e.argsort()), [(9,), (B, S)], id="searchsorted-sorter"),
    case(lambda e, v: torch.searchsorted(e, v, right=True, sorter=e.argsort(-1)), [(B, 9), (B, S)], id="sorter-rows"),
    case(lambda v: torch.searchsorted(v.new_tensor([-1.0, 0.0, 0.5]), v), [half(B, S)], id="searchsorted-constant"),
    case(ordered(lambda e, v: torch.bucketize(v, e, right=True)), [ints(9), ints(B, S)], id="bucketize"),
    case(lambda v: torch.bucketize(v, torch.tensor([1, 4], device=v.device), out_int32=True), [few], id="bucketize-32"),
    case(ordered(lambda e: torch.bucketize(3, e)), [ints(S)], id="bucketize-number"),
    case(ordered(torch.searchsorted), [(0,), (B, 3)], id="searchsorted-in-nothing"),
]
AMONG = [
    case(torch.isin, [few, ints(4, low=0, high=6)]),
    case(torch.isin, [few, ints(2, S, low=0, high=6)], invert=True),
    case(
        lambda x: torch.isin(x.argsort(-1)[0], torch.tensor([3, 0], device=x.device), assume_unique=True),
        [(B, S)],
        id="isin-unique",
    ),
    case(torch.isin, [few, ints(3, low=0, high=6, dtype=torch.int32)]),
    case(torch.isin, [few], 3),
    case(lambda x: torch.isin(3, x, invert=True), [few], id="isin-number"),
    case(lambda x: torch.isin(x, torch.tensor([1.0, 2.5, 4.0], device=x.device)), [few], id="isin-constant"),
    case(lambda x: torch.isin(elements=x.sum(), test_elements=x), [few], id="isin-0d"),
    case(torch.isin, [floats(B, 3), (0,)]),
]
BINNED = [
    case(torch.histc, [(B, S)], 7, -1.0, 2.0),
    case(torch.Tensor.histc, [(B, S)], bins=1, min=-0.5, max=0.5),
    case(torch.histc, [(B, S)], 5),
    case(lambda x: torch.histc(x * 0 + 3, 4), [(B, 3)], id="histc-of-one-value"),
    case(lambda x: torch.histc(x.round(), 4, -2, 2), [(B, S)], id="histc-edges"),
    case(lambda x: torch.histc(x.where(x < 1, float("nan")), 4, -2, 2), [(B, S)], id="histc-nan"),
]
REPEATED = [
    case(lambda x: x.repeat_interleave(repeats(x, 2, 0, 4), 1, output_size=6), [(B, 3, S)], id="repeats"),
    case(lambda x: torch.repeat_interleave(x, repeats(x, 3), output_size=18), [half(2, 3)], id="repeats-flat"),
    case(lambda x: torch.repeat_interleave(repeats(x, 2, 0, 4), output_size=6), [(3,)], id="repeats-alone"),
    case(lambda x: x.repeat_interleave(repeats(x, 2), -1, output_size=x.shape[1] * 2), [(B, S)], id="repeats-dynamic"),
    case(lambda x: x.repeat_interleave(torch.tensor([2, 0, 4], device=x.device), 1), [(B, 3)], id="repeats-constant"),
]


def repeats(x, *counts):
    """These numbers, computed from a tensor."""
    return torch.tensor(counts, device=x.device) + x.isnan().sum()


@parametrize(SEARCHED + AMONG + BINNED + REPEATED)
def test_counting(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("right", [False, True])
def test_a_nan_belongs_at_the_end(right, device):
    edges = torch.tensor([-1.0, 0.0, 2.0], device=device)
    x = torch.tensor([float("nan"), 0.0, float("inf")], device=device)
    model_trt = torch2rt(Call(torch.searchsorted, kwargs={"right": right}), [edges, x])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    compare(run(edges, x), torch.searchsorted(edges, x, right=right))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.searchsorted(x, x, side="left", right=True), "opposite things"),
        (lambda x: torch.isin(x, torch.arange(2**27)), "comparing all with all"),
        (lambda x: torch.repeat_interleave(x, x.long()), "depends on"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.ones(5)])


FOUND = [
    case(torch.nonzero_static, [ints(B, S, low=0, high=2)], size=6),
    case(torch.nonzero_static, [bools(2, B, S)], size=40, fill_value=7),
    case(torch.Tensor.nonzero_static, [ints(S, low=0, high=3)], size=1),
    case(lambda x: (x.relu() * 1.0).nonzero_static(size=5), [(2, 3, 2)], id="nonzero_static-floats"),
]


@parametrize(FOUND)
def test_nonzero_static(row, mode, device):
    check_case(row, mode, device)
