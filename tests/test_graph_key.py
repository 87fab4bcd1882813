"""Keys of graphs: equal for equal graphs, in other processes too, and for no others."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch2rt.graph_key import Unkeyable, content, contents, graph_key, own_code
from torch2rt.passes import value_numbers
from torch2rt.passes.order import chosen, run
from torch2rt.tracing.trace import trace

# One call each, with arguments that are drawn: what is written in a program is all that its graph depends on.
CALLS = {
    "add": lambda x, y, n: torch.add(x, y, alpha=n),
    "sub": lambda x, y, n: x - y if n else y - x,
    "scale": lambda x, y, n: x * (1, 1.0, True, 2, -0.0, 0.0)[n % 6],
    "softmax": lambda x, y, n: F.softmax(x, n % 2),
    "cast": lambda x, y, n: x.to((torch.float16, torch.bfloat16, torch.float64)[n % 3]).float(),
    "pad": lambda x, y, n: F.pad(x, (n % 2, 0), value=float(n))[:, : x.shape[1]],
    "table": lambda x, y, n: x + torch.tensor([0.0, -0.0, 1.0, float("nan")][n % 4]).repeat(4),
    "clamp": lambda x, y, n: x.clamp(min=n) if n % 2 else x.clamp(max=n),
    "roll": lambda x, y, n: x.roll(n % 3, 1),
    "leaky": lambda x, y, n: F.leaky_relu(x, 0.1 * (n + 1)),
}
PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(CALLS)), st.integers(0, 3)), min_size=1, max_size=3)
RANGES = st.sampled_from([(None, 3), (4, 3), (6, 3), (6, 2)])  # the largest batch, and the example's
DTYPES = st.sampled_from([torch.float32, torch.float16])


class Program(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x, y):
        for name, number in self.calls:
            x = CALLS[name](x, y, number)
        return x


def key_of(module, inputs, *more, constant=content, **ranges):
    return graph_key(run(trace(module, inputs, **ranges), chosen(None, "float32")), constant, *more)


def key_of_program(calls, batch, dtype, swapped=False):
    most, rows = batch
    inputs = [torch.ones(rows, 4, dtype=dtype), torch.ones(rows, 4, dtype=dtype)]
    names = ["y", "x"] if swapped else ["x", "y"]
    return key_of(Program(calls).eval(), inputs, max_batch_size=most, input_names=names)


@given(PROGRAMS, PROGRAMS, RANGES, RANGES, DTYPES, DTYPES, st.booleans())
@settings(max_examples=25, deadline=None)
def test_programs_meet_only_themselves(a, b, range_a, range_b, type_a, type_b, swapped):
    same = (effect(a), range_a, type_a) == (effect(b), range_b, type_b) and not swapped
    assert (key_of_program(a, range_a, type_a) == key_of_program(b, range_b, type_b, swapped)) == same


@given(PROGRAMS, st.data(), RANGES, DTYPES)
@settings(max_examples=25, deadline=None)
def test_one_argument_makes_a_difference(program, data, batch, dtype):
    at = data.draw(st.integers(0, len(program) - 1))
    name = program[at][0]
    other = [*program[:at], (name, data.draw(st.integers(0, 3))), *program[at + 1 :]]
    same = effect(other) == effect(program)
    assert (key_of_program(program, batch, dtype) == key_of_program(other, batch, dtype)) == same


def effect(program):
    """A program without differences that are none: `CALLS` take some numbers modulo others."""
    periods = {"softmax": 2, "cast": 3, "roll": 3}
    return [(name, bool(n) if name == "sub" else n % periods.get(name, 99)) for name, n in program]


class Scaled(nn.Module):
    def __init__(self, values, dtype=torch.float32):
        super().__init__()
        self.register_buffer("scale", torch.tensor(values, dtype=dtype))

    def forward(self, x):
        return x * self.scale


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Scaled([1.0, 2.0, 3.0]), Scaled([1.0, 2.0, 3.0000002])),
        (Scaled([0.0, 2.0, 3.0]), Scaled([-0.0, 2.0, 3.0])),
        (Scaled([1.0, 2.0, 3.0]), Scaled([2.0, 1.0, 3.0])),
        (nn.LayerNorm(3, eps=1e-5), nn.LayerNorm(3, eps=1e-6)),
        (nn.Softmax(0), nn.Softmax(1)),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
        (nn.Sequential(nn.ReLU()), nn.ReLU()),  # its layers have other names
    ],
)
def test_modules_that_differ(ours, theirs):
    assert key_of(ours.eval(), [X]) == key_of(ours.eval(), [X]) != key_of(theirs.eval(), [X])


def test_what_stands_beside_the_graph():
    keys = {key_of(nn.ReLU(), [X], more) for more in (1, 1.0, True, "1", None, [1], (1,), {"a": 1}, {"a": 1.0})}
    assert len(keys) == 9


def test_weights_are_left_out_where_they_are_asked_to_be():
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    keys = [key_of(module, [X], constant=lambda constant: "") for module in (a, b, nn.Linear(3, 5))]
    assert keys[0] == keys[1] != keys[2] and key_of(a, [X]) != key_of(b, [X])


def test_another_process_has_the_same_key():
    code = (
        "import torch; from torch import nn; from torch2rt.tracing.trace import trace\n"
        "from torch2rt.graph_key import graph_key, content, own_code\n"
        "torch.manual_seed(7); m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))\n"
        "print(graph_key(trace(m.eval(), [torch.ones(2, 3, 8, 8)], max_batch_size=5), content), own_code())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(7)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    key = graph_key(trace(module.eval(), [torch.ones(2, 3, 8, 8)], max_batch_size=5), content)
    assert found == f"{key} {own_code()}\n"


def test_what_has_no_name_has_no_key():
    from torch2rt.registry import Registry

    graph = trace(nn.ReLU(), [X])
    (call,) = (node for node in graph.graph.nodes if node.op == "call_function")
    call.target = lambda x: x
    with pytest.raises(Unkeyable, match="has no name"):
        graph_key(graph, content)
    graph = trace(nn.ReLU(), [X])
    (call,) = (node for node in graph.graph.nodes if node.op == "call_function")
    call.args = (*call.args, Registry())
    with pytest.raises(Unkeyable, match="Registry"):
        graph_key(graph, content)
    with pytest.raises(Unkeyable, match="sparse"):
        contents([torch.eye(3).to_sparse()])


def test_contents_of_one_element_of_any_stride_are_compared():
    values = [torch.arange(4.0).as_strided((1, 1), (9, 9), at) for at in (1, 1, 2)]
    first, same, other = contents(values)
    assert first == same != other
    first, same, other = map(value_numbers.content, values)
    assert first == same != other
