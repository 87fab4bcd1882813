import pytest
import torch
from harness import B, Call, S, Size, case, check_case, floats, ints, parametrize
from torch._higher_order_ops.while_loop import while_loop

from torch2rt import TraceError, UnsupportedError, torch2rt, trace
from torch2rt.backend.quirks import has_dynamic_while

cond = torch.cond
W = torch.arange(12.0).view(3, 4)


def under_autocast(x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return cond(x.sum() > 0, lambda x: x @ (x * 2).mT, lambda x: (x + 1) @ (x * 3).mT, (x,))


CASES = [
    case(under_autocast, [(B, 4, 3)], id="autocast"),
    case(lambda x: cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,)), [(B, S)], id="positive-or-not"),
    case(lambda x, n: cond(n > 0, torch.sin, torch.cos, (x,)), [(B, 3), ints()], id="a-predicate-input"),
    case(lambda x, n: cond((n > 0).view(1, 1), torch.sin, torch.cos, [x]), [(B, 3), ints()], id="one-element"),
    case(lambda x: cond(x.shape[0] > 2, lambda x: x + 1, lambda x: x * 2, (x,)), [(B, 3)], id="a-size"),
    case(
        lambda x: cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x @ w.exp(), (x, W.to(x))),
        [(B, 3)],
        id="constant-operand",
    ),
    case(lambda x, y: cond(x.sum() > 0, lambda x: x + y, lambda x: x - y, (x,)), [(B, 3), (B, 3)], id="closure"),
    case(lambda x, y: cond(x.sum() > 0, lambda: x + y, lambda: x - y, ()), [(B, 3), (B, 3)], id="no-operands"),
    case(
        lambda x, y: cond(x.sum() > 0, lambda x, y: (x + 1, y * 2), lambda x, y: (y.sin(), x.cos()), (x, y)),
        [(B, 3), (B, 3)],
        id="two-results",
    ),
    case(lambda x: cond(x.sum() > 0, torch.ones_like, lambda x: x.clone(), (x,)), [(B, 3)], id="passed-on"),
    case(lambda x: cond(x.sum() > 0, lambda x: x.clone().add_(1), torch.exp, (x,)), [(B, 3)], id="in-place"),
    case(lambda x: cond(x.dim() > 1, torch.exp, lambda x: x.view(-1), (x,)), [(B, 3)], id="decided-while-tracing"),
    case(
        lambda x: cond(
            x.sum() > 0, lambda x: cond(x.amax() > 1, torch.sin, lambda x: x * 3, (x,)), lambda x: x.neg(), (x,)
        ),
        [(B, 3)],
        id="nested",
    ),
    case(lambda x: torch.ops.higher_order.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), [(B, 3)], id="operator"),
    case(
        lambda x: while_loop(lambda i: i < 3, lambda i: (i + 1,), (x.new_zeros(()),))[0] + x,
        [(B, 3)],
        id="constant-loop",
    ),
    case(torch.compile(lambda x: (x + 1).relu()), [(B, 3)], id="compiled"),
]


def newton(x, steps):
    """Square roots, by as many steps as an input says."""

    def step(i, y):
        return i + 1, (y + x / y) / 2

    return while_loop(lambda i, y: i < steps, step, (torch.zeros_like(steps), torch.ones_like(x)))


def doubling(x):
    weight = W.to(x).mT @ W.to(x) / 100
    return while_loop(lambda x: x.abs().amax() < 50, lambda x: (x + x @ weight,), (x + 0.1,))[0]


def collatz(n):
    """A loop in a loop, of several numbers at once, and a choice in it."""

    def step(n, count):
        n = torch.where(n % 2 == 0, n // 2, 3 * n + 1)
        start = (n, torch.zeros_like(count))
        n, _ = while_loop(lambda n, i: (i < 2) & (n > 64).all(), lambda n, i: (n // 2, i + 1), start)
        return n, count + torch.where(n.sum() > 0, 1, 0)

    return while_loop(lambda n, count: (n > 1).any() & (count < 20), step, (n, torch.zeros_like(n[0])))


def pairs(x, y):
    def body(state):
        x = state["x"] * y
        x = x + cond(x.sum() > 0, lambda: x.cos(), lambda: x.sin())
        x[:, 0] += 1
        return ({"x": x, "n": state["n"] + x.shape[0]},)

    return while_loop(lambda state: state["n"] < 9, body, ({"x": x, "n": torch.zeros_like(y[0, 0]).long()},))


LOOPS = [
    case(newton, [floats(B, 3), ints(low=0, high=7)], id="newton"),
    case(doubling, [floats(B, 4)], id="doubling"),
    case(collatz, [ints(5, low=1, high=99)], id="collatz"),
    case(pairs, [(B, 3), (B, 3)], id="pairs"),
    case(
        lambda x: while_loop(lambda i: i < 3, lambda i: (i + x.exp().sum(),), (x.new_zeros(()),)),
        [(B, 3)],
        id="closure",
    ),
    case(
        lambda x: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (x.new_zeros(()), x)),
        [(B, 3)],
        id="constant-state",
    ),
]


@parametrize(LOOPS)
def test_loops(row, mode, device):
    is_dynamic = mode == "dynamic" and any(isinstance(size, Size) for d in row.inputs for size in d.shape)
    if is_dynamic and not has_dynamic_while():
        with pytest.raises(UnsupportedError, match="dynamic shapes"):
            check_case(row, mode, device)
    else:
        check_case(row, mode, device)


@parametrize(CASES)
def test_control_flow(row, mode, device):
    for _ in range(3):  # both branches, most likely
        check_case(row, mode, device)


def refused(function, message, *inputs):
    with pytest.raises((TraceError, UnsupportedError), match=message):
        torch2rt(Call(function), inputs or [torch.randn(2, 3)])


def test_unlike_branches_are_refused():
    refused(lambda x: cond(x.sum() > 0, lambda x: x[:1], lambda x: x, (x,)), "unlike")
    refused(lambda x: cond(x.sum() > 0, lambda x: x.half(), lambda x: x, (x,)), "unlike")
    refused(lambda x: cond(x.sum() > 0, lambda x: (x, x), lambda x: (x,), (x,)), "unlike")


def test_writing_to_what_is_outside_is_refused():
    refused(lambda x: cond(x.sum() > 0, lambda x: x.add_(1), lambda x: x * 2, (x + 1,)), "writes to a tensor")
    refused(lambda x: cond(x.sum() > 0, lambda x: x.t_(), lambda x: x.mT, (x + 1,)), "writes to a tensor")
    outer = torch.zeros(3)
    refused(lambda x: cond(x.sum() > 0, lambda: outer.add_(1) + x, lambda: x * 2), "writes to a tensor")
    refused(lambda x: cond(x.sum() > 0, lambda: outer.add_(x[0]), lambda: x[0] * 2), "writes to a tensor")
    assert not outer.any()

    def of_a_loop(x):
        y = x + 1
        return while_loop(lambda x: x.sum() < 9, lambda x: (x + y[0].add_(1),), (x,))

    refused(of_a_loop, "writes to a tensor")


def test_loops_that_are_not_loops_are_refused():
    refused(lambda x: while_loop(lambda i: i < 9, lambda i: (i + x.sum(),), (0,)), "make it a 0-d tensor")
    refused(lambda x: while_loop(lambda x: x < 9, lambda x: (x + 1,), (x,)), "no 0-d bool")
    refused(lambda x: while_loop(lambda x: x.sum() < 9, lambda x: (x.double(),), (x,)), "unlike")
    refused(lambda x: while_loop(lambda x: x.sum() < 9, lambda x: (x[:1],), (x,)), "unlike")
    refused(lambda x: while_loop(lambda x: x.sum() < 9, lambda x: (x + torch.linalg.svdvals(x).sum(),), (x,)), "svd")


def test_what_a_body_makes_stays_inside():
    made = []

    def body(x):
        made.append(x * 2)
        return (made[-1] + 1,)

    refused(lambda x: while_loop(lambda x: x.sum() < 9, body, (x,))[0] + made[-1], "used outside of it")


def test_the_graph_runs_as_torch_does():
    x, steps = torch.rand(2, 3) + 1, torch.tensor(4)
    graph = trace(Call(newton), [x, steps], max_shapes=[(5, 3), ()])
    torch.testing.assert_close(list(graph(x, steps)), list(newton(x, steps)))
