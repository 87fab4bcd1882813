import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, case, check_case, half, ints, parametrize

from torch2rt import TraceError, UnsupportedError, torch2rt

nn, aten = torch.nn, torch.ops.aten


def bf16(*shape):
    return Data(shape, torch.bfloat16)


MAX = [
    case(F.max_pool2d, [(B, 3, 2, 4)], 25, 25, 0, 1, True, id="largest-of-everything"),
    case(F.max_pool1d, [(B, 3, S)], 3),
    case(torch.max_pool1d, [(3, S)], 3, 2, 1, 1, True),
    case(F.max_pool2d, [(B, 3, S, 9)], (3, 2), (2, 3), (1, 0)),
    case(F.max_pool2d, [(3, S, 9)], (3, 2), stride=(1, 2), padding=(0, 1), ceil_mode=True),
    case(torch.max_pool2d, [(B, 3, S, 9)], 2, []),
    case(F.max_pool3d, [(B, 2, S, 6, 5)], (2, 3, 1), padding=(1, 1, 0), stride=(1, 2, 3)),
    case(F.max_pool3d, [(2, 4, 6, S)], 2, ceil_mode=True),
    case(F.max_pool2d, [half(B, 3, S, 9)], 3, 2, 1),
    case(F.max_pool2d, [bf16(B, 3, S, 9)], 3, 2, 1),
    # a last window that starts in the padding is left out
    *(
        case(F.max_pool1d, [(B, 3, length)], k, s, p, 1, True)
        for length in (5, S)
        for k, s, p in ((3, 2, 1), (4, 2, 2), *([(1, 3, 0), (2, 3, 1), (2, 2, 1), (3, 5, 0)] if length == 5 else []))
    ),
    case(F.max_pool2d, [(B, 3, 6, S)], (2, 3), (3, 2), (1, 1), ceil_mode=True),
    # dilation, integers
    case(F.max_pool1d, [(B, 3, S)], 2, 2, 1, 3),
    case(F.max_pool2d, [(B, 3, S, 9)], (3, 2), (2, 1), (1, 0), dilation=(1, 3)),
    case(F.max_pool2d, [half(B, 3, S, 9)], 2, dilation=2, ceil_mode=True),
    case(F.max_pool3d, [(B, 2, S, 6, 5)], 2, 1, 1, 2),
    case(F.max_pool2d, [ints(B, 3, S, 9)], 3, 2, 1),
    case(F.max_pool2d, [ints(B, 3, S, 9, dtype=torch.int32)], (2, 3), ceil_mode=True),
    case(nn.MaxPool2d(2, 3, 1, 2, ceil_mode=True), [(B, 3, 7, 9)], id="MaxPool2d"),
    case(F.max_pool2d, [Data((B, 3, S, 9), torch.uint8, 0, 255)], 2),
    # indices
    case(F.max_pool1d, [(B, 3, 9)], 3, 2, 1, return_indices=True),
    case(F.max_pool2d, [(B, 3, 7, 9)], (3, 2), (2, 3), (1, 0), return_indices=True),
    case(F.max_pool2d, [(3, 7, 9)], 2, 2, 1, 2, True, True),
    case(F.max_pool2d, [ints(B, 3, 7, 9, low=-2, high=2)], 3, 2, 1, return_indices=True),
    case(F.max_pool3d, [(B, 2, 5, 6, 5)], (2, 3, 1), padding=(1, 1, 0), stride=(1, 2, 3), return_indices=True),
    case(lambda x: aten.max_pool2d_with_indices(x, [3, 2])[0], [(B, 3, S, 9)], id="aten.max_pool2d_with_indices"),
    case(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], [half(B, 3, S, 9)], id="indices-unused"),
]

AVERAGE = [
    case(F.avg_pool2d, [(B, 3, 2, 4)], 2560, 2560, 0, True, True, id="window-over-everything"),
    case(F.avg_pool2d, [(B, 3, 2, 4)], 9, 9, 1, True, False, id="window-over-everything-but-padding"),
    case(F.avg_pool2d, [(B, 3, 2, 4)], (7, 3), 8, 1, True, True, 5, id="window-over-everything-divided"),
    case(F.avg_pool1d, [(B, 3, S)], 3),
    case(F.avg_pool1d, [(3, S)], 4, 2, 2, True, False),
    case(F.avg_pool2d, [(B, 3, S, 9)], (3, 2), (2, 3), (1, 0)),
    case(F.avg_pool2d, [(B, 3, S, 9)], (3, 2), (2, 3), (1, 1), count_include_pad=False),
    case(F.avg_pool2d, [(3, S, 9)], (3, 2), 1, (1, 0), False, True, 5),
    case(F.avg_pool2d, [half(B, 3, S, 9)], 3, padding=1, divisor_override=1),
    case(F.avg_pool3d, [(B, 2, S, 6, 5)], (2, 3, 1), (1, 2, 3), (1, 1, 0)),
    case(F.avg_pool3d, [(2, 4, 6, S)], 2, 1, 1, True, False),
    case(F.avg_pool2d, [half(B, 3, S, 9)], 3, 2, 1),
    case(F.avg_pool2d, [bf16(B, 3, S, 9)], 3, 2, 1, count_include_pad=False),
    *(
        case(
            F.avg_pool2d,
            [make(B, 3, *sizes)],
            (3, 2),
            (2, 3),
            (1, 1),
            ceil_mode=True,
            count_include_pad=count,
            divisor_override=divisor,
        )
        for make, sizes in ((lambda *s: Data(s), (S, 9)), (lambda *s: Data(s), (8, 6)), (half, (S, 6)))
        for count in (True, False)
        for divisor in (None, 4)
    ),
    case(F.avg_pool1d, [(B, 3, 6)], 2, 3, 1, True, True),
    case(F.avg_pool1d, [(B, 3, S * 2)], 2, 2, ceil_mode=True),
    case(F.avg_pool3d, [(B, 2, S, 6, 5)], 2, ceil_mode=True, divisor_override=-3),
    case(F.avg_pool2d, [(B, 3, S, 9)], (700, 4), (700, 3), ceil_mode=True, id="avg_pool2d over everything"),
    case(F.max_pool2d, [(B, 3, S, 9)], (2, 700), (1, 700), ceil_mode=True, id="max_pool2d over everything"),
    case(nn.AvgPool2d(3, 2, 1, True, False, 4), [(B, 3, S, 9)], id="AvgPool2d"),
    case(aten.avg_pool2d, [(B, 3, S, 9)], [3, 2], [2, 1], [1, 0], True, False),
]

ADAPTIVE = [
    case(function, [(B, 3, *sizes)], out)
    for kind in ("avg", "max")
    for function, sizes, out in (
        (getattr(F, f"adaptive_{kind}_pool1d"), (S,), 1),
        (getattr(F, f"adaptive_{kind}_pool1d"), (S,), 3),
        (getattr(F, f"adaptive_{kind}_pool1d"), (12,), 5),
        (getattr(F, f"adaptive_{kind}_pool1d"), (5,), 12),
        (getattr(F, f"adaptive_{kind}_pool2d"), (S, 9), 1),
        (getattr(F, f"adaptive_{kind}_pool2d"), (S, 9), (1, None)),
        (getattr(F, f"adaptive_{kind}_pool2d"), (S if kind == "avg" else 5, 9), (None, 3)),
        (getattr(F, f"adaptive_{kind}_pool2d"), (6, 9), (2, 3)),
        (getattr(F, f"adaptive_{kind}_pool2d"), (7, 9), (3, 4)),
        (getattr(F, f"adaptive_{kind}_pool2d"), (S, 9), (3, 5)),
        (getattr(F, f"adaptive_{kind}_pool2d"), (S, 9), (6, 1)),
        (getattr(F, f"adaptive_{kind}_pool3d"), (S, 4, 5), 1),
        (getattr(F, f"adaptive_{kind}_pool3d"), (4, 6, 5), (2, None, 5)),
        (getattr(F, f"adaptive_{kind}_pool3d"), (4, S, 5), (3, 2, 4)),
    )
] + [
    case(F.adaptive_avg_pool1d, [(3, S)], 3),
    case(F.adaptive_max_pool2d, [(3, S, 5)], (2, 3)),
    case(nn.AdaptiveAvgPool2d((None, 1)), [half(B, 3, S, 9)], id="AdaptiveAvgPool2d-half"),
    case(nn.AdaptiveAvgPool2d((3, 2)), [half(B, 3, S, 9)], id="AdaptiveAvgPool2d-half-uneven"),
    case(F.adaptive_max_pool2d, [half(B, 3, S, 9)], (3, 2)),
    case(lambda x, y: F.adaptive_avg_pool2d(x, y.shape[-2:]), [(B, 3, 9, 8), (S, 5)], id="to-another-size"),
    case(lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 5)), [(B, 3, S, 8)], id="to-half"),
    case(F.adaptive_max_pool1d, [(B, 3, 10)], 4, return_indices=True),
    case(F.adaptive_max_pool2d, [(3, 7, 9)], (3, 4), True),
    case(F.adaptive_max_pool3d, [(B, 2, 4, 6, 5)], (2, None, 3), return_indices=True),
    case(aten._adaptive_avg_pool2d, [(B, 3, S, 9)], [2, 3]),
    case(F.interpolate, [(B, 3, 7, 9)], (3, 4), mode="area"),
]

UNPOOL = [
    case(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), [(B, 3, 6, 8)], id="max_unpool2d"),
    case(
        lambda x: F.max_unpool1d(*F.max_pool1d(x, 3, return_indices=True), 3, output_size=(11,)),
        [(3, 10)],
        id="max_unpool1d",
    ),
    case(
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), [half(B, 2, 4, 6, 2)], id="max_unpool3d"
    ),
    case(
        lambda x, i: F.max_unpool2d(x, i + torch.arange(0, 20, 5, device=i.device).view(2, 2), 2, output_size=(4, 5)),
        [(B, 3, 2, 2), ints(B, 3, 2, 2, low=0, high=5)],
        id="max_unpool2d-given",
    ),
]

POWER = [
    case(F.lp_pool1d, [(B, 3, S)], 2, 3),
    case(F.lp_pool2d, [(B, 3, S, 9)], 2.0, (3, 2), 2, True),
    case(F.lp_pool2d, [(B, 3, S, 9)], float("inf"), (3, 2)),
    case(F.lp_pool3d, [(B, 2, S, 6, 5)], 2, 2),
]


@parametrize(MAX)
def test_max_pool(row, mode, device):
    check_case(row, mode, device)


@parametrize(AVERAGE)
def test_avg_pool(row, mode, device):
    check_case(row, mode, device)


@parametrize(ADAPTIVE)
def test_adaptive_pool(row, mode, device):
    check_case(row, mode, device)


@parametrize(UNPOOL)
def test_max_unpool(row, mode, device):
    check_case(row, mode, device)


@parametrize(POWER)
def test_lp_pool(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: F.avg_pool2d(x.long(), 2), UnsupportedError, "TensorRT does not average torch.int64"),
        (lambda x: F.fractional_max_pool2d(x, 2, output_size=3), TraceError, "windows are drawn at random"),
    ],
)
def test_refused(function, error, message):
    with pytest.raises(error, match=message):
        torch2rt(Call(function), [torch.randn(2, 3, 8, 8)])
