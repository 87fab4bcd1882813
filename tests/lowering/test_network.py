"""Which parameter each weight of a network came from, and what was done to it."""

import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import lower, trace
from torch2rt.network import COMPUTED, Origin, Origins
from torch2rt.runtime.module import ReferenceModule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.gate = nn.Parameter(torch.randn(1, 4))
        self.register_buffer("places", torch.arange(4))

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return F.linear(self.head(x) * self.gate.sigmoid() + self.places, self.head.weight.t())


def test_weights_know_their_parameters():
    module = Net().eval()
    network = lower(trace(module, [torch.randn(2, 3, 8, 8)]))
    assert {name: weight.origin for name, weight in network.weights.items()} == {
        "conv.conv2d:kernel": Origin("conv.weight", ("folded with batch norm",)),
        "conv.conv2d:bias": Origin("conv.bias", ("folded with batch norm",)),
        "head.linear:weights": Origin("head.weight"),
        "head.linear.2:weights": Origin("head.bias", ("reshaped",)),
        "mul:weights": COMPUTED,
        "add:weights": Origin("places", ("cast to float32", "reshaped")),
        "linear:weights": Origin("head.weight", ("transposed",)),
    }
    names = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    assert {weight.origin.parameter for weight in network.weights.values()} <= {*names, None}
    assert torch.equal(network.weights["head.linear:weights"].tensor, module.head.weight)


def test_a_bias_that_the_norm_adds_is_the_norms():
    module = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).eval()
    weights = lower(trace(module, [torch.randn(2, 3, 8, 8)])).weights
    assert weights["0.conv2d:bias"].origin == Origin("1.bias", ("folded with batch norm",))


def test_folded_twice():
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)).eval()
    weights = lower(trace(module, [torch.randn(2, 3, 8, 8)])).weights
    twice = ("folded with batch norm",) * 2
    assert {weight.origin for weight in weights.values()} == {Origin("0.weight", twice), Origin("0.bias", twice)}


def test_parameters_that_share_memory():
    """Those of a recurrent module do on a GPU."""
    memory, origins = torch.randn(20), Origins()
    first, second = memory[:12].view(3, 4), memory[12:].view(2, 4)
    origins.record(first, Origin("first"))
    origins.record(second, Origin("second"))
    assert [origins.of(x).parameter for x in (first.detach(), second.t(), first[2:], memory)] == [
        "first",
        "second",
        "first",
        None,
    ]


def test_every_weight_is_that_of_a_layer():
    network = lower(trace(Net().eval(), [torch.randn(2, 3, 8, 8)]))
    layers = [network.definition.get_layer(i).name for i in range(network.num_layers)]
    assert len(set(layers)) == len(layers)
    places = network.weights_by_layer()
    assert len(places) == len(network.weights)
    for (index, role), tensor in places.items():
        assert tensor is network.weights[f"{layers[index]}:{role}"].tensor


def test_a_constant_that_is_an_output():
    """Its layer is added last, under TensorRT's own name."""

    class Constant(nn.Module):
        def forward(self, x):
            return x + 1, torch.ones(3)

    network = lower(trace(Constant(), [torch.randn(2)]))
    assert sorted(tensor.numel() for tensor in network.weights_by_layer().values()) == [1, 3]


def test_views_are_told_from_copies():
    origins, weight = Origins(), torch.randn(3, 4)
    origins.record(weight, Origin("weight"))
    changes = {
        None: (weight, weight.detach()),
        "transposed": (weight.t(),),
        "reshaped": (weight.reshape(2, 6), weight[None]),
        "sliced": (weight[1:], weight[:, 0]),
        "expanded": (weight.expand(2, 3, 4),),
    }
    for change, views in changes.items():
        for view in views:
            assert origins.of(view) == Origin("weight", (change,) if change else ())
    assert origins.of(weight.view(torch.int32)[1]) == Origin("weight", ("viewed as int32",))
    assert origins.of(weight.clone()) == COMPUTED
    half = weight.half()
    origins.derive(half, weight, "cast to float16")
    assert origins.of(half.t()) == Origin("weight", ("cast to float16", "transposed"))


def test_a_result_without_elements_is_a_constant_whatever_the_call():
    """TensorRT ends the process with an arithmetic error at attention without heads."""

    class Attends(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x), x.sum(2)

    x = torch.randn(2, 0, 7, 8)
    attended, summed = ReferenceModule(lower(trace(Attends(), [x])))(x)
    assert attended.shape == (2, 0, 7, 8)
    assert summed.shape == (2, 0, 8)
    assert attended.dtype == summed.dtype == torch.float32
