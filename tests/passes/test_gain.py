"""Which products are not quantised because they are no faster: by their sizes, and as plans and reports say it."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import TraceError, passes, plan, torch2rt, trace
from torch2rt.backend.quirks import builds_int8_convolutions
from torch2rt.passes.order import run
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.gain import slower


class Call(nn.Module):
    def __init__(self, call, *sizes):
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)

    def forward(self, *inputs):
        return self.call(*inputs, *self.weights)


FEW, ROW, SMALL = "are fewer than the 16", "is multiplied without tensor cores", "is too small for int8 to save time"
X = torch.randn(512, 768)
# A product, its inputs and options, and why it is no faster.
ROWS = {
    "large": (Call(F.linear, (3072, 768)), X, {}, None),
    "few inputs": (Call(F.linear, (3072, 12)), torch.randn(512, 12), {}, f"its 12 inputs {FEW}"),
    "few outputs": (Call(F.linear, (10, 768)), X, {}, f"its 10 outputs {FEW}"),
    "few outputs of mm": (Call(torch.mm, (768, 10)), X, {}, f"its 10 outputs {FEW}"),
    "few inputs of matmul": (Call(torch.matmul, (12, 768)), torch.randn(2, 256, 12), {}, f"its 12 inputs {FEW}"),
    "one row": (Call(F.linear, (4096, 4096)), torch.randn(1, 4096), {}, f"one row {ROW}"),
    "a vector": (Call(torch.matmul, (4096, 4096)), torch.randn(4096), {}, f"one row {ROW}"),
    "few rows of a large weight": (Call(F.linear, (4096, 4096)), torch.randn(4, 4096), {}, None),
    "few rows of a small weight": (Call(F.linear, (256, 256)), torch.randn(4, 256), {}, SMALL),
    "many rows of a small weight": (Call(F.linear, (1024, 64)), torch.randn(8192, 64), {}, SMALL),
    "two rows of a weight that is just large": (Call(F.linear, (256, 1024)), torch.randn(2, 1024), {}, None),
    "tuned for one row": (Call(F.linear, (3072, 768)), X[:1], {"max_batch_size": 512}, f"one row {ROW}"),
    "tuned for many rows": (Call(F.linear, (3072, 768)), X, {"max_batch_size": 512}, None),
    "image": (Call(F.conv2d, (64, 3, 7, 7)), torch.randn(2, 3, 32, 32), {}, f"its 3 input channels {FEW}"),
    "few maps": (Call(F.conv2d, (9, 64, 1, 1)), torch.randn(2, 64, 8, 8), {}, f"its 9 output channels {FEW}"),
    "maps": (Call(F.conv2d, (32, 64, 3, 3)), torch.randn(2, 64, 8, 8), {}, None),
    "one place": (Call(F.conv2d, (32, 64, 1, 1)), torch.randn(1, 64, 1, 1), {}, f"one place {ROW}"),
    "places of a batch": (Call(F.conv2d, (32, 64, 1, 1)), torch.randn(3, 64, 1, 1), {}, None),
    "each channel": (Call(lambda x, w: F.conv2d(x, w, groups=32), (32, 1, 3, 3)), torch.randn(2, 32, 8, 8), {}, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_products(name):
    model, x, options, why = ROWS[name]
    if "conv" in str(trace(model, [x]).graph) and not builds_int8_convolutions():
        pytest.skip("this TensorRT has no int8 convolutions")
    graph = run(trace(model, [x], **options), passes.default())
    found = list(slower(graph, FORMATS["int8"], torch.float16).values())
    assert [why] == [None] if not found else why is not None and why in found[0]
    assert slower(graph, FORMATS["int8_weights"], torch.float16) == {}


def test_beside_what_it_saves():
    """Beside products in float32 small ones are faster."""
    graph = run(trace(Call(F.linear, (256, 256)), [torch.randn(64, 256)]), passes.default())
    assert len(slower(graph, FORMATS["fp8"], torch.float16)) == 1
    assert not slower(graph, FORMATS["fp8"], torch.float32)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 2048), nn.Linear(2048, 512), nn.Linear(512, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


INPUT = torch.randn(64, 12)
ASKED = {
    "by default": (dict(), {"second"}),
    "all": (dict(quantize_all=True), {"first", "second", "head"}),
    "forced": (dict(force_low=["first"]), {"first", "second"}),
    "forced class": (dict(force_low=[nn.Linear]), {"first", "second", "head"}),
    "kept": (dict(quantize_all=True, keep_fp32=["head"], keep_float="second"), {"first"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for(name):
    options, quantised = ASKED[name]
    options = dict(precision="int8", calibration=[INPUT], calibration_method="minmax", **options)
    found = plan(Layers().eval(), [INPUT], **options).precision
    assert {row.module for row in found.rows if row.dtype == "int8"} == quantised
    if name == "by default":
        text = "head: no faster in int8, and not quantised: its 5 outputs are fewer than the 16"
        assert any(text in change and "quantize_all=True asks for it" in change for change in found.changes)
        assert re.search(
            r"\nhead +1 float16 +torch.nn.functional.linear \(not quantised: its 5 outputs are", str(found)
        )


class Branches(nn.Module):
    """A module of two paths, by its batch, of which one has a product that is no faster."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.small, self.large = nn.Linear(2048, 512), nn.Linear(512, 5), nn.Linear(512, 256)

    def forward(self, x):
        y = self.first(x)
        return self.large(y).cumsum(0) if x.shape[0] > 2 else self.small(y).cumsum(0)


def test_plans_of_several_engines():
    x = torch.randn(64, 2048)
    options = dict(precision="int8", calibration=[x, x[:2]], calibration_method="minmax", max_batch_size=64)
    found = plan(Branches().eval(), [x], **options)
    assert len(found.segments) > 1
    assert all(re.match(r"engine \d of \d, segment 0: TensorRT", segment.text) for segment in found.segments)
    rows = {(row.module, row.dtype) for row in found.precision.rows}
    assert {("first", "int8"), ("first", "float16"), ("large", "float16"), ("small", "float16")} <= rows
    with pytest.raises(TraceError, match="the module only does the same for every size if"):
        plan(Branches().eval(), [x], max_batch_size=64, torch_executed=["first"])


def test_a_search_leaves_them_out():
    """`precision="auto"` does not try to quantise them, and smoothing leaves their inputs as they are."""
    options = dict(precision="auto", calibration=[INPUT], calibration_method="minmax", tolerance=0.5)
    found = plan(Layers().eval(), [INPUT], **options).precision
    assert [search.count for search in found.searches][-1] == 1
    model_trt = torch2rt(Layers().eval(), [INPUT], precision="int8", calibration=[INPUT], smooth_quant=0.5)
    kinds = [kind for _, kind in model_trt._networks[0].facts()["layers"]]
    assert kinds.count("QUANTIZE") == 1
    expected = Layers()(INPUT)
    assert (model_trt.reference()(INPUT) - expected).norm() < 0.05 * expected.norm()
