"""Weights made again of other parameters are those of a network that is lowered anew, or the parameter is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt.conversion.structure_keys import structure_key
from torch2rt.lowering import lower_with_values
from torch2rt.passes.order import chosen, run
from torch2rt.recipes.replay import Unreplayable
from torch2rt.recipes.tape import Tape
from torch2rt.recipes.tensors import inner_tensors, named_tensors
from torch2rt.tracing.trace import trace

Seq = nn.Sequential


def network_of(module, inputs, **ranges):
    tape = Tape(module)
    with tape.recording():
        graph = run(trace(module, inputs, **ranges), chosen(None, "float32"))
        network = lower_with_values(graph, passes=[], tape=tape)[0]
    network.structure = structure_key(graph, tape, network)
    return network


class Module(nn.Module):
    """A module of some tensors, by name, and a function of itself and its inputs."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
            elif name.startswith("plain"):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


def param(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape).to(dtype))


def scaled_by_python(self, x):
    return x * self.scale.item() + self.bias


def chosen_by_value(self, x):
    return x @ self.weight if bool(self.weight.sum() > 0) else x @ self.weight * 2


def written(self, x):
    table = torch.zeros(4, 3)
    table[:, 1] = self.bias
    table[2:] *= self.scale
    return x @ table.t()


def of_numpy(self, x):
    return x * torch.from_numpy(self.scale.detach().numpy() * 2)


def of_list(self, x):
    return x * torch.tensor(self.scale.tolist())


def spectral(self, x):
    u, s, v = torch.linalg.svd(self.weight)
    return x @ (u * s / s.max()) @ v


def stretched(self, x):
    return x @ self.weight.expand(3, 3) + self.weight.view(-1)[0] + self.scale.t()


def nonzero_of(self, x):
    return x[:, self.mask.nonzero().flatten()]


def computed_sizes(self, x):
    return torch.cat([x[:, : int(self.count)], self.bias.expand(x.shape[0], 3)], 1)


def aliased(self, x):
    half = self.weight[:2]
    return F.linear(x, half) + F.linear(x, self.weight.flatten()[:6].view(2, 3).flip(0))


# name: module, inputs, the parameters that may not be refitted, ranges
CASES = {
    "conv-bn": (Seq(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), [(2, 3, 5, 6)], ""),
    "bn-before": (Seq(nn.BatchNorm1d(3), nn.Linear(3, 5)), [(2, 3)], ""),
    "deconv-bn": (Seq(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), [(2, 4, 5, 6)], ""),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2, stride=2), [(2, 4, 9)], ""),
    "linear": (Seq(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2, bias=False)), [(2, 3)], ""),
    "bilinear": (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], ""),
    "lstm": (nn.LSTM(3, 5, 2, bidirectional=True), [(4, 2, 3)], ""),
    "gru": (nn.GRU(3, 4), [(4, 2, 3)], ""),
    "attention": (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), [(2, 4, 8)], ""),
    "norms": (Seq(nn.LayerNorm(6), nn.GroupNorm(3, 6), nn.InstanceNorm1d(6, affine=True)), [(2, 6, 6)], ""),
    "prelu": (Seq(nn.PReLU(3), nn.Linear(3, 3)), [(2, 3)], ""),
    "embedding": (Module(lambda s, x: s.e(x).sum(1) @ s.w, e=nn.Embedding(7, 3), w=param(3, 2)), "ints", ""),
    "weight-norm": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), [(2, 3)], ""),
    "half": (
        Module(lambda s, x: x.half() @ s.w + s.b.half(), w=param(3, 4, dtype=torch.half), b=param(4)),
        [(2, 3)],
        "",
    ),
    "item": (Module(scaled_by_python, scale=param(), bias=param(3)), [(2, 3)], "scale"),
    "chosen": (Module(chosen_by_value, weight=nn.Parameter(torch.ones(3, 2))), [(2, 3)], ""),
    "written": (Module(written, bias=param(4), scale=param(3)), [(2, 3)], ""),
    "numpy": (Module(of_numpy, scale=param(3)), [(2, 3)], "scale"),
    "tolist": (Module(of_list, scale=param(3)), [(2, 3)], "scale"),
    "svd": (Module(spectral, weight=param(3, 3)), [(2, 3)], ""),
    "views": (Module(stretched, weight=param(1, 3), scale=param(3, 2)), [(2, 3)], "weight"),
    "nonzero": (Module(nonzero_of, mask=torch.tensor([True, False, True])), [(2, 3)], "mask"),
    "sizes": (Module(computed_sizes, count=torch.tensor(2), bias=param(1)), [(2, 3)], "count"),
    "alias": (Module(aliased, weight=param(4, 3)), [(2, 3)], ""),
    "plain": (Module(lambda s, x: x * s.plain_scale + s.bias, plain_scale=torch.randn(3), bias=param(3)), [(2, 3)], ""),
    "complex": (Module(lambda s, x: torch.view_as_real(x * (s.w * 1j).conj()), w=param(3)), [(2, 3)], ""),
    "dropout": (Module(lambda s, x: x * F.dropout(s.scale, 0.0, True), scale=param(3)), [(2, 3)], ""),
    "causal": (Module(lambda s, x: x + s.mask @ s.w, mask=torch.ones(3, 3).tril(), w=param(3, 3)), [(3, 3)], ""),
}


def twice(self, x):
    return F.conv1d(F.conv1d(x, self.weight), self.weight) + self.c(x)[..., 2:]


def other_values(tensor, seed):
    """Values that differ in each element, and are as good: positive where all are."""
    generator = torch.Generator().manual_seed(seed)
    if not tensor.is_floating_point():
        return ~tensor if tensor.dtype is torch.bool else (tensor - 1).abs()
    drawn = torch.rand(tensor.shape, generator=generator).to(tensor.dtype) + 0.5
    return tensor * drawn + (0.1 if tensor.dim() and bool((tensor >= 0).all()) else 0.01)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def check(module, inputs, refused="", **ranges):
    """Change each parameter and buffer in turn; returns those that a replay has named."""
    module.eval()
    network = network_of(module, inputs, **ranges)
    recipes, values = network.recipes, inner_tensors(named_tensors(module))
    recipes.check(values)
    assert not recipes.unsure
    named, before = set(), {name: value.detach().clone() for name, value in values.items()}
    for seed, (name, value) in enumerate(values.items()):
        with torch.no_grad():
            value.data.copy_(other_values(value.detach(), seed))
        fresh = network_of(module, inputs, **ranges)
        kept = {weight.number: weight.tensor for weight in network.weights.values()}
        try:
            kept |= recipes.replay(values, [name])
        except Unreplayable as error:
            assert set(error.names) <= set(values) and name in error.names
            named.add(name)
        else:
            assert fresh.structure is not None and fresh.structure == network.structure, name
            assert fresh.weights.keys() == network.weights.keys(), name
            for key, weight in network.weights.items():
                assert bits(kept[weight.number]) == bits(fresh.weights[key].tensor), (name, key)
        value.data.copy_(before[name])
    assert named == set(refused.split()), named


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_in_turn(name):
    module, shapes, refused = CASES[name]
    inputs = [torch.randint(7, (2, 3))] if shapes == "ints" else [torch.randn(*shape) for shape in shapes]
    check(copy.deepcopy(module), inputs, refused)


def test_one_tensor_of_several_layers_is_one_weight():
    module = Module(twice, weight=param(3, 3, 2), c=nn.Conv1d(3, 3, 1, bias=False))
    check(module, [torch.randn(2, 3, 8)])
    network = network_of(module, [torch.randn(2, 3, 8)])
    assert len(network.weights) == 3 and len(set(network.weight_names().values())) == 2
