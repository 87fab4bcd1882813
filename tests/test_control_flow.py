import pytest
import torch
from harness import B, S, case, check_case, ints, parametrize

from torch2rt import TraceError, UnsupportedError, torch2rt

cond = torch.ops.higher_order.cond  # torch.cond compiles this, and the compiler does not see through a trace
W = torch.arange(12.0).view(3, 4)




def under_autocast(x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return cond(x.sum() > 0, lambda x: x @ x.mT, lambda x: (x + 1) @ x.mT, (x,))


CASES = [
    case(under_autocast, [(B, 4, 3)], id="autocast"),
    case(lambda x: cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,)), [(B, S)], id="positive-or-not"),
    case(lambda x, n: cond(n > 0, torch.sin, torch.cos, (x,)), [(B, 3), ints()], id="a-predicate-input"),
    case(lambda x, n: cond((n > 0).view(1, 1), torch.sin, torch.cos, [x]), [(B, 3), ints()], id="one-element"),
    case(lambda x: cond(x.shape[0] > 2, lambda x: x + 1, lambda x: x * 2, (x,)), [(B, 3)], id="a-size"),
    case(
        lambda x: cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x @ w.exp(), (x, W.to(x))),
        [(B, 3)], id="constant-operand",
    ),
    case(lambda x, y: cond(x.sum() > 0, lambda x: x + y, lambda x: x - y, (x,)), [(B, 3), (B, 3)], id="closure"),
    case(lambda x, y: cond(x.sum() > 0, lambda: x + y, lambda: x - y, ()), [(B, 3), (B, 3)], id="no-operands"),
    case(
        lambda x, y: cond(x.sum() > 0, lambda x, y: (x, y), lambda x, y: (y, x), (x, y)),
        [(B, 3), (B, 3)], id="two-results",
    ),
    case(lambda x: cond(x.sum() > 0, lambda x: torch.ones_like(x), lambda x: x, (x,)), [(B, 3)], id="passed-on"),
    case(lambda x: cond(x.sum() > 0, lambda x: x.clone().add_(1), torch.exp, (x,)), [(B, 3)], id="in-place"),
    case(lambda x: cond(x.dim() > 1, torch.exp, lambda x: x.view(-1), (x,)), [(B, 3)], id="decided-while-tracing"),
]  # fmt: skip


@parametrize(CASES)
def test_control_flow(row, mode, device):
    for _ in range(3):  # both branches, most likely
        check_case(row, mode, device)


def refused(function, message, *inputs):
    from harness import Call

    with pytest.raises((TraceError, UnsupportedError), match=message):
        torch2rt(Call(function), inputs or [torch.randn(2, 3)])


def test_unlike_branches_are_refused():
    refused(lambda x: cond(x.sum() > 0, lambda x: x[:1], lambda x: x, (x,)), "unlike")
    refused(lambda x: cond(x.sum() > 0, lambda x: x.half(), lambda x: x, (x,)), "unlike")
    refused(lambda x: cond(x.sum() > 0, lambda x: (x, x), lambda x: (x,), (x,)), "unlike")


def test_writing_to_operands_is_refused():
    refused(lambda x: cond(x.sum() > 0, lambda x: x.add_(1), lambda x: x * 2, (x + 1,)), "writes to its operands")


def test_loops_are_refused():
    loop = torch.ops.higher_order.while_loop
    refused(lambda x: loop(lambda x: x.sum() < 9, lambda x: (x + 1,), (x,), ()), "length depends on data")
