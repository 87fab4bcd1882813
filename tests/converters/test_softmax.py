import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import torch2rt

Tensor, special, aten = torch.Tensor, torch.special, torch.ops.aten
INF = float("inf")
FUNCTIONS = [torch.softmax, torch.log_softmax]

CASES = [
    *[case(f, [(B, 3, S)], dim) for f in (*FUNCTIONS, F.softmin) for dim in (0, 1, -1)],
    *[case(f, [(S,)], 0) for f in (*FUNCTIONS, F.softmin, torch.logsumexp)],
    *[case(f, [(B, 3, S, 2, 2)], -4) for f in FUNCTIONS],
    *[case(f, [half(B, 3, S)], dim=-1) for f in FUNCTIONS],
    *[case(f, [Data((B, 3, S), torch.bfloat16)], dim=1) for f in FUNCTIONS],
    *[case(f, [ints(B, 3)], 1, dtype=torch.float32) for f in FUNCTIONS],
    *[case(f, [half(B, 3)], 1, dtype=torch.float32) for f in FUNCTIONS],
    *[case(f, [floats(B, 9, low=-300, high=300)], 1) for f in (*FUNCTIONS, torch.logsumexp)],
    *[case(f, [half(B, 9)], -1) for f in (F.softmax, F.log_softmax, F.softmin, torch.logsumexp)],
    *[case(f, [(B, 3, S)], None) for f in (F.softmax, F.log_softmax, F.softmin)],
    *[case(f, [(B, 3)], dim=1, dtype=torch.float32) for f in (F.softmax, F.log_softmax)],
    *[
        case(f, [(B, 3)], 1, modes=("static",))
        for f in (special.softmax, special.log_softmax, Tensor.softmax, Tensor.log_softmax)
    ],
    case(special.softmax, [ints(B, 3)], 1, dtype=torch.float32),
    case(lambda x: [x.sum().softmax(0), x.sum().log_softmax(-1), x.sum().logsumexp(0)], [(B, 3)], id="0d"),
    case(torch.nn.Softmax(-1), [(B, 3)], id="Softmax"),
    case(torch.nn.Softmax2d(), [(B, 3, S, 2)], id="Softmax2d"),
    case(torch.nn.LogSoftmax(1), [(B, 3, S)], id="LogSoftmax"),
    case(aten._softmax.default, [(B, 3)], 1, False, id="aten._softmax"),
    case(aten._log_softmax.default, [(B, 3)], 1, False, id="aten._log_softmax"),
    case(aten._safe_softmax.default, [(B, 3)], 1, id="aten._safe_softmax"),
    case(torch.logsumexp, [(B, 3, S)], 1, True),
    case(torch.logsumexp, [(B, 3, S)], (0, -1)),
    case(Tensor.logsumexp, [ints(B, 3)], dim=1),
    case(special.logsumexp, [(B, 3, S)], dim=[1, 2], keepdim=True),
    case(F.cross_entropy, [(B, 5), floats(B, 5)], modes=("static",)),
]


@parametrize(CASES)
def test_softmax(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("function", [torch.log_softmax, torch.logsumexp, torch.softmax, aten._safe_softmax])
def test_infinite_rows(function, device):
    x = torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, -INF], [INF, 0.0, 1.0], [-INF, 5.0, -INF]], device=device)
    if function is aten._safe_softmax:
        x = torch.stack([x[0], x[1], x[3]])
    model_trt = torch2rt(Call(function, (-1,)), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x, -1))
