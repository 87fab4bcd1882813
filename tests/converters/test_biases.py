"""Linear layers with a bias, an activation behind them, and what is done to that: TensorRT loses the bias of some."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import B, Data, With, case, check_case, parametrize
from harness.layers import kernels

from torch2rt import lower, trace
from torch2rt.backend.quirks import drops_bias_before_products
from torch2rt.backend.tensorrt import builds_without_gpu


def written_out(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def written_out_with_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(min=0),
    "gelu": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "erf": written_out,
    "written": written_out_with_tanh,
}
GATES = {
    "number": lambda y, x: y * 2.5,
    "input": lambda y, x: x + y * x.cos(),
    "gate": lambda y, x: y * F.linear(x, torch.linspace(-1, 1, 576, dtype=x.dtype, device=x.device).view(24, 24)),
    "square": lambda y, x: y**2,
    "mask": lambda y, x: y * (x > 0),
    "sum": lambda y, x: y * y.sum(-1, keepdim=True),
    "normalize": lambda y, x: F.normalize(y, dim=-1),
    "rms": lambda y, x: F.rms_norm(y, (24,)),
    "softmax": lambda y, x: (y * 3).softmax(-1),
    "dropout": lambda y, x: F.dropout(y, 0.5, False) * 0.5,
    "chunk": lambda y, x: torch.cat([y[..., :5] * y[..., 5:10], y[..., 10:]], -1),
}


def row(activation, gate, dtype=torch.float32, call=None):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 24).to(dtype)
    chosen = call or (lambda m, x: GATES[gate](ACTIVATIONS[activation](m(x)), x))
    near = 8e-3 if dtype is torch.float16 else None
    name = f"{activation}-{gate}-{str(dtype)[6:]}"
    return case(With(layer, chosen), [Data((B, 3, 24), dtype)], id=name, rtol=near, atol=near)


ROWS = [
    *(row(activation, "number") for activation in ACTIVATIONS),
    *(row("relu", gate) for gate in GATES),
    *(row("gelu", gate, torch.float16) for gate in ("number", "input", "gate", "mask")),
    row("relu", "halves", call=lambda m, x: (lambda y: F.relu(y[..., :12]) * y[..., 12:])(m(x))),
    row("relu", "addmm", call=lambda m, x: F.relu(torch.addmm(m.bias, x.flatten(0, 1), m.weight)) * 2),
    row("gelu", "batches", call=lambda m, x: F.gelu(x @ m.weight.expand(x.shape[0], 24, 24) + m.bias) * x),
]


@parametrize(ROWS)
def test_biases_before_gates(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.skipif(not builds_without_gpu(), reason="this TensorRT builds with a GPU only")
@pytest.mark.skipif(not drops_bias_before_products(), reason="this TensorRT is not asked for it")
def test_no_kernel_leaves_out_the_bias():
    """The kernel that loses it is a product alone, with all the rest but the last product left out of its name."""

    def made(call):
        module = With(torch.nn.Linear(64, 64), call).eval()
        return [kernel.name.removeprefix("__myl_").split("_myl")[0] for kernel in kernels(lower(trace(module, [x])))]

    x = torch.randn(4, 64)
    for name, activation in ACTIVATIONS.items():
        assert "Fc" not in made(lambda m, x, of=activation: of(m(x)) * x), name


def test_only_what_may_be_multiplied_pays_for_it():
    def subtractions(call):
        network = lower(trace(With(torch.nn.Linear(8, 8), call).eval(), [torch.randn(3, 8)]))
        layers = (network.definition.get_layer(i) for i in range(network.num_layers))
        return sum(layer.type.name == "ELEMENTWISE" for layer in layers)

    some = int(drops_bias_before_products())
    assert subtractions(lambda m, x: m(F.relu(m(x)))) == 2
    assert subtractions(lambda m, x: m(F.dropout(F.gelu(m(x)), 0.1, False))) == 2
    assert subtractions(lambda m, x: F.relu(m(x))) == 1
    assert subtractions(lambda m, x: F.relu(m(x)).t()) == 1 + some
    assert subtractions(lambda m, x: F.relu(m(x)) + x) == 2 + some
    assert subtractions(lambda m, x: F.relu(F.linear(x, m.weight))) == 0
    assert subtractions(lambda m, x: F.relu(x + 1) * 2) == 2
    assert subtractions(lambda m, x: torch.tanh(m(x)) * 2) == 2
    assert subtractions(lambda m, x: torch.tanh(m(x) * 3) + 1) == 3 + some
