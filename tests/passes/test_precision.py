"""float64 in the middle of a module: float32 where it ends in float32 anyway, and refused where float32 may decide."""

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, With, case, check_case, parametrize

from torch2rt import InputError, UnsupportedError, lower, torch2rt, trace

T64 = torch.tensor([0.3, -1.7, 2.9], dtype=torch.float64)
aten = torch.ops.aten


def written(x):
    y = x.double().clone()
    y[0, 1:] = 1.5
    y *= 2
    return y.float()


def rotary(x):
    """As FLUX makes its tables."""
    omega = 1.0 / 10000 ** (torch.arange(0, 6, 2, dtype=torch.float64, device=x.device) / 6)
    angles = torch.outer(x[:, 0].double(), omega)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return angles.cos().repeat_interleave(2, 1).float(), turns.imag


CASES = [
    case(lambda x: x.double().mean().float(), [(B, 3)], id="double"),
    case(rotary, [(B, 3)], id="rotary table"),
    case(lambda x: (x * T64.to(x.device)).half(), [(B, 3)], id="a constant"),
    case(lambda x: (x.to(torch.float64) + 1).type_as(x), [(B, 3)], id="to and type_as"),
    case(lambda x: (x.type(f"torch.{'cuda.' * x.is_cuda}DoubleTensor") - 1).to(x), [(B, 3)], id="type by name"),
    case(
        lambda x: (torch.arange(x.shape[0], dtype=torch.double, device=x.device)[:, None] + x).bfloat16(),
        [(B, 3)],
        id="arange",
    ),
    case(lambda x: x.sum(1, dtype=torch.float64).float(), [(B, 3)], id="dtype of a sum"),
    case(lambda x: torch.where(x > 0, x.double(), 0.5).float(), [(B, 3)], id="where"),
    case(lambda x: x.double().sort(1)[0].float(), [(B, 3)], id="sorted values"),
    case(lambda x: torch.zeros_like(x.double(), dtype=torch.int32) + x.int(), [(B, 3)], id="dtype and shape alone"),
    case(lambda x: x * x.double().shape[0], [(B, 3)], id="a size"),
    case(lambda x: x * x.double().sum(), [(B, 3)], id="a 0-d factor"),
    case(
        lambda x: F.layer_norm(x.double(), (3,), T64.to(x.device), T64.to(x.device), 1e-5).float(),
        [(B, 3)],
        id="layer_norm",
    ),
    case(lambda x: x.double().clamp(min=T64[0].to(x.device)).float(), [(B, 3)], id="a 0-d bound"),
    case(lambda x: x.double().split([1, 2], 1)[1].float(), [(B, 3)], id="parts"),
    case(written, [(B, 3)], id="writes"),
    case(lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float64), dtype=torch.float32), [(B, 3)], id="aten"),
    case(With(torch.nn.Linear(3, 5).double(), lambda m, x: m(x.double()).float()), [(B, 3)], id="Linear"),
]


@parametrize(CASES)
def test_float32_in_its_place(row, mode, device):
    network = check_case(row, mode, device)
    assert all("float64 is computed in float32" in text for text in network.assumptions)


def test_what_is_assumed_is_said_once_a_line():
    network = lower(trace(Call(rotary).eval(), [torch.randn(2, 3)]))
    lines = [text.partition(":")[0].rpartition("/")[2] for text in network.assumptions]
    assert lines == ["test_precision.py"] * 3
    assert not lower(trace(Call(torch.relu).eval(), [torch.randn(2, 3)])).assumptions


REFUSED = {
    "an output is float64, which TensorRT does not have. Return x.float()": lambda x: x.double(),
    "gt: it makes bool of a float64 value": lambda x: (x.double() > 0.1).float() + x,
    "long: it makes int64 of a float64 value": lambda x: x.double().long(),
    "argmax: it makes int64": lambda x: x.double().argmax(1),
    "getitem: it makes int64": lambda x: x.double().sort(1)[1],
    "1e-300 is no number of float32": lambda x: (x.double() + 1e-300).log().float(),
    "-1.7976931348623157e.308 is no": lambda x: x.double().masked_fill(x > 0, -1.7976931348623157e308).amax().float(),
    "a constant beyond 3.4e38 is no": lambda x: (x.double() * (T64 * 1e100)).float(),
    "a branch or a loop takes a float64 value": lambda x: torch.while_loop(
        lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x.double())
    )[1].float(),
}


@pytest.mark.parametrize(("message", "forward"), REFUSED.items(), ids=REFUSED)
def test_refused(message, forward):
    with pytest.raises(UnsupportedError, match=rf"(?s)test_precision.py:\d+.*{message}"):
        torch2rt(Call(forward).eval(), [torch.randn(2, 3)], max_batch_size=4)


@pytest.mark.parametrize("row", [row for row in CASES if row.id in ("double", "arange", "Linear")], ids=lambda r: r.id)
def test_refused_if_asked_to(row, device):
    module = row.function if isinstance(row.function, torch.nn.Module) else Call(row.function)
    with pytest.raises(UnsupportedError, match="float64"):
        torch2rt(module.eval().to(device), [torch.randn(2, 3, device=device)], float64="refuse")


def test_nothing_else_may_be_asked():
    with pytest.raises(InputError, match=r"float64='double' is not one of 'float32', 'refuse'"):
        torch2rt(Call(torch.relu).eval(), [torch.randn(2, 3)], float64="double")
    with pytest.raises(InputError, match=r"'.*' is torch.float64.*Pass x.float\(\)"):
        torch2rt(Call(torch.relu).eval(), [torch.randn(2, 3).double()])
