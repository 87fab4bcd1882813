"""Calls that become part of others before they are lowered."""

import copy

import pytest
import torch
from harness import B, Call, S, bools, case, check_case, parametrize
from test_tracing import module
from torch import nn
from torch.nn import functional as F

from torch2rt import lower, trace
from torch2rt.backend.quirks import fuses_attention
from torch2rt.backend.tensorrt import trt


def normed(product, features, norm, **options):
    """A product and a batch normalization with statistics and parameters that matter."""
    torch.manual_seed(0)
    norm = norm(features, **options)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        if tensor is not None:
            tensor.data.normal_()
    norm.running_var.data.uniform_(0.5, 2)
    return nn.Sequential(product, norm).eval()


def kinds(model, *inputs):
    definition = lower(trace(model, list(inputs))).definition
    return [definition.get_layer(i).type for i in range(definition.num_layers)]


PRODUCTS = {
    "conv1d": (normed(nn.Conv1d(3, 5, 3, stride=2), 5, nn.BatchNorm1d), (3, 11)),
    "conv2d": (normed(nn.Conv2d(3, 6, (3, 2), padding=1, bias=False), 6, nn.BatchNorm2d, eps=0.1), (3, 7, 5)),
    "grouped": (normed(nn.Conv2d(4, 6, 3, groups=2), 6, nn.BatchNorm2d, affine=False), (4, 7, 5)),
    "depthwise": (normed(nn.Conv2d(4, 8, 3, groups=4, padding="same"), 8, nn.BatchNorm2d), (4, 7, 5)),
    "conv3d": (normed(nn.Conv3d(2, 3, 2), 3, nn.BatchNorm3d), (2, 4, 3, 5)),
    "transposed": (normed(nn.ConvTranspose2d(3, 4, 3, stride=2), 4, nn.BatchNorm2d), (3, 4, 5)),
    "grouped and transposed": (normed(nn.ConvTranspose2d(6, 4, 3, groups=2), 4, nn.BatchNorm2d), (6, 4, 5)),
    "linear": (normed(nn.Linear(3, 5), 5, nn.BatchNorm1d), (3,)),
}
CASES = [case(model, [(B, *size)], id=name) for name, (model, size) in PRODUCTS.items()]


@parametrize(CASES)
def test_products(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_normalization_becomes_part_of_the_product_before(name, dtype):
    model, size = PRODUCTS[name]
    model, x = copy.deepcopy(model).to("cpu", dtype), torch.randn(2, *size, dtype=dtype)
    assert kinds(model, x) == kinds(model[0], x)


def test_the_users_graph_and_module_stay_as_they_were():
    model, size = PRODUCTS["conv2d"]
    model = copy.deepcopy(model).cpu()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, [torch.randn(2, *size)])
    before = [(node.op, str(node.target), str(node.args)) for node in graph.graph.nodes]
    for _ in range(2):
        assert lower(graph).num_layers == 1
    assert [(node.op, str(node.target), str(node.args)) for node in graph.graph.nodes] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def norm(self, x, mean=None, var=None):
    mean, var = self.mean if mean is None else mean, self.var if var is None else var
    return torch.batch_norm(x, self.scale, self.shift, mean, var, False, 0.1, 1e-5, False)


def both(self, x):
    y = torch.conv2d(x, self.weight)
    return y, norm(self, y)


def computed_bias(self, x):
    return norm(self, torch.conv2d(x, self.weight, x.sum((0, 2, 3))[:1].expand(4)))


APART = {
    "also used": lambda self, x: (lambda y: norm(self, y) + y)(torch.conv2d(x, self.weight)),
    "also returned": both,
    "computed bias": computed_bias,
    "computed weight": lambda self, x: norm(self, torch.conv2d(x[:1], self.weight + x[0, 0, 0, 0])),
    "computed statistics": lambda self, x: norm(self, torch.conv2d(x, self.weight), var=x.abs().amax().expand(4)),
    "by its own statistics": lambda self, x: torch.batch_norm(
        torch.conv2d(x, self.weight), self.scale, self.shift, None, None, True, 0.1, 1e-5, False
    ),
    "features are not the channels": lambda self, x: norm(self, F.linear(x.flatten(2)[:, [0, 1, 2, 0]], self.flat)),
    "of an input": lambda self, x: norm(self, x[:, [0, 1, 2, 0]]),
}
VALUES = dict(
    weight=torch.randn(4, 3, 1, 1),
    flat=torch.randn(4, 15),
    mean=torch.randn(4),
    var=torch.rand(4) + 0.5,
    scale=torch.randn(4),
    shift=torch.randn(4),
)


@parametrize([case(module(function, **VALUES), [(B, 3, 3, 5)], id=name) for name, function in APART.items()])
def test_left_alone(row, mode, device):
    check_case(row, mode, device)


def test_not_without_a_batch_where_the_channels_are_those_of_nothing_else(device):
    """Without a batch, the second dimension is the length: here there are as many places as channels."""
    model = normed(nn.Conv1d(3, 5, 2), 5, nn.BatchNorm1d)
    check_case(case(model, [(3, 6)]), "static", device)


@pytest.mark.parametrize(
    ("dtype", "variance", "apart"),
    [
        (torch.float16, 1e-12, True),
        (torch.float16, 1e12, True),
        (torch.float16, 1e-4, False),
        (torch.bfloat16, 1e12, False),
        (torch.float32, 1e-12, False),
    ],
)
def test_not_where_the_type_cannot_hold_the_weights(dtype, variance, apart):
    """What the product's type would lose, or not hold at all, stays in a layer of its own."""
    conv, norm = normed(nn.Conv2d(3, 4, 1), 4, nn.BatchNorm2d, eps=1e-30)
    norm.running_var.fill_(variance)
    made = kinds(nn.Sequential(conv.to(dtype), norm), torch.randn(2, 3, 5, 7, dtype=dtype))
    assert (trt.LayerType.SCALE in made) == apart


@pytest.mark.parametrize(("features", "apart"), [(32, False), (1024, True)])
def test_large_pointwise_convolutions_in_a_row_stay_two(features, apart):
    """Their kernels' product would take the builder longer than everything else."""
    first = normed(nn.Conv2d(features, 128, 1, bias=False), 128, nn.BatchNorm2d)
    made = kinds(nn.Sequential(first, nn.Conv2d(128, features, 1)), torch.randn(1, features, 3, 5))
    assert (trt.LayerType.SCALE in made) == apart


class Attention(nn.Module):
    """Queries, keys and values as separate products, the keys without a bias."""

    def __init__(self, heads=2, keys=2, split=lambda x, h: x.view(*x.shape[:-1], h, -1).transpose(1, 2), more=None):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(6, 3 * heads), nn.Linear(6, 3 * keys, bias=False), nn.Linear(6, 3 * keys)
        self.heads, self.keys, self.split, self.more = heads, keys, split, more

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        extra = 0 if self.more is None else self.more(q)
        q, k, v = self.split(q, self.heads), self.split(k, self.keys), self.split(v, self.keys)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.keys != self.heads) + extra


ATTENTIONS = {  # and how many products with weights there are
    "view and transpose": (Attention(), 1),
    "reshape and permute": (
        Attention(split=lambda x, h: torch.reshape(x, (*x.shape[:2], h, 3)).permute(0, -2, 1, 3)),
        1,
    ),
    "unflatten": (Attention(split=lambda x, h: x.unflatten(-1, (h, 3)).transpose(-2, -3)), 1),
    "fewer keys": (Attention(heads=4), 2),
    "the queries are also used": (Attention(more=lambda q: q.mean()), 2),
    "another order": (Attention(split=lambda x, h: x.view(*x.shape[:-1], -1, h).transpose(1, 2)), 1),
    "tokens and heads not exchanged": (Attention(split=lambda x, h: x.view(*x.shape[:-1], h, -1).transpose(1, 3)), 3),
    "tokens and heads mixed": (Attention(split=lambda x, h: x.view(x.shape[0], h, -1, 3)), 3),
}


@parametrize([case(model, [(B, S, 6)], id=name) for name, (model, _) in ATTENTIONS.items()])
def test_heads(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_products_with_one_input_are_one(name):
    model, count = ATTENTIONS[name]
    definition = lower(trace(copy.deepcopy(model).cpu(), [torch.randn(2, 5, 6)], max_batch_size=3)).definition
    layers = [definition.get_layer(i) for i in range(definition.num_layers)]
    weighted = [
        layer
        for layer in layers
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and tuple(layer.get_input(1).shape)[-1] == 6
    ]
    assert len(weighted) == count


def masked(mask):
    """An attention to keys that a mask of (batch, keys) chooses; the second sample sees none."""

    def attend(q, v, seen):
        first = torch.arange(seen.shape[0], device=seen.device) != 1
        return F.scaled_dot_product_attention(q, v, v, mask(seen & first[:, None], q))

    return attend


def everywhere(seen, q):
    true = torch.ones(1, 1, q.shape[2], seen.shape[1], dtype=torch.bool, device=seen.device)
    return (true & seen[:, None, None, :]).expand(-1, -1, q.shape[2], -1)


MASKS = {  # and whether the values are chosen among, rather than the results
    "a row": (lambda seen, q: seen[:, None, None], True),
    "expanded": (lambda seen, q: seen[:, None, None].expand(-1, 1, q.shape[2], -1), True),
    "and true": (everywhere, True),
    "for each head": (lambda seen, q: seen[:, None, None].expand(-1, q.shape[1], -1, -1), True),
    "for each query": (lambda seen, q: seen[:, None, None] & (q[..., :1] > 0), False),
    "to be added": (lambda seen, q: torch.where(seen, 0.0, -torch.inf)[:, None, None], False),
}
ROWS = [case(masked(mask), [(B, 2, 5, 4), (B, 2, 3, 4), bools(B, 3)], id=name) for name, (mask, _) in MASKS.items()]


@parametrize(ROWS)
def test_masks(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_zeros_come_from_the_values(row):
    inputs = [torch.randn(2, 2, 5, 4), torch.randn(2, 2, 3, 4), torch.ones(2, 3, dtype=torch.bool)]
    definition = lower(trace(Call(row.function), inputs)).definition
    layers = [definition.get_layer(i) for i in range(definition.num_layers)]
    selects = [tuple(layer.get_output(0).shape) for layer in layers if layer.type == trt.LayerType.SELECT]
    if fuses_attention():
        assert ((2, 2, 5, 4) in selects, (2, 2, 3, 4) in selects) == (not MASKS[row.id][1], MASKS[row.id][1])


@pytest.mark.parametrize(
    ("weights", "scale", "folds"),
    [(1.0, 1.0, True), (1.0, 0.0, True), (1e20, 1e30, False), (1.0, 1e-42, False), (1e-30, 1e-12, False)],
)
def test_not_where_the_product_is_too_large_or_too_small(weights, scale, folds):
    model = normed(nn.Conv2d(3, 6, 3), 6, nn.BatchNorm2d)
    model[0].weight.data.mul_(weights)
    model[1].weight.data.fill_(scale)
    assert (len(kinds(model, torch.randn(2, 3, 5, 4))) == 1) == folds


def test_folded_weights_are_off_by_a_rounding_or_two():
    model = normed(nn.Conv2d(30, 60, 3), 60, nn.BatchNorm2d)
    network = lower(trace(model, [torch.randn(2, 30, 5, 4)]))
    norm, before = model[1], model[0].weight.detach().double()
    exact = before * (norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()).reshape(-1, 1, 1, 1)
    folded = network.weights["0.conv2d:kernel"].tensor
    assert not folded.requires_grad and folded.grad_fn is None
    assert ((folded - exact) / exact).abs().max() < 2 * torch.finfo(torch.float32).eps
