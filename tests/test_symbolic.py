import json

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from torch2rt.symbolic import Dim, counterexample, describe, evaluate, evaluate_json, to_json

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


def test_a_large_range_is_not_taken_as_proven():
    # True for every size that is tried, and nothing torch's range analysis can prove.
    claim = sympy.Ne(Mod(m, 99_991) + Mod(m * m, 99_991), sympy.Integer(-1))
    assert counterexample(claim, SYMBOLS) in (None, True)
    assert counterexample(sympy.Ne(Mod(m, 1000), 999), {m: Dim(0, "x", 0, 1, 10**7)}) is not None


def test_expressions_are_told_in_the_users_terms():
    assert describe(sympy.Eq(n, m), SYMBOLS) in ("x.shape[0] == y.shape[2]", "y.shape[2] == x.shape[0]")
    assert describe(n + 1, SYMBOLS) == "x.shape[0] + 1"
