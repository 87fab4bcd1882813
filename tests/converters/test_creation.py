import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, Size, bools, case, check_case, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

T = torch.Tensor
P = Size("P", 2, 3, 5)
made = lambda make, *inputs, **kwargs: case(lambda x, *rest: make(x, x.shape[0], *rest), inputs, **kwargs)  # noqa: E731

FILLED = [
    made(lambda x, b: x + torch.zeros(b, 1, 3, device=x.device), (B, 2, 3), id="zeros"),
    made(
        lambda x, b: x + torch.ones((b, 3), dtype=torch.int32, device=x.device),
        ints(B, 3, dtype=torch.int32),
        id="ones",
    ),
    made(lambda x, b: torch.full((b, 2), 2.5, device=x.device) * x, half(B, 2), id="full"),
    made(lambda x, b: torch.full(size=(b, 2), fill_value=7, device=x.device) + x, ints(B, 2), id="full-keywords"),
    made(lambda x, b: torch.full((2, b), True, device=x.device), (B, 3), id="full-bool"),
    made(lambda x, b: torch.full((b,), x.sum(), device=x.device), (B, 3), id="full-of-computed"),
    made(lambda x, b: torch.full((2,), b, device=x.device), (B, 3), id="full-of-size"),
    made(lambda x, b: torch.full((2,), b / 2, device=x.device), (B, 3), id="full-of-half-size"),
    case(torch.zeros_like, [(B, S)]),
    case(torch.zeros_like, [half(B, 3)], dtype=torch.int64),
    case(torch.ones_like, [ints(B, 3)], dtype=torch.float16),
    case(lambda x: torch.ones_like(x, memory_format=torch.preserve_format) + x, [(3, 4)], id="ones_like-static"),
    case(torch.full_like, [(B, 3)], 1.5),
    case(torch.full_like, [ints(B, 3)], fill_value=2.9),
    case(lambda x: torch.full_like(x, x.max()), [half(B, 3)], id="full_like-of-computed"),
    made(lambda x, b: x.new_zeros(b, 2) + x, half(B, 2), id="new_zeros"),
    made(lambda x, b: x.new_ones((b, 1), dtype=torch.bool), (B, 2), id="new_ones"),
    made(lambda x, b: x.new_full((2, b), 3) * x, (2,), id="new_full", modes=("static",)),
    made(lambda x, b: x.new_full((b, 2), -1), ints(B, 2), id="new_full-int"),
    made(lambda x, b: x.new_full((b, 2), x[0, 0]), (B, 2), id="new_full-of-computed"),
    made(lambda x, b: torch.empty(b, 2, device=x.device).fill_(4) + x, (B, 2), id="empty-filled"),
    made(lambda x, b: torch.empty_like(x).copy_(x * 2), (B, 2), id="empty_like-copied"),
    made(lambda x, b: x.new_empty(b, 3).zero_() + x, (B, 3), id="new_empty-zeroed"),
    case(torch.fill, [(B, 3)], 2.5),
    case(lambda x, y: torch.fill(x, y), [half(B, 3), ()], id="fill-tensor"),
    case(lambda x: (x * 2).fill_(3), [ints(B, 3)], id="fill_"),
    case(lambda x: (x * 2).zero_(), [bools(B, 3)], id="zero_"),
    made(lambda x, b: torch.scalar_tensor(b, device=x.device) + x, (B, 3), id="scalar_tensor"),
]

PROGRESSIONS = [
    made(lambda x, b: torch.arange(b, device=x.device) + x, (B,), id="arange"),
    made(lambda x, b: torch.arange(1, b + 1, device=x.device), (B,), id="arange-start"),
    made(lambda x, b: torch.arange(b, b + 3, device=x.device), (B,), id="arange-from-size"),
    made(lambda x, b: torch.arange(0, 3 * b, 2, device=x.device), (B,), id="arange-step"),
    made(lambda x, b: torch.arange(start=b, end=0, step=-1, device=x.device), (B,), id="arange-down"),
    made(lambda x, b: torch.arange(end=b, dtype=torch.float32, device=x.device) / 2, (B,), id="arange-float"),
    made(lambda x, b: torch.arange(0.5, b, 0.25, device=x.device), (P,), id="arange-fractions"),
    made(lambda x, b: torch.arange(b, dtype=torch.int32, device=x.device), (S,), id="arange-int32"),
    made(lambda x, b: torch.arange(b, dtype=torch.float16, device=x.device) + x, half(S), id="arange-half"),
    made(
        lambda x, b: torch.ops.prims.iota(b, start=1, step=2, dtype=torch.int64, device=x.device, requires_grad=False),
        (B,),
        id="prims.iota",
    ),
    case(lambda x: x + torch.arange(x.shape[1], device=x.device)[None, :, None], [(B, S, 2)], id="positions"),
    made(lambda x, b: torch.linspace(-1, 1, b, device=x.device), (B,), id="linspace"),
    made(lambda x, b: torch.linspace(0, b, steps=5, device=x.device), (B,), id="linspace-to-size"),
    case(lambda x: torch.linspace(x.min(), x.max(), 4, device=x.device), [(B, 3)], id="linspace-of-computed"),
    made(lambda x, b: torch.linspace(-6, 6, b, dtype=torch.int64, device=x.device), (S,), id="linspace-integers"),
    made(lambda x, b: torch.linspace(0, b * 10 - 1, 6, dtype=torch.int32, device=x.device), (B,), id="linspace-int32"),
    case(
        lambda i: torch.linspace(i[0], i[1], 9, dtype=torch.int64, device=i.device),
        [ints(2)],
        id="linspace-integers-of-computed",
    ),
    made(lambda x, b: torch.logspace(0, 2, b, base=2.0, device=x.device), (B,), id="logspace"),
    made(lambda x, b: torch.eye(b, device=x.device), (B,), id="eye"),
    made(lambda x, b: torch.eye(b, 3, dtype=torch.int64, device=x.device), (B,), id="eye-wide"),
    made(lambda x, b: torch.eye(3, device=x.device) * x, (3,), id="eye-static"),
    case(F.one_hot, [ints(B, S, low=0, high=5)], 5),
    case(F.one_hot, [ints(low=0, high=4)], num_classes=4),
    made(lambda x, b: F.one_hot(x, b), ints(B, low=0, high=1), id="one_hot-symbolic"),
]

NUMBERS = [
    made(lambda x, b: torch.tensor(b, device=x.device) + x, (B,), id="tensor-of-size"),
    made(lambda x, b: torch.tensor([b, 3], device=x.device), (B,), id="tensor-of-list"),
    made(lambda x, b: torch.tensor([[b, 2 * b], [0.5, 1]], device=x.device), (B,), id="tensor-of-mixed"),
    made(lambda x, b: torch.tensor([b, 1], dtype=torch.float16, device=x.device), (B,), id="tensor-dtype"),
    made(lambda x, b: torch.as_tensor([b / 2], device=x.device), (B,), id="as_tensor-of-float-size"),
    case(lambda x: x.new_tensor([1, 2.5]) + x, [(B, 2)], id="new_tensor"),
    made(lambda x, b: x.new_tensor([b, 2]), (B, 2), id="new_tensor-of-size"),
    case(lambda x: torch.tensor(x) + 1, [(B, 3)], id="tensor-of-tensor"),
    made(lambda x, b: torch.tensor([x[0, 0], x[0, 1]], device=x.device), (3, 2), id="tensor-of-computed"),
]


@parametrize(FILLED)
def test_filled(row, mode, device):
    check_case(row, mode, device)


@parametrize(PROGRESSIONS)
def test_progressions(row, mode, device):
    check_case(row, mode, device)


W = Size("W", 3, 5, 9)
OF_SIZES = {  # of two dynamic sizes
    "max": lambda b, w: torch.sym_max(b, w),
    "min": lambda b, w: torch.sym_min(b, w - 1) + 1,
    "nested": lambda b, w: torch.sym_max(b + 2, torch.sym_max(w, b + w - 4)),
    "sum": lambda b, w: torch.sym_sum([b, w, b]),
    "floor": lambda b, w: (b * w + 1) // 2,
    "mod": lambda b, w: (3 * b + w) % 4 + 1,
    "if": lambda b, w: torch.sym_ite(b > w, b * 2, w - 1),
    "rounded": lambda b, w: torch.sym_int((b * w) ** 0.5),
}
ARITHMETIC = [
    case(lambda x, f=f: torch.ones(f(*x.shape), device=x.device) + x.sum() * f(*x.shape), [(B, W)], id=name)
    for name, f in OF_SIZES.items()
]


@parametrize(ARITHMETIC)
def test_arithmetic_of_sizes(row, mode, device):
    check_case(row, mode, device)


@parametrize(NUMBERS)
def test_numbers(row, mode, device):
    check_case(row, mode, device)


def test_static_sizes_are_folded():
    function = lambda x: x + torch.arange(x.shape[1]) * torch.ones_like(x[0]) + x.new_full((3,), 2)  # noqa: E731
    assert torch2rt(Call(function), [torch.randn(2, 3)]).network.num_layers == 4  # two constants, two sums


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + torch.rand(x.shape), "no random numbers"),
        (lambda x: x + torch.randn_like(x), "no random numbers"),
        (lambda x: x + torch.rand(3), "torch.rand draws random numbers"),
        (lambda x: x + torch.empty(3).normal_(), "torch.Tensor.normal_ draws random numbers"),
        (lambda x: x + torch.distributions.Normal(0.0, 1.0).sample((3,)), "draws random numbers"),
        (lambda x: torch.nn.Linear(3, 2)(x), "draws random numbers"),
        (lambda x: torch.bernoulli(x.sigmoid()), "no random numbers"),
        (lambda x: torch.arange(x.shape[0] - 2), "torch refuses torch.arange .*bound"),
        (lambda x: torch.logspace(0, 2, x.shape[0], dtype=torch.int64), "powers rounded to integers"),
        (lambda x: torch.arange(x.max()), "depends on the value"),
        (lambda x: F.one_hot(x.long()), "depends on"),
        (lambda x: x.new_zeros(x.shape, dtype=torch.float64), "float64"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 3)], max_batch_size=8)
