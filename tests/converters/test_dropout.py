import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, case, check_case, half, parametrize

from torch2rt import UnsupportedError, torch2rt

CASES = [
    case(F.dropout, [(B, 3, S)], 0.3, False),
    case(F.dropout, [half(B, 3)], p=0.3, training=False),
    case(F.dropout, [(B, 3)], 0.0),
    case(F.dropout1d, [(B, 3, S)], training=False),
    case(F.dropout2d, [(B, 3, S, 2)], 0.3, training=False),
    case(F.dropout3d, [(B, 3, S, 2, 2)], 0.3, training=False),
    case(F.alpha_dropout, [(B, 3)]),
    case(F.feature_alpha_dropout, [(B, 3)], 0.3),
    case(torch.dropout, [(B, 3)], 0.3, False),
    case(torch.dropout, [(B, 3)], p=0.0, train=True),
    case(torch.feature_dropout, [(B, 3)], 0.3, train=False),
    case(lambda x: F.dropout(x * 2, 0.3, False, True) + 1, [(B, 3)], id="dropout-inplace"),
    case(
        torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.AlphaDropout(0.3), torch.nn.Dropout1d(), torch.nn.ReLU()),
        [(B, 3)],
        id="modules",
    ),
    case(lambda x: torch.ops.aten.native_dropout(x, 0.3, False)[0], [(B, 3)], id="aten.native_dropout"),
]


@parametrize(CASES)
def test_dropout(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize(
    "function", [F.dropout, F.dropout1d, lambda x: torch.dropout(x, 0.1, True), lambda x: F.alpha_dropout(x, 0.1, True)]
)
def test_training_is_refused(function):
    with pytest.raises(UnsupportedError, match=r"call \.eval\(\) on the module"):
        torch2rt(Call(function), [torch.randn(2, 3, 4)])
