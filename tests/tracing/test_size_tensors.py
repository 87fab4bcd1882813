"""A tensor made of sizes is sizes: what computes with it, and what takes its elements for numbers."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import InputError, TraceError, torch2rt


def _deformable(self, x, y):
    """As deformable attention takes levels apart: by a tensor of their sizes, and where each begins."""
    shapes = torch.as_tensor([(x.shape[2], x.shape[3]), (y.shape[2], y.shape[3])], dtype=torch.long, device=x.device)
    starts = torch.cat((shapes.new_zeros((1,)), shapes.prod(1).cumsum(0)[:-1]))
    flat = torch.cat([x.flatten(2), y.flatten(2)], 2)
    sums = [flat[:, :, starts[i] : starts[i] + h * w].sum(2) for i, (h, w) in enumerate(shapes)]
    parts = flat.split([h.item() * w.item() for h, w in shapes], 2)
    levels = [part.view(part.shape[0], part.shape[1], h, w) for part, (h, w) in zip(parts, shapes)]
    grid = torch.stack([shapes[..., 1], shapes[..., 0]], -1) * 1.0
    return sums[0] - sums[1], levels[0] + 1, levels[1].transpose(2, 3) * 2, flat / shapes.prod(1).sum(), grid


def _turned(self, x, y):
    size = torch.tensor(x.shape[2:]).flip(0)
    return x.flatten(2).view(*x.shape[:2], *size), torch.zeros(*(size * 2 - 1), size.max().item() % 5 + 1) + y.sum()


def _listed(self, x, y):
    height, width = (torch.tensor([y.shape[3], x.shape[2]]) // 2 + torch.tensor([1, 3])).tolist()
    return F.interpolate(x, size=(height, width)), y.sum((2, 3)) * (10 - torch.tensor(x.shape)).sum()


def _amounts(self, x, y):
    missing = torch.remainder(-torch.tensor(x.shape[-2:]), 4)
    sizes = torch.stack([torch.tensor(x.shape), torch.tensor(y.shape)]).amax(0)
    return F.pad(x, (0, missing[1], 0, missing[0])), y[..., : sizes[3] // 2].new_zeros(sizes[1:].tolist())


@pytest.mark.parametrize("forward", [_deformable, _turned, _listed, _amounts], ids=lambda f: f.__name__)
def test_elements_are_sizes(forward):
    made = module(forward)
    ranges = {
        "min_shapes": [(1, 3, 2, 3), (1, 3, 2, 2)],
        "opt_shapes": [(2, 3, 6, 8), (2, 3, 3, 4)],
        "max_shapes": [(3, 3, 9, 12), (3, 3, 6, 7)],
    }
    inputs = [torch.randn(shape) for shape in ranges["opt_shapes"]]
    run = torch2rt(made, inputs, **ranges, verify=False).reference()
    for batch, h, w, a, b in [(1, 2, 3, 2, 2), (2, 6, 8, 3, 4), (3, 9, 12, 6, 7), (2, 5, 3, 6, 2)]:
        x, y = torch.randn(batch, 3, h, w), torch.randn(batch, 3, a, b)
        compare(run(x, y), made(x, y))
    if forward is _deformable:
        with pytest.raises(InputError, match=r"needs [xy].shape\[0\] == [xy].shape\[0\]"):
            run(torch.randn(1, 3, 4, 4), torch.randn(2, 3, 4, 4))


def _written(x):
    sizes = torch.tensor(x.shape)
    sizes[0] = 3
    return x.new_zeros(sizes.tolist())


REFUSED = [
    (_written, "depends on the value of a tensor"),
    (lambda x: x[: int(torch.tensor(x.shape)[0])], r"Write x.item\(\)"),
    (lambda x: x.new_zeros((torch.tensor(x.shape) + x.sum().long()).tolist()), "depends on the value of a tensor"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_size_is_refused(function, message):
    with pytest.raises(TraceError, match=message):
        torch2rt(module(lambda self, x: function(x)), [torch.randn(2, 3)], max_batch_size=4)
