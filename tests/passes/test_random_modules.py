"""Random modules with values up to 1e6 in narrow types and int8: finite, and right or kept in a wider type."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import passes, trace
from torch2rt.graph import check_graph
from torch2rt.passes.options import Precision
from torch2rt.passes.order import run
from torch2rt.passes.search import _Outputs

WIDTH = 16


class Step(nn.Module):
    """A call, whose weights or factor are of any size."""

    def __init__(self, kind, factor):
        super().__init__()
        self.kind, self.factor = kind, factor
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.conv, self.qkv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, 3 * WIDTH)
        for layer in (self.linear, self.norm, self.conv):
            layer.weight.data *= factor

    def forward(self, x):
        return STEPS[self.kind](self, x)


def outlier(step, x):
    y = x.clone()
    y[..., 0] = y[..., 0] * 1e4
    return step.linear(y)


def attention(step, x):
    q, k, v = step.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


STEPS = {
    "linear": lambda step, x: step.linear(x),
    "conv": lambda step, x: step.conv(x.mT).mT,
    "norm": lambda step, x: step.norm(x),
    "softmax": lambda step, x: x.softmax(-1),
    "exp": lambda step, x: x.clamp(max=10).exp(),
    "pow": lambda step, x: x**2,
    "factor": lambda step, x: x * step.factor,
    "gelu": lambda step, x: F.gelu(x),
    "rms": lambda step, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "residual": lambda step, x: x + step.linear(x),
    "negative": lambda step, x: -x.abs() - 1,
    "constant": lambda step, x: step.linear(x * 0 + 3.0),
    "zero": lambda step, x: x + step.linear(x * 0),
    "outlier": outlier,
    "attention": attention,
}
FACTORS = (1, 1, 1, 10, 1e3, 1e6, 1e-3, 1e-6)
LIMITS = {"fp16": 0.05, "bf16": 0.2, "int8": 0.7, "auto": 0.01}


@functools.cache
def traced(seed):
    """A module, samples of its inputs, and its graph, of a dynamic batch or a static one."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    steps = [Step(draw.choice([*STEPS]), draw.choice(FACTORS)) for _ in range(draw.randint(2, 5))]
    model, scale = nn.Sequential(*steps).eval(), draw.choice((1, 100, 1e4, 1e6, 1e-4))
    samples = [torch.randn(3, 5, WIDTH) * scale for _ in range(2)]
    sizes = {"max_batch_size": 4} if seed % 2 else {}
    return model, samples, run(trace(model, samples[:1], **sizes), passes.default())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", LIMITS)
def test_random_modules(precision, seed):
    model, samples, graph = traced(seed)
    options = {"samples": samples, "tolerance": LIMITS["auto"] if precision == "auto" else None}
    if precision == "int8":
        options = {"calibration": samples, "calibration_method": "minmax", "quantize_all": True}
    made = Precision(precision, **options).passes(dict(model.named_modules()), lambda graph: [samples[:1]])
    graph = run(graph, made)
    check_graph(graph)
    running = _Outputs(graph, torch.device("cpu"))
    for x in samples:
        expected, (found,) = model(x), running.call([x])
        assert expected.isfinite().all() and found.isfinite().all()
        assert (found - expected).norm() <= LIMITS[precision] * expected.norm()
