"""The two products of an attention in int8 and fp8: which become one kernel, and what is named otherwise."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from harness.layers import kernels
from torch import nn

from torch2rt import InputError, lower, passes, torch2rt, trace
from torch2rt.backend.tensorrt import IS_RTX
from torch2rt.graph import check_graph
from torch2rt.passes.options import Precision
from torch2rt.passes.order import run
from torch2rt.passes.quantization.quantized import attention_of_quantized, probabilities_of
from torch2rt.precision_plan import plan_precision


class Attention(nn.Module):
    def __init__(self, width=32, heads=2, mask=None, causal=False, scale=None, last=True):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.mask, self.causal, self.scale = heads, mask, causal, scale
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 24) if last else nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x * 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = self.mask.to(x.device) if isinstance(self.mask, torch.Tensor) else self.mask and self.mask(x)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


BOOLS = torch.arange(33) % 4 > 0
MODULES = {
    "plain": Attention(),
    "masked": Attention(mask=BOOLS.expand(3, 1, 33, 33)),
    "added": Attention(mask=BOOLS.float().log().clamp(min=-50.0) + torch.arange(33.0)[:, None] % 3),
    "hides all": Attention(mask=lambda x: (x[:, None, :, :1] > 0) & (x[:, None, None, :, 0] > 0)),
    "causal, scaled": Attention(causal=True, scale=0.7),
}


def made(module, x, precision, **options):
    graph = run(trace(module.eval(), [x]), passes.default())
    asked = Precision(precision, calibration=[x, -x], calibration_method="minmax", quantize_all=True, **options)
    return run(graph, asked.passes(dict(module.named_modules()), lambda graph: [[x]]))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", MODULES)
def test_products_of_an_attention(name, precision):
    torch.manual_seed(1)
    module, x = MODULES[name], torch.randn(3, 33, 32)
    graph = made(module, x, precision, quantize_attention=True)
    check_graph(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=attention_of_quantized)
    assert node.meta["precision"] == precision and 0.05 < node.kwargs["largest"] <= 1
    expected, plain = module(x), made(module, x, precision)(x)[0]
    error, without = ((y - expected).norm() / expected.norm() for y in (graph(x)[0], plain))
    assert 1e-3 < without < error < (0.05 if precision == "int8" else 0.12)
    network = lower(graph, passes=[])
    if IS_RTX:
        kind = {"int8": "Int8", "fp8": "FP8"}[precision]
        (kernel,) = (k for k in kernels(network) if "mha" in k.name)
        assert kernel.inputs.count(kind) == 3 and kernel.outputs == [kind]


def test_converted(device):
    torch.manual_seed(1)
    module, x = Attention().eval().to(device), torch.randn(3, 13, 32, device=device)
    model_trt = torch2rt(module, [x], precision="int8", calibration=[x], quantize_attention=True, quantize_all=True)
    assert model_trt.report.verified
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), module(x), 0.05, 0.05)


NAMED = {
    "heads of 20 features": (Attention(width=40), {}, "int8 kernel for 13 tokens and heads of 20 features"),
    "one head": (Attention(heads=1), {}, "a kernel for two heads and more"),
    "no product behind": (Attention(last=False), {}, "its result goes to no quantised product"),
    "a float product behind": (Attention(), {"keep_float": ["out"]}, "its result goes to no quantised product"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_stays_is_named(name):
    module, options, why = NAMED[name]
    x = torch.randn(3, 13, module.qkv.in_features)
    graph = made(module, x, "int8", quantize_attention=True, **options)
    assert not graph.graph.find_nodes(op="call_function", target=attention_of_quantized)
    (text,) = graph.meta["torch2rt"].assumptions
    assert "scaled_dot_product_attention" in text and why in text


def test_plans_name_attentions():
    plan = plan_precision(Attention(), [torch.randn(3, 13, 32)], precision="fp8", calibration=[torch.randn(3, 13, 32)])
    (row,) = (row for row in plan.rows if "attention" in row.function)
    assert row.dtype == "float16" and row.reason == "not quantised: quantize_attention is not asked for"


def test_saturated_probabilities():
    """Those above the largest of the calibration are taken for it."""
    x = torch.eye(2)[None, None] * 20
    assert probabilities_of(x, x).amax() > 0.99
    y = attention_of_quantized(x, x, x, largest=0.5)
    torch.testing.assert_close(y, x * 0.5, rtol=1e-3, atol=1e-3)


class Cast(Attention):
    """Under autocast torch's own operators are traced, which rest on how the result lies in memory."""

    def forward(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_result_lies_in_memory_as_it_did(precision):
    module, x = Cast().eval(), torch.randn(3, 13, 32)
    options = dict(calibration=[x], quantize_attention=True, quantize_all=True)
    model_trt = torch2rt(module, [x], precision=precision, max_batch_size=4, **options)
    found, expected = model_trt.reference()(x).float(), module(x).float()
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_refused():
    module, x = Attention(), torch.randn(3, 13, 32)
    with pytest.raises(InputError, match="quantize_attention is for int8 and fp8; precision='fp16' has none"):
        torch2rt(module, [x], precision="fp16", quantize_attention=True)
    with pytest.raises(InputError, match="quantize_attention looks at probabilities"):
        torch2rt(module, [x], precision="int8", calibration=[x], calibration_cache="x.json", quantize_attention=True)
