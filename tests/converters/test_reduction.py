import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, bools, case, check_case, compare, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

Tensor, linalg, aten = torch.Tensor, torch.linalg, torch.ops.aten
INT32, BYTE = torch.int32, torch.uint8
INF = float("inf")
few = ints(B, 3, S, low=-2, high=3)  # with many equal elements
byte = ints(B, 3, low=0, high=256, dtype=BYTE)

SUMS = [
    *[
        case(f, [(B, 3, S)])
        for f in (torch.sum, torch.mean, torch.prod, torch.nansum, torch.nanmean, torch.count_nonzero)
    ],
    *[case(f, [(B, 3, S)], -1) for f in (torch.sum, torch.mean, torch.prod, torch.nansum, torch.nanmean)],
    *[case(f, [(B, 3, S)], (0, -1), True) for f in (torch.sum, torch.mean, torch.nansum, torch.nanmean)],
    *[case(f, [half(B, 300)], 1) for f in (torch.sum, torch.mean, torch.nansum)],
    *[case(f, [few], 1) for f in (torch.sum, torch.prod, torch.nansum, torch.count_nonzero)],
    *[case(f, [bools(B, 3)]) for f in (torch.sum, torch.prod, torch.count_nonzero)],
    *[case(f, [byte]) for f in (torch.sum, torch.prod)],
    case(torch.sum, [(B, 3, S)], []),
    case(torch.mean, [(B, 3, S)], (), True),
    case(torch.sum, [(B, 3, S)], dim=[1], keepdim=True),
    case(Tensor.sum, [(B, 3, S)], axis=1, keepdims=True),
    case(Tensor.mean, [few], dim=0, dtype=torch.float32),
    case(torch.sum, [few], dtype=torch.float16),
    case(torch.sum, [ints(B, 3, dtype=INT32)], 1, dtype=INT32),
    case(torch.sum, [bools(B, 3)], dtype=torch.float32),
    case(torch.sum, [(B, 3)], dtype=torch.int64),
    case(torch.prod, [(B, 3, S)], 1, True, dtype=torch.float32),
    case(torch.sum, [Data((B, 300), torch.bfloat16)], 1),
    case(lambda x: x.sum().sum(0) + x.mean().mean(-1, keepdim=True), [(B, 3)], id="0d"),
    case(lambda x: torch.sum(x, 0, out=x.new_empty(3)), [(2, 3)], id="out"),
    case(aten.sum.dim_IntList, [(B, 3)], [1], True, id="aten.sum"),
    case(aten.mean.dim, [(B, 3)], [-1], id="aten.mean"),
    case(lambda x: torch.nansum(torch.where(x > 0, x, float("nan")), 1), [(B, 9)], id="nansum-nan"),
    case(lambda x: torch.nanmean(torch.where(x > 0, x, float("nan")), 1), [(B, 9)], id="nanmean-nan"),
]

TRUTH = [
    case(torch.any, [bools(B, 0)], 1),
    case(torch.all, [bools(B, 0)], 1),
    *[case(f, [bools(B, 3, S)]) for f in (torch.any, torch.all)],
    *[case(f, [bools(B, 3, S)], -1) for f in (torch.any, torch.all)],
    *[case(f, [few], 1, True) for f in (torch.any, torch.all)],
    *[case(f, [few], (0, 2)) for f in (torch.any, torch.all)],
    *[case(f, [(B, 3)], dim=()) for f in (torch.any, torch.all)],
    *[case(f, [ints(B, 3, low=0, high=2, dtype=BYTE)], dim=1) for f in (torch.any, torch.all)],
    case(lambda x: (x > 0.5).all() | (x < -1).any(), [(B, 3)], id="0d"),
    case(aten.any.dim, [bools(B, 3)], 1, True, id="aten.any"),
]

BOTH = [torch.max, torch.min]
EXTREMES = [
    *[case(f, [(B, 3, S)]) for f in (*BOTH, torch.amax, torch.amin, torch.aminmax, torch.argmax, torch.argmin)],
    *[case(f, [(B, 3, S)], 1) for f in (*BOTH, torch.amax, torch.amin, torch.argmax, torch.argmin)],
    *[case(f, [(B, 3, S)], -1, True) for f in (*BOTH, torch.amax, torch.amin, torch.argmax, torch.argmin)],
    *[case(f, [few], 2) for f in (*BOTH, torch.argmax, torch.argmin)],
    *[case(f, [few], 0, keepdim=True) for f in (*BOTH, torch.argmax, torch.argmin)],
    *[case(f, [few]) for f in (*BOTH, torch.amax, torch.argmax, torch.argmin, torch.aminmax)],
    *[case(f, [bools(B, 3, S)], -1) for f in (*BOTH, torch.amax, torch.amin)],
    *[case(f, [half(B, 9)], 1) for f in (*BOTH, torch.amax, torch.argmin)],
    *[case(f, [byte], 1) for f in (torch.amax, torch.argmax)],
    *[case(f, [byte]) for f in BOTH],
    *[case(f, [(B, 3), (3,)]) for f in BOTH],
    *[case(f, [ints(B, 3), (3,)]) for f in BOTH],
    case(torch.max, [bools(B, 3), bools(3)]),
    case(torch.max, [byte, ints(3, low=0, high=256, dtype=BYTE)]),
    case(lambda x, y: torch.min(x, other=y), [(B, 3), (B, 3)], id="min-other"),
    case(torch.amax, [(B, 3, S)], (0, -1)),
    case(torch.amin, [(B, 3, S)], dim=()),
    case(torch.aminmax, [(B, 3, S)], dim=1, keepdim=True),
    case(torch.argmax, [(B, 3)], keepdim=True),
    case(torch.argmax, [few], None, True),
    case(lambda x: (x == 2).int().argmax(-1), [few], id="first-match"),
    case(lambda x: x.max(dim=1)[1] * 2 + x.min(1).indices, [(B, 3)], id="named"),
    case(
        lambda x: [x.sum().max(0), x.sum().argmin(), x.sum().amax(-1), x.sum().argmax(0, keepdim=True)],
        [(B, 3)],
        id="0d",
    ),
    case(torch.argmax, [(4096,)]),
    case(aten.max.dim, [(B, 3)], 1, id="aten.max.dim"),
    case(aten.amax.default, [(B, 3)], [1], True, id="aten.amax"),
    case(aten.argmax.default, [(B, 3)], -1, id="aten.argmax"),
]

SPREAD = [
    *[case(f, [(B, 3, S)]) for f in (torch.var, torch.std)],
    *[case(f, [(B, 3, S)], -1) for f in (torch.var, torch.std, torch.var_mean, torch.std_mean)],
    *[case(f, [(B, 3, S)], (1, 2), False, True) for f in (torch.var, torch.std, torch.var_mean, torch.std_mean)],
    *[case(f, [(B, 3, S)], False) for f in (torch.var, torch.std, torch.std_mean)],
    *[case(f, [(B, 3, S)], 1, unbiased=False) for f in (torch.var, torch.std)],
    *[case(f, [(B, 3, S)], correction=0, dim=(0, 1)) for f in (torch.var, torch.std_mean)],
    *[case(f, [(B, 3, S)], dim=-1, correction=2, keepdim=True) for f in (torch.var, torch.std)],
    *[case(f, [half(B, 300)], 1) for f in (torch.var, torch.std, torch.var_mean)],
    case(torch.var, [(B, 2)], dim=1, correction=3),
    case(torch.var, [(3, 1)], dim=1),
    case(Tensor.std, [(B, 3, S)], [], True),
    case(lambda x: x.var(unbiased=True) + x.sum().std(correction=0), [(B, 3)], id="0d"),
    case(lambda x: x.half().mul(100).std(-1), [(B, 64)], id="half-large"),
    case(aten.var.correction, [(B, 3)], [1], correction=0, keepdim=True, id="aten.var"),
    case(aten.var_mean.correction, [(B, 3)], [1], correction=1, id="aten.var_mean"),
    *[case(f, [(0, 3)], 0) for f in (torch.var, torch.std, torch.var_mean, torch.std_mean)],
    case(torch.var, [(0,)]),
    case(torch.var, [(B, 0)], 1, correction=0),
    case(torch.std_mean, [(B, 2)], 1, correction=2),
    case(torch.var, [(B, 2)], 1, correction=2.5),
    case(torch.var_mean, [half(B, 1)], 1),
]

NORMS = [
    *[case(linalg.vector_norm, [(B, 3, S)], o, -1) for o in (0, 1, 2, 3, 3.5, -1, -2.5, INF, -INF, 0.5)],
    case(linalg.vector_norm, [(B, 3, S)]),
    case(linalg.vector_norm, [(B, 3, S)], 1, (0, 2), True),
    case(linalg.vector_norm, [(B, 3, S)], keepdim=True),
    case(linalg.vector_norm, [half(B, 300)], dim=1),
    case(linalg.vector_norm, [half(B, 300)], dim=1, dtype=torch.float32),
    case(linalg.norm, [(B, 3, S)]),
    case(linalg.norm, [(S,)], 1),
    case(linalg.norm, [(B, 3, S)], dim=1),
    *[case(linalg.norm, [(B, 3, S)], o, (1, 2)) for o in ("fro", 1, -1, INF, -INF)],
    case(linalg.norm, [(3, S)], 1),
    case(linalg.norm, [(B, 3, S)], ord=INF, dim=(0, -1), keepdim=True),
    case(linalg.matrix_norm, [(B, 3, S)]),
    case(linalg.matrix_norm, [half(B, 3, S)], -1, (2, 0)),
    case(torch.norm, [(B, 3, S)]),
    *[case(torch.norm, [(B, 3, S)], p, 1) for p in (2, 1, "fro", INF, 3)],
    case(torch.norm, [(B, 3, S)], dim=(1, 2), keepdim=True),
    case(Tensor.norm, [(B, 3, S)], 2, -1, True),
    case(Tensor.norm, [half(B, 9)], dtype=torch.float32),
    case(F.normalize, [(B, 3, S)]),
    case(F.normalize, [half(B, 300)], 1.0, -1),
    case(F.cosine_similarity, [(B, 3, S), (B, 3, S)], dim=-1),
    case(F.pairwise_distance, [(B, S), (B, S)], 3.0, keepdim=True),
    case(torch.dist, [(B, 3), (B, 3)]),
]


@parametrize(SUMS + TRUTH + EXTREMES + SPREAD + NORMS)
def test_reduction(row, mode, device):
    check_case(row, mode, device)


def test_half_precision_accumulates_in_float32(device):
    x = torch.full((2, 70000), 1.5, dtype=torch.float16, device=device)
    for function, args in ((torch.mean, (1,)), (torch.std, (1,)), (linalg.vector_norm, (2, 1)), (torch.sum, (0,))):
        model_trt = torch2rt(Call(function, args), [x])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x, *args))


def test_first_of_equal_elements(device):
    x = torch.tensor([[1, 3, 3, 0, 0], [0, 0, 0, 0, 0]], device=device)
    for function in (torch.max, torch.min, torch.argmax, torch.argmin):
        model_trt = torch2rt(Call(function, (1,)), [x])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_nan_comes_first(dtype, device):
    nan = float("nan")
    x = torch.tensor([[1, INF, nan, 3, nan], [nan] * 5, [0, -INF, 2, 2, nan], [4, 1, 4, 1, 0]], device=device).to(dtype)
    calls = [(f, (1,)) for f in (torch.max, torch.min, torch.argmax, torch.argmin)]
    for function, args in [*calls, (torch.argmax, ()), (torch.argmin, (0,)), (torch.max, (0, True))]:
        model_trt = torch2rt(Call(function, args), [x])
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x, *args))


def test_where_all_is_masked(device):
    x, mask = torch.randn(3, 5, device=device), torch.zeros(3, 5, dtype=torch.bool, device=device)
    for function in (torch.masked.argmax, torch.masked.argmin):
        model_trt = torch2rt(Call(lambda x, m, f=function: f(x, mask=m)), [x, mask])
        run = model_trt if device.type == "cuda" else model_trt.reference()
        compare(run(x, mask), function(x, mask=mask))


ERRORS = [
    (lambda x: x.sum(dtype=torch.uint8), "no arithmetic on torch.uint8"),
    (lambda x: linalg.matrix_norm(x, 2), "ord=2 needs singular values"),
    (lambda x: linalg.norm(x, "nuc"), "ord='nuc' needs singular values"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(2, 3)])
