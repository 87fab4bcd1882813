import gc
import json
import time

import numpy as np
import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Mod, ToFloat, TruncToInt

from torch2rt import torch2rt
from torch2rt.size_choices import choices_of, counterexample, extremes
from torch2rt.sizes import Dim, describe, evaluate, evaluate_json, holds, to_json, truths

n, m = sympy.symbols("n m", integer=True, positive=True)
SYMBOLS = {n: Dim(0, "x", 0, 1, 8), m: Dim(1, "y", 2, 3, 100_000)}

EXPRESSIONS = [
    n * 2 + m,
    FloorDiv(m, 3) - n,
    Mod(m, 7) * n**2,
    Max(n, FloorDiv(m, 2)),
    sympy.Eq(n, m),
    sympy.Or(n > 3, sympy.Not(m < 50)),
]


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
@pytest.mark.parametrize(("a", "b"), [(1, 3), (5, 5), (8, 77)])
def test_json_computes_what_the_expression_does(expr, a, b):
    tree = json.loads(json.dumps(to_json(expr, SYMBOLS)))
    assert evaluate_json(tree, [(a,), (9, 9, b)]) == evaluate(expr, {n: a, m: b})


@pytest.mark.parametrize(
    ("claim", "sizes"),
    [
        (n > 0, None),
        (n < 9, None),
        (n > 2, {"x.shape[0]": 1}),
        (sympy.Ne(n, 5), {"x.shape[0]": 5}),
        (sympy.Eq(Mod(m, 8), 0), {"y.shape[2]": 3}),
        (sympy.Eq(FloorDiv(2 * n, 2), n), None),
        (sympy.true, None),
        (n + m > 3, None),
    ],
    ids=str,
)
def test_counterexamples_lie_inside_the_range(claim, sizes):
    found = counterexample(claim, SYMBOLS)
    assert (found if found is None else {str(k): v for k, v in found.items()}) == sizes


def test_all_sizes_of_two_dimensions_are_looked_at_in_one_go():
    symbols = {n: Dim(0, "x", 2, 224, 448), m: Dim(0, "x", 3, 224, 448)}
    padded = 7 * FloorDiv(n + Mod(7 - Mod(n, 7), 7), 7) * (m + Mod(7 - Mod(m, 7), 7))
    before = time.process_time()
    assert counterexample(sympy.Eq(Mod(padded, 49), 0), symbols) is None
    found = counterexample(padded < 448 * 448, symbols)
    assert {str(dim): size for dim, size in found.items()} == {"x.shape[2]": 442, "x.shape[3]": 442}
    assert time.process_time() - before < 1  # 50,625 choices of sizes, as vectors


@pytest.mark.parametrize("claim", [n * m**3 * 10**6 > 0, sympy.Ne(FloorDiv(m, n - 4), 7), Mod(m, n - 1) >= 0], ids=str)
def test_vectors_of_sizes_and_numbers_agree(claim):
    """Also where products pass what 64 bits hold, and where a divisor is 0."""
    sizes = {n: np.array([1, 2, 4, 5, 8]), m: np.array([3, 99_999, 7, 28, 100_000])}
    expected = [holds(claim, {n: int(a), m: int(b)}) for a, b in zip(sizes[n], sizes[m])]
    assert truths(claim, sizes).tolist() == expected


TEXTS = [
    (sympy.Eq(Mod(n + 3, 7), 0), "(x.shape[0] + 3) % 7 == 0"),
    (FloorDiv(n - 1, 2) + 1 > 2 * m, "((x.shape[0] - 1) // 2) + 1 > 2*y.shape[2]"),
    (sympy.Eq(TruncToInt(0.25 * ToFloat(n * m)), 480), "int(0.25*x.shape[0]*y.shape[2]) == 480"),
    (sympy.And(n > 3, sympy.Ne(Mod(n, 4), 0)), "x.shape[0] > 3 and x.shape[0] % 4 != 0"),
    (Max(n, FloorDiv(m, 2)), "max(x.shape[0], y.shape[2] // 2)"),
]


@pytest.mark.parametrize(("expr", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_expressions_are_told_in_pythons_words(expr, text):
    assert describe(expr, SYMBOLS) == text


def test_a_large_range_is_not_taken_as_proven():
    # True for every size that is tried, and nothing torch's range analysis can prove.
    claim = sympy.Ne(Mod(m, 99_991) + Mod(m * m, 99_991), sympy.Integer(-1))
    assert counterexample(claim, SYMBOLS) in (None, True)
    assert counterexample(sympy.Ne(Mod(m, 1000), 999), {m: Dim(0, "x", 0, 1, 10**7)}) is not None


def test_expressions_are_told_in_the_users_terms():
    assert describe(sympy.Eq(n, m), SYMBOLS) in ("x.shape[0] == y.shape[2]", "y.shape[2] == x.shape[0]")
    assert describe(n + 1, SYMBOLS) == "x.shape[0] + 1"


def test_many_dimensions_are_looked_at_in_a_few_choices():
    symbols = {sympy.Symbol(f"s{i}", integer=True): Dim(i, f"x{i}", 0, 1, 9 + i) for i in range(70)}
    choices = choices_of(symbols, sum(symbols))
    assert not choices.are_all and len(choices.sizes) == 70
    for symbol, sizes in choices.sizes.items():
        assert (sizes.min(), sizes.max()) == (1, symbols[symbol].max) and len(sizes) < 1 << 16
    assert extremes(sum(symbols), symbols) == (70, sum(dim.max for dim in symbols.values()))


def test_sizes_of_a_trace_go_with_its_module():
    """Torch keeps answers about sizes, and with them the environment of every trace, for the life of the process."""

    def count():
        for _ in range(3):  # what ends in one collection lets go of others
            gc.collect()
        kinds = {kind for kind in map(type, gc.get_objects()) if issubclass(kind, ShapeEnv)}
        return sum(type(x) in kinds for x in gc.get_objects())

    def convert(width):
        for options in ({}, {"keep_network": False}, {"refittable": True}):
            torch2rt(torch.nn.Linear(3, width), [torch.randn(2, 3)], max_batch_size=8, verify=False, **options)

    convert(2)
    gc.collect()
    gc.freeze()  # what is there already, which takes seconds to look through
    try:
        convert(3)
        before = count()
        for width in (4, 5):
            convert(width)
        assert count() <= before
    finally:
        gc.unfreeze()
