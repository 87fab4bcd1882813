"""Pooling windows of dynamic sizes, and the indices of the highest elements in images of dynamic size."""

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, Size, case, check_case, compare, half, ints, parametrize

from torch2rt import torch2rt

H, W = Size("H", 4, 7, 12), Size("W", 5, 8, 11)
IMAGE = [(B, 3, H, W)]


def row(name, function, inputs=IMAGE):
    return case(function, inputs, id=name, modes=("dynamic",))


CASES = [
    *[
        row(f"{function.__name__}-whole", lambda x, f=function: f(x, x.shape[2:]), [shape])
        for function, shape in (
            (F.avg_pool1d, (B, 3, S)),
            (F.avg_pool2d, (B, 3, H, W)),
            (F.avg_pool3d, (B, 2, 3, H, W)),
            (F.max_pool1d, (B, 3, S)),
            (F.max_pool2d, (B, 3, H, W)),
            (F.max_pool3d, (B, 2, 3, H, W)),
        )
    ],
    row("avg-half", lambda x: F.avg_pool2d(x, x.shape[2:]), [half(B, 3, H, W)]),
    row("avg-unbatched", lambda x: F.avg_pool2d(x, x.shape[1:]), [(B, H, W)]),
    row("avg-rows", lambda x: F.avg_pool2d(x, (x.shape[2], 3), (1, 2), (0, 1))),
    row("avg-quarters", lambda x: F.avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))),
    row("avg-stride", lambda x: F.avg_pool2d(x, (x.shape[2] // 2, 3), stride=1, count_include_pad=False, padding=1)),
    row("avg-ceil", lambda x: F.avg_pool2d(x, (x.shape[2] // 2, 2), (3, 2), ceil_mode=True)),
    row("avg-divisor", lambda x: F.avg_pool2d(x, (x.shape[2], 2), divisor_override=5)),
    row("lp", lambda x: F.lp_pool2d(x.abs() + 0.1, 3, x.shape[2:])),
    row("max-rows", lambda x: F.max_pool2d(x, (x.shape[2], 3), (1, 2), (0, 1))),
    row("max-dilated", lambda x: F.max_pool2d(x, (x.shape[2] // 2, 2), 1, 1, (1, 3))),
    row("max-ceil", lambda x: F.max_pool2d(x, (x.shape[2] // 2, 2), (3, 2), ceil_mode=True)),
    row("max-int", lambda x: F.max_pool2d(x, (x.shape[2], 2), padding=(0, 1)), [ints(B, 3, H, W)]),
    row("indices-whole", lambda x: F.max_pool2d(x, x.shape[2:], return_indices=True)),
    row("indices-1d", lambda x: F.max_pool1d(x, 3, 2, 1, return_indices=True), [(B, 3, S)]),
    row("indices-2d", lambda x: F.max_pool2d(x, (2, 3), (1, 2), (1, 0), (1, 2), True, True)),
    row("indices-of-equals", lambda x: F.max_pool2d(x.float(), 2, return_indices=True), [ints(B, 3, H, W, high=3)]),
    row("indices-3d", lambda x: F.max_pool3d(x, 2, return_indices=True), [(B, 2, 3, H, W)]),
    row("adaptive-avg", lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 3))),
    row("adaptive-max", lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, 3))),
    row("adaptive-max-1d", lambda x: F.adaptive_max_pool1d(x, x.shape[2] // 3 + 1), [(B, 3, S)]),
    *[
        row(
            f"adaptive-3d-{indices}",
            lambda x, i=indices: F.adaptive_max_pool3d(x, (2, x.shape[3] // 2, 3), i),
            [(B, 2, 3, H, W)],
        )
        for indices in (False, True)
    ],
    row("adaptive-indices", lambda x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True)),
    row("adaptive-indices-one", lambda x: F.adaptive_max_pool1d(x, 1, True), [(B, 3, S)]),
    row("adaptive-indices-some", lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, None), True)),
]


@parametrize(CASES)
def test_windows(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_a_number_is_the_highest(dtype, device):
    x = torch.randn(2, 3, 6, 8, device=device).to(dtype)
    x[0, 1, 2, 3] = torch.nan
    function = lambda x: F.max_pool2d(x, x.shape[2:])  # noqa: E731
    shapes = dict(min_shapes=[(2, 3, 4, 4)], max_shapes=[(2, 3, 8, 9)])
    model_trt = torch2rt(Call(function), [x], **shapes)
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x))
