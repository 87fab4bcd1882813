"""Sizes to trace with: unlike round numbers and each other, equal where the module needs it; else the user's."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import TraceError, torch2rt, trace
from torch2rt.interface import Input
from torch2rt.promises import Promise
from torch2rt.tracing.sizes.hints import shapes_to_try


def first(*specs):
    inputs = [Input("x", torch.float32, *spec[:3], promises=tuple(spec[3:])) for spec in specs]
    tries = shapes_to_try(inputs, [torch.empty(spec[1]) for spec in specs])
    assert tries[-1:] != [] and [spec[1] for spec in specs] in tries  # the user's own come, too
    return tries[0]


def test_generic_sizes_are_inside_the_range_and_unlike_each_other_and_round_numbers():
    ((batch, channels, height, width),) = first(((1, 3, 128, 64), (2, 3, 224, 224), (8, 3, 512, 448)))
    assert channels == 3 and 2 < batch <= 8 and batch != 3
    assert 128 <= height <= 512 and 64 <= width <= 448 and height != width
    assert all(size % k for size in (height, width) for k in range(2, 33))


def test_dimensions_of_several_inputs_with_one_range_are_equal():
    (b, s), (c, t), (d,) = first(((1, 1), (2, 16), (8, 128)), ((1, 1), (2, 16), (8, 128)), ((3,), (5,), (9,)))
    assert (b, s) == (c, t) and d not in (b, s)


def test_sizes_with_a_common_root_are_promised_together():
    (a,), (b,) = first(((32,), (64,), (320,), Promise(0, "h", 32)), ((3,), (5,), (21,), Promise(0, "h", 2, 1)))
    assert a % 32 == 0 and b == a // 32 * 2 + 1


def _pad_to_a_multiple(self, x):
    """As super resolution does: `if` asks whether anything is to be padded."""
    height, width = x.shape[-2:]
    down, right = math.ceil(height / 32) * 32 - height, 32 * ((width + 31) // 32) - width
    x = F.pad(x, (0, right, 0, down), "reflect")
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=8.0)[..., : height * 2, : width * 2]


def _windows(self, x):
    """As Swin does, with a roll that is left out where one window is all."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7))
    if not (x.shape[1] == 7 or x.shape[2] == 7):
        x = x.roll((-3, -3), (1, 2))
    rows, columns = x.shape[1] // 7, x.shape[2] // 7
    x = x.view(x.shape[0], rows, 7, columns, 7, x.shape[3]).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, 49, x.shape[5])
    x = (x.softmax(1) * x).view(-1, rows, columns, 7, 7, x.shape[2]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * 7, columns * 7, x.shape[5])[:, :height, :width]


def _tied(self, past, mask, new):
    keys = torch.cat([past, new], 1)
    return keys * mask


ROUND = [
    (_pad_to_a_multiple, [[(1, 2, 32, 32)], [(2, 2, 64, 64)], [(2, 2, 96, 128)]], [[(1, 2, 33, 64)], [(2, 2, 95, 32)]]),
    (_windows, [[(1, 14, 14, 3)], [(2, 28, 28, 3)], [(3, 56, 56, 3)]], [[(1, 15, 28, 3)], [(3, 55, 49, 3)]]),
    (
        _tied,
        [[(1, 1), (1, 2), (1, 1)], [(2, 8), (2, 12), (2, 4)], [(4, 32), (4, 40), (4, 8)]],
        [[(3, 5), (3, 7), (3, 2)]],
    ),
]


@pytest.mark.parametrize(("forward", "ranges", "others"), ROUND, ids=lambda v: getattr(v, "__name__", ""))
def test_round_opt_sizes_are_no_claims(forward, ranges, others):
    made, (low, opt, high) = module(forward), ranges
    model_trt = torch2rt(
        made, [torch.randn(s) for s in opt], min_shapes=low, opt_shapes=opt, max_shapes=high, verify=False
    )
    run = model_trt.reference()
    for shapes in (low, opt, high, *others):
        inputs = [torch.randn(shape) for shape in shapes]
        try:
            expected = made(*inputs)
        except RuntimeError:  # ends of ranges that do not belong to each other
            continue
        compare(run(*inputs), expected)


def test_of_several_refusals_the_one_at_the_users_sizes_is_shown():
    made = module(lambda self, x: x.view(2, -1, 4))
    with pytest.raises(TraceError, match=r"false for x.shape\[0\] = 3"):
        trace(made, [torch.randn(4, 4)], min_shapes=[(3, 4)], max_shapes=[(7, 4)])
    made = module(lambda self, x: x.view(11, -1, 4))
    with pytest.raises(RuntimeError, match="invalid for input of size 16"):
        trace(made, [torch.randn(4, 4)], min_shapes=[(3, 4)], max_shapes=[(7, 4)])
