import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import UnsupportedError, torch2rt

aten = torch.ops.aten


def bfloat16(*shape):
    return Data(shape, torch.bfloat16)


SMOOTH = [
    F.relu,
    torch.relu,
    torch.Tensor.relu,
    F.sigmoid,
    torch.sigmoid,
    torch.Tensor.sigmoid,
    torch.special.expit,
    F.tanh,
    torch.tanh,
    torch.Tensor.tanh,
    F.leaky_relu,
    F.elu,
    F.celu,
    F.selu,
    F.gelu,
    F.silu,
    F.mish,
    F.softplus,
    F.softsign,
    F.hardtanh,
    F.hardsigmoid,
    F.hardswish,
    F.relu6,
    F.logsigmoid,
    F.hardshrink,
    F.softshrink,
    F.tanhshrink,
    F.rrelu,
]
CASES = [
    *[case(f, [(B, 3, S)]) for f in SMOOTH],
    *[case(f, [half(B, 5)], modes=("static",)) for f in SMOOTH],
    *[case(f, [bfloat16(2, 5)], modes=("static",)) for f in SMOOTH],
    *[case(f, [floats(B, 4, low=-120, high=120)]) for f in (F.softplus, F.logsigmoid, F.mish, F.elu, F.silu, F.gelu)],
    *[
        case(f, [floats(B, 64, low=-60, high=60, dtype=torch.float16)])
        for f in (F.softplus, F.logsigmoid, F.mish, F.silu)
    ],
    case(F.leaky_relu, [(B, 3, 5)], negative_slope=0.2),
    case(aten.rrelu_with_noise.default, [(B, 5), (B, 5)], 0.1, 0.4),
    case(lambda x, noise: aten.rrelu_with_noise_functional(x, noise, 0.1)[0], [(B, 5), (B, 5)], id="rrelu_and_noise"),
    case(lambda x: F.leaky_relu(x + 0.1, 0.2, True), [(B, 3, 5)], id="leaky_relu-inplace"),
    case(lambda x: F.relu(x * 1, inplace=True), [(B, 3)], id="relu-inplace"),
    case(lambda x: torch.relu_(x * 1) + x, [(B, 3)], id="relu_"),
    case(F.rrelu, [(B, 3, 5)], 0.1, 0.5),
    case(F.rrelu, [(B, 3, 5)], upper=0.5, training=False),
    case(F.elu, [(B, 3)], 0.5),
    case(F.elu, [(B, 3)], alpha=-0.5),
    case(F.celu, [(B, 3)], 0.5),
    case(lambda x: F.celu(x + 0.1, alpha=2.0, inplace=True), [(B, 3)], id="celu-inplace"),
    case(F.gelu, [(B, 3, 5)], approximate="tanh"),
    case(F.softplus, [(B, 3, 5)], 2.5),
    case(F.softplus, [(B, 3, 5)], beta=0.5, threshold=0.25),
    case(F.softplus, [floats(B, 5, low=-9, high=80)], 1.0, 60.0),
    case(F.softplus, [(B, 3, 5)], beta=-1.5),
    case(F.hardtanh, [(B, 3)], -0.5, 0.25),
    case(F.hardtanh, [ints(B, 3)], -2, 5),
    case(F.relu6, [floats(B, 3, low=-3, high=9)]),
    case(F.threshold, [(B, 3)], 0.1, 2.5),
    case(F.threshold, [ints(B, 3)], 1, value=-7),
    case(F.hardshrink, [(B, 3)], 1.1),
    case(F.softshrink, [(B, 3)], lambd=1.1),
    case(F.glu, [(B, 3, 8)]),
    case(F.glu, [(B, 4, S)], 1),
    case(F.glu, [(B, 3, S * 2)], dim=-1, modes=("static",)),  # torch itself needs an even size
    case(F.glu, [half(B, 6)]),
    case(F.prelu, [(B, 3, 5), (3,)]),
    case(F.prelu, [(B, 3, S, 2), (1,)]),
    case(F.prelu, [half(B, 3), half(3)]),
    case(lambda x: F.prelu(x, x.new_tensor([0.3])), [(S,)], id="prelu-1d"),
    case(lambda x: F.prelu(x.sum(), x.new_tensor(0.3)), [(B, 3)], id="prelu-0d"),
    case(torch.nn.PReLU(3), [(B, 3, 5)], id="PReLU"),
    case(lambda x: F.sigmoid(x.sum()), [(B, 3)], id="sigmoid-0d"),
    case(torch.sigmoid, [ints(B, 3)]),
    case(torch.tanh, [Data((B, 3), torch.bool)]),
    case(F.softsign, [ints(B, 3, dtype=torch.int32)]),
    case(F.relu, [ints(B, 3)]),
    case(F.relu, [ints(B, 3, dtype=torch.int32)]),
    case(F.relu, [ints(B, 3, dtype=torch.int8)]),
    case(
        torch.nn.Sequential(torch.nn.ReLU6(), torch.nn.SiLU(), torch.nn.Hardswish(True), torch.nn.Softmin(-1)),
        [(B, 3)],
        id="modules",
    ),
    case(aten.elu.default, [(B, 3)], 0.5, 2.0, 1.5, id="aten.elu"),
    case(aten.silu.default, [(B, 3)], id="aten.silu"),
    case(aten.hardtanh.default, [(B, 3)], -0.5, 0.25, id="aten.hardtanh"),
    case(aten.leaky_relu.default, [(B, 3)], 0.2, id="aten.leaky_relu"),
    case(aten.gelu.default, [(B, 3)], approximate="tanh", id="aten.gelu"),
    case(aten.softplus.default, [(B, 3)], 2.0, 10.0, id="aten.softplus"),
    case(aten._prelu_kernel.default, [(B, 3), (1, 3)], id="aten._prelu_kernel"),
    case(aten.log_sigmoid_forward.default, [(B, 3)], id="aten.log_sigmoid_forward"),
]


@parametrize(CASES)
def test_activation(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("function", [F.threshold, F.hardshrink, F.softshrink])
def test_special_values(function, device):
    args = (0.5, 2.0) if function is F.threshold else (0.5,)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.5], device=device)
    model_trt = torch2rt(Call(function, args), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x, *args))


ERRORS = [
    (lambda x: F.rrelu(x, training=True), "training=True draws random slopes; call .eval()"),
    (lambda x: F.celu(x, -1.0), "alpha=-1.0: only positive"),
    (lambda x: aten.elu(x, 1, 1, -1), "input_scale=-1 turns"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_refused(function, message):
    with pytest.raises(UnsupportedError, match=message):
        torch2rt(Call(function), [torch.randn(2, 3)])
