"""A module that asks ten questions of two sizes, each with another answer somewhere, is right at all of them."""

import random

import pytest
import torch
import torch.nn.functional as F
from harness import compare

from torch2rt import InputError, torch2rt


class TenQuestions(torch.nn.Module):
    """Every answer computes something else, so that a call that goes to the wrong engine is seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(11))

    def forward(self, x):
        rows, columns = x.shape
        y = x * 2 if rows % 2 else x * 3  # parity
        if rows == 0:  # emptiness
            return y.new_zeros(1, columns) + self.table[0]
        if rows == columns:  # equality
            return y @ y.t() + 1
        if rows * columns == 36:  # a product
            return y.flip(0) - 5
        if columns > self.table.shape[0]:  # a table's size
            return F.pad(y[:, : self.table.shape[0]] * self.table, (0, 1))
        if rows > 2 * columns:  # order
            return y.sum(0, keepdim=True)
        if (rows + columns) % 3 == 1:  # a remainder of a sum
            return y.cumsum(1) + self.table[:columns]
        if max(rows, columns) - min(rows, columns) == 1:  # neighbours
            return y - y.mean(1, keepdim=True)
        if -(-rows // 4) * 4 == rows:  # a multiple, by rounding up
            return y.reshape(rows // 4, 4, columns).amax(1)
        if rows == 1:  # one
            return y + self.table[1]
        return y.t() / columns


COUNT = 60


def test_ten_questions_of_two_sizes(request, device):
    """`--examples 500` looks at 500 sizes; on a GPU the engines answer."""
    made = TenQuestions().eval().to(device)
    low, high = (0, 1), (17, 14)
    ranges = {"min_shapes": [low], "max_shapes": [high]}
    x = torch.randn(5, 7, device=device)
    model_trt = torch2rt(made, [x], **ranges, max_variants=40, optimization_level=0, verify=False, progress=False)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    generator = random.Random(0)
    drawn = max(COUNT, request.config.getoption("--examples"))
    shapes = [low, high, (0, 14), (17, 1), (6, 6), (4, 9), (1, 1), (1, 11), (1, 12)]
    shapes += [(generator.randint(0, 17), generator.randint(1, 14)) for _ in range(drawn)]
    for shape in shapes:
        x = torch.randn(shape, device=device)
        expected, given = made(x), run(x)
        assert given.shape == expected.shape, shape
        if device.type == "cuda":
            torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
        else:
            compare(given, expected)
    with pytest.raises(InputError):
        run(torch.randn(18, 3, device=device))
    assert 10 < len(model_trt.built.each()) < 20
