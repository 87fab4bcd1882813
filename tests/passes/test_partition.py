"""Partition: drawn graphs of which drawn calls stay torch's equal eager; and what decides where calls run."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn

from torch2rt import trace
from torch2rt.conversion.fallback import schedule_of
from torch2rt.conversion.partitioner import Partitioner, has_unbacked, torch_segment
from torch2rt.graph import check_graph, graph_meta
from torch2rt.passes import default
from torch2rt.passes.partitioning.effects import draws
from torch2rt.passes.partitioning.partition import is_call
from torch2rt.runtime.partitioned.reference import PartitionedNetwork

# Calls of drawn modules: each takes the values so far, `a` and `b` of shape (n, 6), and returns another.


def add_in_place(a, b):
    a = a.clone()
    a.add_(b, alpha=2)
    return a


def write_through_view(a, b):
    a = a * 1.5
    a[:, 1:3] = b[:, :2]
    a.t()[4].mul_(3.0)
    return a


def write_after_view(a, b):
    a = a + 0.25
    row = a.view(-1)
    a += b
    return a * row[:6]


def write_to_part(a, b):
    parts = [torch.tanh(part) for part in a.chunk(3, dim=1)]
    parts[1].sub_(b[:, 2:4])
    return torch.cat([parts[2], parts[1], parts[0]], 1)


CALLS = {
    "add": lambda a, b: a + b * 2,
    "mul": lambda a, b: a * torch.sigmoid(b),
    "matmul": lambda a, b: a @ (b.T @ b) / 20,
    "linear": lambda a, b: F.linear(a, torch.linspace(-1, 1, 36).view(6, 6)) - b,
    "softmax": lambda a, b: F.softmax(a - b, -1),
    "sizes": lambda a, b: a / a.shape[0] + b[: a.shape[0] // 2 + 1].mean(0),
    "ones": lambda a, b: a - torch.ones(a.shape[0] * 2, 6).cumsum(0)[: a.shape[0]] * b,
    "sort": lambda a, b: torch.sort(a, dim=1)[0] + torch.sort(b, dim=1, descending=True)[1],
    "flip": lambda a, b: torch.cat([a.flip(1), b], 0)[1 : a.shape[0] + 1],
    "where": lambda a, b: torch.where(a > b, a, b.roll(1, 1)),
    "int": lambda a, b: a * ((b * 3).long() % 3),
    "svd": lambda a, b: a * torch.linalg.svdvals(b)[0],
    "eig": lambda a, b: a + torch.linalg.eigvals(b.T @ b).real.sum(),
    "double": lambda a, b: (a.double() * 0.1 + b).float(),
    "random": lambda a, b: a + torch.rand_like(b),
    "noise": lambda a, b: a * torch.rand(6) + torch.empty(6).normal_(0.5, 2.0),
    "choice": lambda a, b: a + b[torch.randperm(b.shape[0])][0] + torch.randint(3, (6,)),
    "expanded": lambda a, b: a[:1].expand(a.shape[0], 6) + b.unfold(1, 6, 1).squeeze(1) * 0,
    "chosen": lambda a, b: a + b[b[:, 0] > 0].sum(0),
    "rows": lambda a, b: a - b[(b[:, 1] > 0).nonzero()[:, 0]].exp().sum() / 9,
    "turned": lambda a, b: (a.t() + b.t()).t(),
    "dropout": lambda a, b: F.dropout(a, 0.3, training=True) - b,
    "in_place": add_in_place,
    "view": write_through_view,
    "old_view": write_after_view,
    "part": write_to_part,
}


class Drawn(nn.Module):
    """Calls by name, each with the two values that it takes; the last values are returned."""

    def __init__(self, calls, returned):
        super().__init__()
        self.calls, self.returned = calls, returned
        self.weight = nn.Parameter(torch.linspace(-2, 2, 6))

    def forward(self, x, y):
        values = [x, y, x * self.weight]
        for name, first, second in self.calls:
            values.append(CALLS[name](values[first % len(values)], values[second % len(values)]))
        return values[3:][-self.returned :], {"view": values[-1].view(-1, 2), "n": x.shape[0]}


def reference_of(graph, refused, min_segment_calls=1):
    """The partitioned graph, evaluated without engines."""
    partitioner = Partitioner(graph, dict(refused), default(), "keep", min_segment_calls)
    program = partitioner.lowered()
    for piece in program.pieces:
        check_graph(piece.graph)
    parts = [
        torch_segment(piece, torch.device("cpu"))
        if piece.segment.is_torch
        else partitioner.networks[tuple(n.name for n in (*piece.segment.nodes, *piece.segment.outputs))]
        for piece in program.pieces
    ]
    eager = {
        index: torch_segment(piece, torch.device("cpu"))
        for index, piece in enumerate(program.pieces)
        if not piece.segment.is_torch and has_unbacked(piece)
    }
    network = PartitionedNetwork(parts, schedule_of(program), graph_meta(graph).interface, eager=eager)
    return network.reference(), program


drawn_calls = st.lists(
    st.tuples(st.sampled_from(sorted(CALLS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(calls=drawn_calls, returned=st.integers(1, 3), marks=st.integers(0, 2**30), least=st.integers(1, 4))
def test_drawn_partitions_equal_eager(calls, returned, marks, least):
    module = Drawn(calls, returned).eval()
    x, y = torch.linspace(-1, 2, 24).view(4, 6), torch.linspace(1, -1, 24).view(4, 6).sin()
    graph = trace(module, [x, y], min_shapes=[(2, 6), (2, 6)], max_shapes=[(5, 6), (5, 6)], fallback=True)
    marked = [n for i, n in enumerate(filter(is_call, graph.graph.nodes)) if marks >> (i % 30) & 1]
    reference, program = reference_of(graph, dict.fromkeys(marked, "marked"), least)
    note(str([(p.segment.is_torch, [n.name for n in p.segment.nodes]) for p in program.pieces]))
    runs = {node for piece in program.pieces if piece.segment.is_torch for node in piece.segment.nodes}
    assert runs.issuperset(marked)
    for size in (4, 2, 5):
        inputs = [torch.linspace(-1, 2, size * 6).view(size, 6), torch.randn(size, 6)]
        given_inputs = [value.clone() for value in inputs]
        torch.manual_seed(size)
        expected = module(*[value.clone() for value in inputs])
        torch.manual_seed(size)
        actual = reference(*inputs)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(inputs, given_inputs, rtol=0, atol=0)
        for value in actual[0]:  # which are the caller's: what becomes of them is no other result's business
            value.fill_(7)
        torch.manual_seed(size)
        torch.testing.assert_close(reference(*inputs), expected, rtol=2e-5, atol=2e-5)


class Expanded(nn.Module):
    def forward(self, x):
        return F.dropout(x[:1].expand(x.shape[0], 6) + torch.softmax(x, 1) * 0, 0.5, training=True)


def test_what_draws_gets_expanded_values_as_they_are():
    """The numbers of a mask are those of eager in the order of memory, which an expanded operand does not decide."""
    module, x = Expanded(), torch.rand(4, 6)
    graph = trace(module, [x], fallback=True, min_shapes=[(1, 6)], max_shapes=[(5, 6)])
    marked = [node for node in graph.graph.nodes if getattr(node.target, "__name__", "") in ("add", "dropout")]
    reference, program = reference_of(graph, dict.fromkeys(marked, "marked"))
    assert any("laid out" in map(str, [i[0] for i in p.inputs if not isinstance(i, int)]) for p in program.pieces)
    for rows in (4, 1, 5):
        x = torch.rand(rows, 6)
        torch.manual_seed(2)
        expected = module(x)
        torch.manual_seed(2)
        torch.testing.assert_close(reference(x), expected)


X = torch.fx.Graph().placeholder("x")
XS = [X, X]
ATTENTION, ATEN = F.scaled_dot_product_attention, torch.ops.aten
# Calls that draw no numbers in a module that does not train, and the same calls in one that does.
DRAWING = [
    ((F.dropout, X, {"p": 0.5, "training": False}), (F.dropout, X, {"p": 0.5, "training": True})),
    ((F.dropout, X, 0.3, False), (F.dropout, X)),
    ((F.dropout, X, 0.0), (F.dropout, X, 0.1)),
    ((torch.dropout, X, 0.5, False), (torch.dropout, X, 0.5, True)),
    ((ATTENTION, X, X, X), (ATTENTION, X, X, X, None, 0.1)),
    ((ATTENTION, X, X, X, X, 0.0, True), (ATTENTION, X, X, X, {"dropout_p": 0.2, "is_causal": True})),
    (
        (torch.lstm, X, XS, XS, True, 1, 0.5, False, False, True),
        (torch.lstm, X, XS, XS, True, 1, 0.5, True, False, True),
    ),
    ((torch.lstm, X, X, XS, XS, True, 1, 0.5, False, False), (torch.lstm, X, X, XS, XS, True, 1, 0.5, True, False)),
    ((torch.gru, X, X, XS, True, 2, 0.0, True, False, True), (torch.gru, X, X, X, XS, True, 2, 0.5, True, False)),
    ((torch.rrelu, X, 0.1, 0.3, False), (torch.rrelu, X, 0.1, 0.3, True)),
    ((ATEN.native_dropout.default, X, 0.5, False), (ATEN.native_dropout.default, X, 0.0, True)),
    ((ATEN._scaled_dot_product_flash_attention.default, X, X, X), (ATEN.bernoulli.p, X, 0.0)),
    ((torch.add, X, X), (torch.rand_like, X)),
]


@pytest.mark.parametrize("calls", DRAWING, ids=[f"{i}-{calls[0][0].__name__}" for i, calls in enumerate(DRAWING)])
def test_what_drops_nothing_draws_nothing(calls):
    graph = torch.fx.Graph()
    found = []
    for target, *args in calls:
        kwargs = args.pop() if isinstance(args[-1], dict) else {}
        found.append(draws(graph.call_function(target, tuple(args), kwargs)))
    assert found == [False, True]


class Named(nn.Module):
    """Inputs whose names torch's code would mix up, or needs itself."""

    def forward(self, X, x, slice, torch, getitem):
        return X * 2 - x[:, 1:3].exp() + (slice[0] / torch[1])[:2] * getitem


def test_names_of_inputs_are_kept_apart():
    inputs = [torch.rand(3, 4)[:, :2], torch.rand(3, 4), torch.rand(2, 3), torch.rand(2, 3), torch.rand(3, 2)]
    graph = trace(Named(), inputs)
    assert [spec.name for spec in graph_meta(graph).interface.inputs] == ["X", "x", "slice", "torch", "getitem"]
    torch.testing.assert_close(graph(*inputs)[0], Named()(*inputs))
    calls = list(filter(is_call, graph.graph.nodes))
    for marked in ({}, {calls[i]: "" for i in range(0, len(calls), 2)}, {calls[-1]: "", calls[1]: ""}):
        torch.testing.assert_close(reference_of(graph, marked)[0](*inputs), Named()(*inputs))


class UnderOneMask(nn.Module):
    """Rows of several values under a mask, which have one size, and are written back."""

    def forward(self, x):
        rows = torch.sort(x, 1)[0]
        mask = rows[:, 0] > 0
        written = torch.tanh(rows * 2).exp()
        written[mask] = torch.sort(written[mask], 0)[0] - rows[mask]
        return written


def test_rows_under_one_mask_are_written_back():
    """Any of the calls that take them may be the first to run; the mask may be true of no row."""
    graph = trace(UnderOneMask(), [torch.rand(4, 6)], fallback=True, min_shapes=[(2, 6)], max_shapes=[(5, 6)])
    calls = list(filter(is_call, graph.graph.nodes))
    for marked in calls:
        reference, _ = reference_of(graph, {marked: "marked"})
        for x in (torch.rand(4, 6) - 0.1, -torch.rand(2, 6), torch.rand(5, 6)):
            torch.testing.assert_close(reference(x), UnderOneMask()(x))
