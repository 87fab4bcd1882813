"""float16 and bfloat16 by a pass: the graph's types, what stays in float32 and why, and what TensorRT makes of it."""

import copy

import pytest
import torch
from harness import compare
from torch import nn
from torch.nn import functional as F

from torch2rt import InputError, lower, passes, torch2rt, trace
from torch2rt.graph import check_graph
from torch2rt.passes.order import run
from torch2rt.passes.precision import mixed_precision
from torch2rt.passes.precision_rules import CONVERSIONS, name_of
from torch2rt.passes.ranges import measure
from torch2rt.precision_plan import plan_precision as plan

HALF, BFLOAT = torch.float16, torch.bfloat16
HIDDEN = 24


class Block(nn.Module):
    """A block of a transformer: written-out norm, attention with a mask to add, a residual, and a gate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.position = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x, mask=None):
        x = self.qkv(x)[..., :HIDDEN] + self.position.expand(x.shape[0], -1, -1)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        if mask is not None:
            mask = (1 - mask[:, None, None]) * torch.finfo(torch.float32).min
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        scores = (q @ k.mT / 3).softmax(-1) @ v
        return x + self.down(F.gelu(self.up(self.norm(x)))), scores.amax(-1), x.argmax(-1)


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Hardswish()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


MODELS = {
    "convolutions": (convolutional(), [torch.randn(2, 3, 12, 10)]),
    "a transformer": (Block().eval(), [torch.randn(2, 5, HIDDEN), (torch.rand(2, 5) > 0.3).float()]),
    "recurrence": (nn.Sequential(nn.LSTM(3, 5, batch_first=True)), [torch.randn(2, 7, 3)]),
    "embedding": (nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4)), [torch.randint(0, 9, (2, 5))]),
    "encoder": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), [torch.randn(2, 5, 16)]),
}


class Checked(torch.fx.Interpreter):
    """A graph that is run, and every type held against what is recorded."""

    def run_node(self, node):
        value, recorded = super().run_node(node), node.meta.get("val")
        pairs = zip(value, recorded, strict=True) if isinstance(recorded, (tuple, list)) else [(value, recorded)]
        assert all(a.dtype is b.dtype for a, b in pairs if isinstance(b, torch.Tensor)), node.format_node()
        return value


def low_graph(model, inputs, low=HALF, **options):
    graph = run(trace(model, inputs, max_batch_size=4), passes.default())
    return graph, mixed_precision(graph, low, **options)


def casts(graph):
    return [n for n in graph.graph.nodes if n.op == "call_function" and name_of(n.target) in CONVERSIONS]


@pytest.mark.parametrize("low", [HALF, BFLOAT])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_in_low_precision_is_whole(name, low):
    model, inputs = MODELS[name]
    graph, made = low_graph(model, inputs, low)
    before = str(graph.graph)
    check_graph(made)
    check_graph(copy.deepcopy(made))
    assert str(graph.graph) == before
    with torch.no_grad():
        results = Checked(made).run(*inputs)
        for ours, theirs in zip(results, graph(*inputs), strict=True):
            assert ours.dtype is theirs.dtype
            if ours.is_floating_point():
                torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 if low is HALF else 0.1)
    for node in casts(made):
        assert not any(user in casts(made) for user in node.users), "a cast of a cast"
    made_of = [n.meta["made_of"].parameter for n in made.graph.find_nodes(op="get_attr") if "made_of" in n.meta]
    assert len(made_of) == len(set(made_of)) or name == "convolutions", "a weight is cast once"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_conversions(name, precision, device):
    model, inputs = MODELS[name]
    model, inputs = copy.deepcopy(model).to(device), [x.to(device) for x in inputs]
    model_trt = torch2rt(model, inputs, precision=precision, max_batch_size=3)
    assert model_trt.report.verified is not None
    other = [torch.cat([x, x[:1]]) for x in inputs]
    run_ = model_trt if device.type == "cuda" else model_trt.reference()
    with torch.no_grad():
        theirs, ours = torch.utils._pytree.tree_leaves((model(*other), run_(*other))), None
        theirs, ours = theirs[: len(theirs) // 2], theirs[len(theirs) // 2 :]
    for a, b in zip(ours, theirs, strict=True):
        if a.is_floating_point():
            compare(a, b, 0.05, 0.02 if precision == "fp16" else 0.15)


# What the user says ---------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, width=16, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, 5, bias=bias)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Mlp(), Mlp()]), nn.Linear(5, 3)
        self.between = nn.Linear(5, 6)

    def forward(self, x):
        return self.head(self.layers[1](self.between(self.layers[0](x)))).softmax(-1)


X = torch.randn(2, 6)


def wide(made):
    """The modules with a call that is decided to be float32."""
    return {row.module for row in made.rows if row.dtype == "float32"}


KEEP = {
    "a module and those in it": (["layers.0"], {"layers.0", "layers.0.first", "layers.0.second"}),
    "a pattern": (["layers.*.second"], {"layers.0.second", "layers.1.second"}),
    "one alone": ("head", {"head"}),
    "a class": ([Mlp], {f"layers.{i}{part}" for i in (0, 1) for part in ("", ".first", ".second")}),
    "a function": ([torch.relu], {"layers.0", "layers.1"}),
    "a method stands for its function": ([torch.Tensor.relu], {"layers.0", "layers.1"}),
    "a predicate": ([lambda node: node.meta["val"].shape[-1] == 3], {"head"}),
    "several": (["head", "between"], {"head", "between"}),
}


@pytest.mark.parametrize("name", KEEP)
def test_what_is_kept_in_float32(name):
    keep, modules = KEEP[name]
    assert wide(plan(Stack().eval(), [X], precision="fp16", keep_fp32=keep)) == modules | {""}
    assert wide(plan(Stack().eval(), [X], precision="fp16")) == {""}


def test_what_is_forced_into_low_precision():
    rows = plan(Stack().eval(), [X], precision="bf16", force_low=[torch.softmax], keep_fp32="head").rows
    assert [(r.function, r.dtype, r.reason) for r in rows[-2:]] == [
        ("torch.nn.functional.linear", "float32", "keep_fp32: 'head'"),
        ("torch.Tensor.softmax", "bfloat16", "force_low: torch.softmax"),
    ]
    model_trt = torch2rt(Stack().eval(), [X], precision="bf16", force_low=[torch.softmax])
    assert model_trt.reference()(X).dtype is torch.float32


def test_the_plan_prints_a_row_for_each_module():
    text = str(plan(Stack().eval(), [X], precision="fp16", keep_fp32="layers.1.first"))
    assert "layers.0.first       1 float16\n" in text
    assert "layers.1.first       1 float32    torch.nn.functional.linear (keep_fp32: 'layers.1.first')" in text


REFUSED = {
    r"precision='half' is not one of 'fp32', 'fp16', 'bf16'": dict(precision="half"),
    r"keep_fp32: 'layer.0' means no call of the module. Did you mean 'layers.0'": dict(
        precision="fp16", keep_fp32=["layer.0"]
    ),
    r"keep_fp32: Conv2d means no call": dict(precision="fp16", keep_fp32=nn.Conv2d),
    r"keep_fp32: 3 is no module": dict(precision="fp16", keep_fp32=[3]),
    r"softmax at .*test_mixed_precision.py:\d+: keep_fp32: torch.softmax and force_low: torch.softmax": dict(
        precision="fp16", keep_fp32=torch.softmax, force_low=torch.softmax
    ),
    r"io_precision='half' is not one of": dict(precision="fp16", io_precision="half"),
    r"two low types": dict(precision="fp16", io_precision="bf16"),
    r"io_precision is for a low precision; precision=None has none": dict(io_precision="fp16"),
    r"keep_fp32 is for a low precision": dict(precision="fp32", keep_fp32=["head"]),
    r"samples= is a list of samples": dict(precision="fp16", samples=X),
    r"has size 9 in dimension 1, the engine serves 6": dict(precision="fp16", samples=[torch.ones(2, 9)]),
    r"does not have the form": dict(precision="fp16", samples=[[X, X]]),
    r"fp16_mode=True and precision='bf16' contradict": dict(precision="bf16", fp16_mode=True),
    r"use_onnx=True: there is no ONNX route": dict(use_onnx=True),
    r"onnx_opset=13: there is no ONNX route": dict(onnx_opset=13),
    r"dla_core=0: .*configure=": dict(dla_core=0),
    r"device_types=\{'conv': 1\}: .*configure=": dict(device_types={"conv": 1}),
    r"default_device_type: engines for DLA need configure=": dict(default_device_type="DeviceType.DLA"),
    r"int8_calib_dataset is given without int8_mode=True": dict(int8_calib_dataset=[[X]]),
    r"avg_timing_iterations=0.5": dict(avg_timing_iterations=0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        torch2rt(Stack().eval(), [X], **REFUSED[message])


def test_keywords_of_torch2trt():
    options = dict(strict_type_constraints=True, default_device_type="DeviceType.GPU", gpu_fallback=True, dla_core=None)
    seen = []
    model_trt = torch2rt(
        Stack().eval(), [X], fp16_mode=True, avg_timing_iterations=3, configure=seen.append, use_onnx=False, **options
    )
    assert seen[0].avg_timing_iterations == 3
    assert "HALF" in str([model_trt.network.get_layer(i).get_output(0).dtype for i in range(4)])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'fp16'"):
        torch2rt(Stack().eval(), [X], fp16=True)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'fp16'"):
        plan(Stack().eval(), [X], fp16=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_and_outputs_in_low_precision(precision, device):
    model = Block().eval().to(device)
    x, mask = torch.randn(2, 5, HIDDEN, device=device), torch.ones(2, 5, device=device)
    model_trt = torch2rt(model, [x, mask], precision=precision, io_precision=precision)
    assert model_trt.report.verified is not None
    low = dict(fp16=HALF, bf16=BFLOAT)[precision]
    assert [spec.dtype for spec in model_trt.interface.inputs] == [low, low]
    results = (model_trt if device.type == "cuda" else model_trt.reference())(x.to(low), mask.to(low))
    assert [r.dtype for r in results] == [low, low, torch.int64]


def test_a_half_module_stays_as_it_is():
    graph, made = low_graph(copy.deepcopy(Stack()).half().eval(), [X.half()])
    assert str(graph.graph) == str(made.graph)


def test_regions_of_autocast_are_honoured():
    class Region(Stack):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layers[0](x)
            return self.head(self.layers[1](self.between(x.float())))

    rows = {
        row.module: row.dtype
        for row in plan(Region().eval(), [X], precision="fp16").rows
        if "first" in row.module or "second" in row.module
    }
    assert rows.pop("layers.0.first") == rows.pop("layers.0.second") == "bfloat16"
    assert set(rows.values()) == {"float16"}


# What the narrow type cannot hold -------------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """As in T5: the last product of a block is beyond 65,504, in a residual stream that a norm brings down."""

    def __init__(self, factor):
        super().__init__()
        self.embed, self.mlp = nn.Linear(6, 6), Mlp()
        self.mlp.second = nn.Linear(16, 6, bias=False)
        self.mlp.second.weight.data *= factor
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.norm(x + self.mlp(x)))


def test_a_layer_that_overflows_is_kept_and_named(device):
    model, x = Overflowing(2e5).eval().to(device), X.to(device)
    model_trt = torch2rt(model, [x], precision="fp16")
    (text,) = model_trt.report.assumptions
    assert "mlp.second: stays in float32: torch.nn.functional.linear, a result of up to" in text
    assert "on the samples overflows float16" in text and ".py:" in text
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), model(x), 1e-2, 1e-2)
    assert wide(plan(model, [x], precision="fp16")) == {"mlp.second", "", "norm"}
    assert wide(plan(model, [x], precision="bf16")) == set()
    with pytest.raises(InputError, match=r"force_low: 'mlp.second': .*linear at .* would be wrong: a result of up to"):
        torch2rt(model, [x], precision="fp16", force_low="mlp.second")


def test_other_samples_count(device):
    model, x = Overflowing(1.0).eval().to(device), X.to(device)
    options = dict(precision="fp16", verify=False)
    assert torch2rt(model, [x], **options).report.assumptions == []
    (text,) = torch2rt(model, [x], samples=[x * 10, [x * 1e6]], **options).report.assumptions[-1:]
    assert "stays in float32" in text
    assert torch2rt(Overflowing(2e5).eval().to(device), [x], samples=[], **options).report.assumptions == []


class Values(nn.Module):
    """A product, and something with numbers that float16 does not have."""

    def __init__(self, then, weight=None):
        super().__init__()
        torch.manual_seed(0)
        self.product, self.then, self.after = nn.Linear(6, 6), then, nn.Linear(6, 3)
        if weight is not None:
            self.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.after(self.then(self, self.product(x)))


VALUES = {
    "vanishes in float16": Values(lambda m, y: y / (y.abs() + 1e-9)),
    "its number -1e+09 overflows": Values(lambda m, y: y.masked_fill(y > 0.1, -1e9).clamp_min(-3)),
    "its constant weight of up to 1e+06 overflows": Values(lambda m, y: y * m.weight / 1e6, torch.full((6,), 1e6)),
    "its constant weight of up to 1e-06 vanishes": Values(lambda m, y: y * m.weight * 1e6, torch.full((6,), 1e-6)),
    "the product of queries and keys of up to": Values(
        lambda m, y: F.scaled_dot_product_attention(*[(y * 600)[None, None]] * 2, y[None, None])[0, 0]
    ),
    "an argument of up to": Values(lambda m, y: F.linear(y.exp() * 6e5, m.weight).log(), torch.eye(6)),
    "on the samples vanishes in float16": Values(lambda m, y: (y * 1e-4 * 1e-4) * 1e8),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_float16_cannot_hold_stays_in_float32(name, device):
    model, x = copy.deepcopy(VALUES[name]).eval().to(device), X.to(device)
    model_trt = torch2rt(model, [x], precision="fp16")
    assert any(name in text for text in model_trt.report.assumptions), model_trt.report
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), model(x), 2e-2, 2e-2)


def test_integers_stay_exact(device):
    """Positions beyond 2,048 are no numbers of float16."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Linear(6, 6)

        def forward(self, x, i):
            return (self.product(x) * 0 + 1) * i[:, None]

    x, i = X.to(device), torch.tensor([2049, 4099], device=device)
    model_trt = torch2rt(Positions().eval().to(device), [x, i], precision="bf16")
    assert (model_trt if device.type == "cuda" else model_trt.reference())(x, i)[:, 0].tolist() == [2049, 4099]


def test_a_sample_that_fails_is_named():
    model = nn.Embedding(5, 3)
    with pytest.raises(InputError, match=r"sample 0 fails with IndexError: index out of range"):
        torch2rt(model, [torch.tensor([[1, 7]])], precision="fp16")


def test_ranges_are_measured():
    graph = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [torch.randn(1, 2)])
    graph.get_parameter("0.weight").data = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    graph.get_parameter("0.bias").data.zero_()
    ranges = measure(graph, [[torch.tensor([[1.0, 5.0]])], [torch.tensor([[torch.nan, torch.inf]])]])
    assert ranges["linear"].largest == 15 and ranges["relu"].largest == 2
    assert ranges["linear"].has_nan


# What TensorRT makes of it --------------------------------------------------------------------------------------------


def test_a_kept_product_between_casts_is_computed_in_float32():
    """By itself, TensorRT computes it in Half (`quirks.computes_lone_products_low`)."""
    from harness.layers import kernels

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 16)).eval()
    _, made = low_graph(model, [torch.randn(4, 32)], keep={})
    graph = run(trace(model, [torch.randn(4, 32)]), passes.default())
    (lone,) = [n for n in graph.graph.nodes if n.meta.get("module") == "2" and n.op == "call_function"]
    made = mixed_precision(graph, HALF, keep={lone: "asked for"})
    products = [k for k in kernels(lower(made, passes=[])) if "Fc" in k.name or k.type == "gemm"]
    assert [("Float" in k.constants, k.inputs[0]) for k in products] == [
        (False, "Half"),
        (True, "Float"),
        (False, "Half"),
    ]


def test_the_kernels_are_those_of_the_half_module():
    from harness.layers import kernels

    for model, x in [
        (convolutional(), torch.randn(2, 3, 12, 10)),
        (nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval(), torch.randn(2, 16, 64)),
    ]:
        low = mixed_precision(run(trace(model, [x]), passes.default()), HALF, io=HALF)
        ours = [k.name for k in kernels(lower(low, passes=[]))]
        half = kernels(lower(trace(copy.deepcopy(model).half(), [x.half()])))
        assert len(ours) <= len(half), ours


class Branching(nn.Module):
    """Does something else for large batches, so that two engines or more serve the range."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.first(x)
        return self.second(y.relu() if x.shape[0] > 2 else y.tanh())


def test_several_engines_of_one_module(device):
    model, x = Branching().eval().to(device), X.to(device)
    data = (batch.to(device) for batch in (torch.randn(4, 6), torch.randn(1, 6)))  # which can be read once
    for options in (dict(precision="fp16", io_precision="fp16"), dict(precision="int8", calibration=data)):
        model_trt = torch2rt(model, [x], max_batch_size=5, **options)
        run_ = model_trt if device.type == "cuda" else model_trt.reference()
        for size in (1, 2, 5):
            other = torch.randn(size, 6, device=device)
            ours = run_(other.half() if "io_precision" in options else other)
            torch.testing.assert_close(ours.float(), model(other), rtol=0.1, atol=0.1)
    with pytest.raises(InputError, match=r"calibration_cache= is for one engine; the sizes that are asked for take \d"):
        torch2rt(model, [x], max_batch_size=5, precision="int8", calibration=[x], calibration_cache="table.json")


class Faint(nn.Module):
    """Some channels of a norm are so small that their weights are 0 in float16, beside others of usual size."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(96), nn.Linear(96, 96)
        self.norm.weight.data[:40] = 1e-8

    def forward(self, x):
        return self.norm(self.linear(x))


def test_what_vanishes_beside_large_numbers_is_no_error(device):
    torch.manual_seed(0)
    model, x = Faint().eval().to(device), torch.randn(5, 96, device=device)
    model_trt = torch2rt(model, [x], precision="fp16")
    assert model_trt.report.verified
    difference = (model_trt if device.type == "cuda" else model_trt.reference())(x) - model(x)
    assert difference.abs().max() < 0.01 and difference[:, :40].abs().max() < 1e-7


BIASED = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 6)),
    "norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), (4, 6)),
    "addmm": (lambda: Addmm(), (4, 6)),
}


class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("scale", [1e-6, 1e-2])
@pytest.mark.parametrize("name", BIASED)
def test_biases_that_vanish_beside_a_product(name, scale, device):
    """Beside large products they are lost in their rounding; beside products as small as they are, nothing is lost."""
    torch.manual_seed(0)
    make, shape = BIASED[name]
    model, x = make().eval().to(device), torch.randn(shape, device=device)
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):
            nn.init.normal_(parameter, std=1e-6)
        elif scale < 1e-3 and name != "norm":
            nn.init.normal_(parameter, std=scale)
    model_trt = torch2rt(model, [x], precision="fp16")
    stays = any("vanishes" in text for text in model_trt.report.assumptions)
    assert stays == (scale < 1e-3 and name != "norm")
    expected = model(x)
    difference = (model_trt if device.type == "cuda" else model_trt.reference())(x) - expected
    assert difference.abs().max() < 2e-3 * expected.abs().max()
