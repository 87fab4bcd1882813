"""Constant 0-d tensors in the place of numbers: torch reads them, and the graph holds the number."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import B, case, check_case, parametrize
from test_tracing import calls, graph_equals_eager, module

from torch2rt import TraceError, torch2rt, trace

HALF, ONE, YES = torch.tensor(0.5), torch.tensor(1.25, dtype=torch.float16), torch.tensor(True)
TWO = torch.tensor(2, dtype=torch.int16)
STRIDES = torch.tensor([8.0, 16.0])
aten = torch.ops.aten

CASES = [
    case(lambda x: x.new_full((4, 1), STRIDES[1]), [(B, 3, 6, 4)], id="new_full static"),
    case(lambda x: x.new_full((x.shape[0], 2), STRIDES[1]) + x[:, 0, :2, 0], [(B, 3, 6, 4)], id="new_full"),
    case(
        lambda x: torch.full((x.shape[0], 3), HALF, dtype=torch.float32, device=x.device) * x[:, :, 0, 0],
        [(B, 3, 6, 4)],
        id="full",
    ),
    case(
        lambda x: torch.full((x.shape[0], 3), YES, device=x.device) & (x[:, :, 0, 0] > 0),
        [(B, 3, 6, 4)],
        id="full of bools",
    ),
    case(
        lambda x: torch.full((x.shape[0], 3), TWO, device=x.device) + x[:, :, 0, 0].int(),
        [(B, 3, 6, 4)],
        id="full of ints",
    ),
    case(lambda x: torch.full_like(x, ONE), [(B, 3, 6, 4)], id="full_like"),
    case(lambda x: torch.full_like(x, YES, dtype=torch.int32), [(B, 3, 6, 4)], id="full_like of a bool"),
    case(lambda x: torch.add(x, x.flip(1), alpha=HALF), [(B, 3, 6, 4)], id="add alpha"),
    case(F.leaky_relu, [(B, 3, 6, 4)], HALF),
    case(F.elu, [(B, 3, 6, 4)], HALF, id="elu"),
    case(F.hardtanh, [(B, 3, 6, 4)], -HALF, ONE, id="hardtanh"),
    case(F.threshold, [(B, 3, 6, 4)], HALF, ONE, id="threshold"),
    case(F.softplus, [(B, 3, 6, 4)], TWO, HALF, id="softplus"),
    case(F.pad, [(B, 3, 6, 4)], (TWO, 1), value=HALF, id="pad"),
    case(F.layer_norm, [(B, 3, 6, 4)], (4,), eps=HALF, id="layer_norm eps"),
    case(F.normalize, [(B, 3, 6, 4)], TWO, eps=HALF, id="normalize"),
    case(F.group_norm, [(B, 6, 4)], TWO, eps=HALF, id="group_norm", modes=("static",)),
    case(F.interpolate, [(B, 3, 6, 4)], scale_factor=[1.5, HALF], id="interpolate scale factors"),
    case(aten.upsample_nearest2d.vec, [(B, 3, 6, 4)], None, [HALF, 1.5], id="aten.upsample_nearest2d"),
    case(
        F.interpolate,
        [(B, 3, 6, 4)],
        scale_factor=HALF,
        recompute_scale_factor=True,
        mode="bilinear",
        id="interpolate recomputed",
    ),
    case(F.interpolate, [(B, 3, 6, 4)], size=[TWO, 3], id="interpolate size"),
    case(F.scaled_dot_product_attention, [(B, 2, 6, 4)] * 3, scale=HALF, id="attention scale"),
    case(lambda x: x.masked_fill(x > 0, HALF), [(B, 3, 6, 4)], id="masked_fill"),
    case(lambda x: x.clone().fill_(HALF), [(B, 3, 6, 4)], id="fill_"),
    case(lambda x: x[TWO - 1 :, torch.tensor(1)], [(3, 3, 6, B)], id="slice and index"),
    case(lambda x: x.select(TWO, TWO), [(B, 3, 6, 4)], id="select"),
    case(lambda x: torch.where(x > 0, x, HALF), [(B, 3, 6, 4)], id="where"),
]


@parametrize(CASES)
def test_numbers(row, mode, device):
    check_case(row, mode, device)


def test_the_graph_holds_the_number():
    graph = trace(module(lambda self, x: torch.full_like(x, STRIDES[1])), [torch.randn(2, 3)], max_batch_size=4)
    (call,) = (node for node in graph.graph.nodes if node.target is torch.full_like)
    assert call.args[1:] == (16.0,) and type(call.args[1]) is float


def test_a_tensor_of_float64_stays_one_where_torch_takes_tensors():
    """Only the argument that torch reads is a number; a float64 tensor promotes integers otherwise than a number."""
    made = module(lambda self, x: torch.add(x, torch.tensor(0.5, dtype=torch.float64), alpha=TWO).float())
    graph = graph_equals_eager(made, torch.tensor([1, 2, 3]))
    assert graph.graph.find_nodes(op="call_function", target=torch.add)[0].meta["val"].dtype is torch.float64


def test_a_constant_that_is_overwritten_is_read_before():
    def forward(self, x):
        number = torch.full((), 0.5)
        first = torch.full_like(x, number)
        number.fill_(2.0)
        return first + torch.full_like(x, number) * x

    graph_equals_eager(module(forward), torch.randn(2, 3), max_batch_size=4)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.new_full((x.shape[0], 2), torch.rand(())),
        lambda self, x: torch.ops.aten.celu(x, torch.rand(())),
        lambda self, x: torch.native_channel_shuffle(x, torch.randint(1, 3, ())),
    ],
)
def test_random_numbers_are_refused(forward):
    with pytest.raises(TraceError, match=r"test_scalars.py:\d+.*draws? random numbers"):
        trace(module(forward), [torch.randn(2, 4, 6)], max_batch_size=4)


def test_a_traced_tensor_is_no_number():
    with pytest.raises(TraceError, match=r"test_scalars.py:\d+.*depends on the values"):
        trace(module(lambda self, x: torch.add(x, x, alpha=x.mean())), [torch.randn(2, 4)], max_batch_size=4)


@pytest.mark.parametrize("number", [torch.tensor([0.5]), torch.nn.Parameter(torch.tensor(0.5))], ids=["1-d", "grad"])
def test_a_tensor_that_torch_does_not_take_is_refused_as_in_eager(number):
    made = module(lambda self, x: x.new_full((2, 2), number))
    with pytest.raises(TypeError, match="must be Number"):
        made(torch.randn(2, 3))
    with pytest.raises((TraceError, TypeError), match="must be Number"):
        torch2rt(made, [torch.randn(2, 3)])


def test_not_a_number_and_infinity(device):
    made = module(lambda self, x: torch.full_like(x, torch.tensor(math.nan)) * x + torch.full_like(x, -HALF / 0))
    graph_equals_eager(made.to(device), torch.randn(2, 3, device=device), max_batch_size=4)
    assert calls(trace(made, [torch.randn(2, 3)], max_batch_size=4)).count("torch.full_like") == 2
