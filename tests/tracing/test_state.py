"""What a module keeps between calls: tables for the sizes of its last call, and values, which an engine cannot keep."""

import pytest
import torch
from harness import compare

from torch2rt import TraceError, lower, trace
from torch2rt.runtime.module import ReferenceModule


class Anchors(torch.nn.Module):
    """A detector's head: a table for the shape of the last call, made again when the shape is another one."""

    dynamic = False

    def __init__(self, key):
        super().__init__()
        self.key, self.shape, self.tables = key, None, {}

    def forward(self, x):
        shape = self.key(x)
        if self.dynamic or self.shape != shape:
            column = torch.arange(x.shape[1]).type_as(x) + 0.5
            self.tables["anchors"] = torch.cat([column, x.new_full((x.shape[1],), torch.tensor(8.0))])
            self.shape = shape
        return torch.cat([x, x], 1) * self.tables["anchors"]


KEYS = {
    "shape": lambda x: x.shape,
    "tuple": lambda x: tuple(x.shape),
    "list": lambda x: [*x.shape],
    "number": lambda x: x.shape[1],
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("called_with", [None, (2, 3), (4, 6), (1, 2)], ids=str)
def test_a_table_for_the_last_sizes(key, called_with):
    made = Anchors(key).eval()
    if called_with:
        made(torch.randn(*called_with))
    kept = made.shape
    run = ReferenceModule(lower(trace(made, [torch.randn(2, 3)], min_shapes=[(1, 2)], max_shapes=[(4, 6)])))
    assert made.shape is kept
    for shape in [(1, 2), (2, 3), (3, 5), (4, 6)]:
        x = torch.randn(*shape)
        compare(run(x), Anchors(key)(x))


class Alternating(Anchors):
    """What it computes depends on whether the sizes are those of the last call."""

    def forward(self, x):
        same, self.shape = self.shape == x.shape, x.shape
        return x + 1 if same else x - 1


class Branching(Anchors):
    """A table for the last sizes, and a decision about sizes besides."""

    def forward(self, x):
        y = super().forward(x)
        return y + 1 if x.shape[0] > 2 else y - 1


@pytest.mark.parametrize("cls", [Alternating, Branching])
def test_a_claim_that_matters_stays_one(cls):
    made = cls(lambda x: x.shape).eval()
    made(torch.randn(3, 3))
    with pytest.raises(TraceError, match=r"test_state.py:\d+.*the module only does the same for every size if"):
        trace(made, [torch.randn(2, 3)], max_batch_size=4)


class Counting(Anchors):
    """Its second call is another one than the first, and the first is what an engine does."""

    def forward(self, x):
        assert self.shape is None or x.shape[0] > 100, "it was called before"
        self.shape = x.shape
        return x if x.shape[0] < 100 else -x


def test_a_second_call_that_fails():
    graph = trace(Counting(None).eval(), [torch.randn(2, 3)], max_batch_size=4)
    x = torch.randn(3, 3)
    compare(graph(x)[0], x)


class Kept(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.table = make, None

    def forward(self, x):
        if self.table is None:
            self.table = self.make(x)
        return x.flip(0) + self.table


FROM_SIZES = {
    "type_as": lambda x: torch.arange(3.0).type_as(x),
    "to another": lambda x: torch.arange(3).to(x),
    "new_full": lambda x: x.new_full((3,), 2.0),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0, 3.0]),
    "zeros_like": lambda x: torch.zeros_like(x) + 1,
    "full_like by name": lambda x: torch.full_like(input=x, fill_value=3.0),
    "expand_as": lambda x: torch.arange(3.0).expand_as(x),
    "view_as": lambda x: torch.arange(6.0).view_as(x),
    "shape": lambda x: torch.arange(x.numel()).reshape(x.shape).float(),
    "aten": lambda x: torch.ops.aten.expand_as(torch.arange(3.0), torch.ops.aten.zeros_like(x)),
}


@pytest.mark.parametrize("make", FROM_SIZES.values(), ids=FROM_SIZES)
@pytest.mark.parametrize("ranges", [{}, {"max_shapes": [(2, 3)], "min_shapes": [(1, 3)]}], ids=["static", "dynamic"])
def test_what_is_computed_from_sizes_may_be_kept(make, ranges):
    if ranges and make is FROM_SIZES["view_as"]:
        ranges = {}
    graph = trace(Kept(make).eval(), [torch.randn(2, 3)], **ranges)
    x = torch.randn(2, 3)
    compare(graph(x)[0], Kept(make)(x))


FROM_VALUES = {
    "type_as": lambda x: x.double().type_as(torch.zeros(1)),
    "new_tensor": lambda x: x.new_tensor(x[0]),
    "expand_as": lambda x: x[:1].expand_as(torch.zeros(2, 3)),
    "to another": lambda x: x.to(torch.zeros(1, dtype=torch.float16)).float(),
    "ones_like times": lambda x: torch.ones_like(x) * x,
}


@pytest.mark.parametrize("make", FROM_VALUES.values(), ids=FROM_VALUES)
def test_what_is_computed_from_values_may_not(make):
    with pytest.raises(TraceError, match=r"test_state.py:\d+.*'table'.*an earlier call"):
        trace(Kept(make).eval(), [torch.randn(2, 3)])
