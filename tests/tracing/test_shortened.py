"""Sizes of sizes are rewritten in fewer terms, with the same values for all sizes that are served."""

import random

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module
from torch.utils._sympy.functions import FloorDiv, Max, PythonMod

from torch2rt import trace
from torch2rt.sizes import Dim, to_json, values_at
from torch2rt.tracing.sizes.shortened import ShortSizes

H, W = (sympy.Symbol(name, integer=True, positive=True) for name in "hw")


def padded(size, multiple):
    return size + PythonMod(-size, multiple)


def short(expr, low=3, high=200, step=1):
    dim = Dim(0, "x", 2, low, high, step)
    return ShortSizes({H: dim, W: dim}).shortened(expr)


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (PythonMod(padded(H, 7), 7), sympy.Integer(0)),
        (padded(padded(H, 7), 7), 7 * FloorDiv(H + 6, 7)),
        (FloorDiv(padded(FloorDiv(padded(H, 4), 4), 7), 7), FloorDiv(H + 27, 28)),
        (2 * FloorDiv(H, 2) + PythonMod(H, 2), H),
        (padded(H, 7) - PythonMod(-H, 7), H),
        (Max(H, 1), H),
        (padded(padded(H, 7), 7) * padded(W, 2), 14 * FloorDiv(H + 6, 7) * FloorDiv(W + 1, 2)),
        (H * 3 + 1, H * 3 + 1),
        (FloorDiv(H * W, 3), FloorDiv(H * W, 3)),
    ],
    ids=str,
)
def test_shortened(expr, expected):
    assert short(expr) == expected


def test_a_promise_of_multiples_makes_quotients():
    assert short(padded(H, 32), 32, 320, 32) == H
    assert short(FloorDiv(padded(H, 32), 32), 32, 320, 32) == FloorDiv(H, 32)


def test_an_equality_leaves_fewer_sizes():
    of_h, eighths = {H: Dim(0, "x", 2, 64, 200)}, FloorDiv(H + 7, 8)
    sizes = ShortSizes(of_h)
    quotient = FloorDiv(eighths, FloorDiv(H + 15, 16))
    assert sizes.shortened(quotient) == quotient
    assert sizes.know(sympy.Eq(PythonMod(eighths, 2), 0))
    assert sizes.shortened(quotient) == 2
    assert sizes.shortened(FloorDiv(eighths, 2) * 2) == sizes.shortened(eighths)
    assert sizes.know(sympy.Eq(PythonMod(H, 8), 0))
    assert sizes.shortened(eighths) == FloorDiv(H, 8)
    assert not sizes.know(sympy.Eq(eighths * 8, H))  # which leaves out no more
    assert not sizes.know(sympy.Eq(PythonMod(W, 2), 0))


def test_long_ranges_are_left_alone():
    expr = padded(padded(H, 7), 5)
    assert short(expr, 1, 1 << 17) == expr


def drawn(generator, depth):
    if not depth:
        return H
    inner, k = drawn(generator, depth - 1), generator.choice([2, 3, 4, 7, 28, 32])
    return generator.choice(
        [
            FloorDiv(inner, k),
            padded(inner, k),
            PythonMod(inner, k),
            FloorDiv(inner + generator.randint(-3, k), k) + generator.randint(-2, 2),
            inner * k + generator.randint(-3, 3),
            Max(inner, generator.randint(0, 40)),
            inner - drawn(generator, depth - 1),
        ]
    )


def test_values_stay():
    generator, rewritten = random.Random(0), 0
    of_h = {H: Dim(0, "", 0, 0, 0)}
    for _ in range(60):
        low, step = generator.randint(1, 100), generator.choice([1, 1, 1, 2, 32])
        dim = Dim(0, "x", 2, low, low + generator.randint(0, 300) // step * step, step)
        sizes, expr = np.array(dim.sizes), drawn(generator, generator.randint(1, 5))
        found = ShortSizes({H: dim}).shortened(expr)
        values = [values_at(to_json(e, of_h), [[sizes]], len(sizes)) for e in (expr, found)]
        assert values[0] is None or np.array_equal(*values), (expr, found, dim)
        rewritten += found != expr
    assert rewritten > 10


def _pads_again_and_again(self, x):
    for multiple in (7, 4, 7, 5, 7, 4, 7, 6, 7):
        rows, columns = x.shape[-2:]
        y = F.pad(x, (0, -columns % multiple, 0, -rows % multiple)).cumsum(-1)
        y = y.unflatten(-1, (y.shape[-1] // multiple, multiple)).transpose(-1, -2).flatten(-2)
        x = y[..., :rows, :columns] + 1
    return x[..., ::2]


def test_a_module_that_rounds_sizes_again_and_again():
    made = module(_pads_again_and_again)
    graph = trace(made, [torch.randn(1, 23, 30)], min_shapes=[(1, 3, 3)], max_shapes=[(2, 120, 90)])
    for shape in ((1, 3, 3), (2, 120, 90), (1, 28, 31), (2, 65, 64)):
        x = torch.randn(shape)
        compare(graph(x)[0], made(x))
