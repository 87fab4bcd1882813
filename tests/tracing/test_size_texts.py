"""Texts of sizes, and sizes as keys of tables: never another key than eager's, and messages ask nothing."""

import collections
import logging
import warnings

import numpy as np
import pytest
import torch
from harness import Call, compare

from torch2rt import trace
from torch2rt.graph import graph_meta
from torch2rt.lowering import lower
from torch2rt.runtime.module import ReferenceModule
from torch2rt.tracing.patches.text_uses import _only_tells, _parents, _texts_at
from torch2rt.tracing.trace import Traces, trace_variants

TABLE = {"5x7": 2, "7x7": 5}


def _matched(x):
    match tuple(x.shape):
        case (5, 7):
            return x * 2
        case (n, 7) if n > 5:
            return x * n
        case _:
            return x + 1


USED = {
    "equal": lambda x: x * 2 if str(x.shape[0]) == "7" else x + 1,
    "unequal": lambda x: x * 2 if f"{x.shape[0]}" != "7" else x + 1,
    "in a list": lambda x: x * 2 if str(x.shape[0]) in ["6", "7"] else x + 1,
    "its length": lambda x: x * len(str(x.shape[0] + 4)),
    "a piece": lambda x: x * 2 if str(x.shape[0])[-1] == "7" else x + 1,
    "several pieces": lambda x: x * TABLE.get(f"{x.shape[0]}x{x.shape[1]}", 1),
    "with a format": lambda x: x * 2 if f"{x.shape[0]:02d}" == "07" else x + 1,
    "with its name": lambda x: x * 2 if f"{x.shape[0]=}" == "x.shape[0]=7" else x + 1,
    "of a float": lambda x: x * 2 if f"{x.shape[0] / 2:.1f}" == "2.5" else x + 1,
    "of a shape": lambda x: x * 2 if str(x.shape) == "torch.Size([5, 7])" else x + 1,
    "of a tuple": lambda x: x * 2 if repr((x.shape[0], 7)) == "(5, 7)" else x + 1,
    "percent": lambda x: x * TABLE.get("%sx%s" % (x.shape[0], x.shape[1]), 1),  # noqa: UP031
    "joined": lambda x: x * TABLE.get("x".join(map(str, x.shape)), 1),
    "added": lambda x: x * TABLE.get(str(x.shape[0]) + "x7", 1),
    "format": lambda x: x * TABLE.get("{}x{}".format(*x.shape), 1),
    "a number again": lambda x: x * int(f"1{x.shape[0]}"),
    "a key": lambda x: x * {6: 4, 5: 2}.get(x.shape[0], 1),
    "a key of several": lambda x: x * {(6, 7): 4, (5, 7): 2}.get(tuple(x.shape), 1),
    "a default": lambda x: x * collections.defaultdict(lambda: 2, {7: 3})[x.shape[0]],
    "in a set": lambda x: x * 2 if x.shape[0] in {6, 5} else x + 1,
    "a set": lambda x: x * len(set(x.shape)),
    "matched": _matched,
    "is an int": lambda x: x * 2 if isinstance(x.shape[0], int) and not isinstance(x.shape[0], float) else x + 1,
    "its type": lambda x: x * 2 if type(x.shape[0]) is int and type(x.shape[0] / 2) in (float, complex) else x + 1,
    "a type's name": lambda x: x * 2 if type(x.shape[0]).__name__ == "int" and isinstance(int, type) else x + 1,
    "a type made": lambda x: x * (type("Made", (int,), {})(3) if type(type(x)) is type(x.__class__) else 2),
    "is a float": lambda x: x * 2 if isinstance(x.shape[0] / 2, (float, np.ndarray)) else x + 1,
}


class Cached(torch.nn.Module):
    """Keeps a table for each of the sizes that it has seen."""

    def __init__(self, key):
        super().__init__()
        self.key, self.tables = key, {}

    def forward(self, x):
        if (key := self.key(x)) not in self.tables:
            self.tables[key] = torch.arange(x.shape[0], device=x.device)[:, None] * 2.0
        return x + self.tables[key]


CACHES = {"cached by text": lambda x: f"{x.shape[0]}_{x.shape[1]}", "cached by sizes": lambda x: (x.shape[0], 7)}


def _served(made, x, ranges):
    with Traces(made, [x], **ranges, progress=False) as traces:
        graphs = [variant.graph for variant in trace_variants(traces, 9)]
    return [(graph_meta(graph).interface, ReferenceModule(lower(graph))) for graph in graphs]


@pytest.mark.parametrize("name", [*USED, *CACHES])
def test_texts_and_keys_are_those_of_numbers(name):
    made = Call(USED[name]) if name in USED else Cached(CACHES[name])
    served = _served(made, torch.randn(6, 7), {"min_shapes": [(5, 7)], "max_shapes": [(7, 7)]})
    for rows in (5, 6, 7):
        x = torch.randn(rows, 7)
        (run,) = [run for interface, run in served if interface.serves([(rows, 7)])]
        compare(run(x), made(x))


class OfTypes(torch.nn.Module):
    """Asks for the type of a number that another file's function has made of a size."""

    def forward(self, x):
        half = int(x.shape[0] * 0.5)
        return x * 2 if type(half) is int and type(x.shape) is torch.Size and type(len(x.shape)) is int else x + 1


def test_types_are_those_of_numbers():
    (run,) = [run for _, run in _served(OfTypes(), torch.randn(6, 7), {"min_shapes": [(5, 7)], "max_shapes": [(5, 7)]})]
    x = torch.randn(5, 7)
    compare(run(x), x * 2)
    assert "type" not in globals() and "int" not in globals()


def test_a_class_is_an_int_after_a_trace_only_if_it_was_before():
    size = []
    trace(Call(lambda x: (size.append(x.shape[0]), x + 1)[1]), [torch.randn(3, 7)], max_shapes=[(9, 7)])
    assert isinstance(size[0], torch.SymInt) and not isinstance(size[0], int) and size[0].__class__ is torch.SymInt


def test_texts_of_sizes_that_are_only_told_ask_nothing(caplog):
    log = logging.getLogger("told")

    def tells(x):
        rows, columns = x.shape
        text = f"{rows}x{columns} is too much"
        if rows > 100:
            raise ValueError(text)
        log.warning("%s rows of %s", rows, f"{x.shape}")
        log.info(f"{rows / 2:.2f} pairs of {columns}, " + str(rows) + f" and {rows * 2}")
        warnings.warn(f"{rows}", stacklevel=2)
        print(f"{rows:3d}", x.shape, str(x.shape))
        assert rows > 0, f"{rows} rows"
        torch._assert(columns == 7, f"{rows} rows of {columns} columns")
        return x + 1

    with pytest.warns(UserWarning):
        graph = trace(Call(tells), [torch.randn(3, 7)], min_shapes=[(1, 7)], max_shapes=[(9, 7)])
    assert "rows of" in caplog.text and not graph_meta(graph).interface.constraints


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ('    raise ValueError("no " + f"{n} rows")', True),
        ('    log.info(f"{n}")', True),
        ('    x = math.log(f"{n}")', False),
        ('    return f"{n}"', False),
        ('    CHECK(n > 0, f"{n} rows")', True),
        ('    check(f"{n} rows")', False),
        ('    key = f"{n}"\n    print(key)', True),
        ('    key = f"{n}"\n    print(table[key])', False),
    ],
)
def test_a_line_says_whether_a_text_is_told(code, told):
    """As it is read before Python 3.11, which does not say where in the line the text is."""
    parents = _parents(f"def f(n, table):\n{code}\n")
    assert all(_only_tells(text, parents) for text in _texts_at(parents, 2, None)) is told
