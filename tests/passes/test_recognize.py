"""Modules that others have quantised: what they write becomes TensorRT's own layers; tensor subclasses are opened."""

import copy

import pytest
import torch
from harness import Call, compare
from harness.layers import kernels
from torch import nn
from torch.nn import functional as F

from torch2rt import TraceError, UnsupportedError, passes, torch2rt, trace
from torch2rt.backend.quirks import builds_int8_convolutions, lacks_dynamic_int4_in_float32
from torch2rt.backend.tensorrt import IS_RTX
from torch2rt.graph import check_graph
from torch2rt.passes.order import run
from torch2rt.passes.quantization.quantized import dequantize, fake_quantize, fake_quantize_fp8
from torch2rt.passes.quantization.recognize import on_fp8_grid, on_grid

S = torch.tensor(0.031)
INVERSE = 1 / S

WRITTEN = {
    "modelopt's": (
        lambda x: (x * INVERSE).round().clamp(x.new_tensor(-128.0), x.new_tensor(127.0)) / INVERSE,
        (0.031,),
    ),
    "numbers": (lambda x: torch.clamp(torch.round(x / 0.031), -128, 127) * 0.031, (0.031,)),
    "fewer integers": (lambda x: 0.25 * (x / 0.25).round().clip(min=-127, max=127), (0.25, -127, 127)),
    "torch's": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.031, 0, -128, 127), (0.031, -128, 127)),
    "through int8": (lambda x: (x / 0.25).round().clamp(-128, 127).to(torch.int8).float() * 0.25, (0.25,)),
    "narrower": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -3, 4), (0.5, -3, 4)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_recognized(name, device):
    function, arguments = WRITTEN[name]
    x = torch.randn(5, 7, device=device) * 3
    model = Call(lambda x: function(x * 2) + 1)
    traced = trace(model, [x], max_batch_size=6)
    graph = run(traced, passes.default())
    check_graph(graph)
    ((_, *found),) = [n.args for n in graph.graph.find_nodes(op="call_function", target=fake_quantize)]
    assert found == [pytest.approx(arguments[0], rel=1e-6), *arguments[1:]]
    torch.testing.assert_close(graph(x)[0], traced(x)[0], rtol=1e-5, atol=1e-5)
    if device.type == "cpu":  # an engine's roundings fall on other sides of a step
        assert torch2rt(model, [x], max_batch_size=6).report.verified


def shared(x):
    y = (x / 0.5).round()
    return y.clamp(-128, 127) * 0.5 + y


OTHERS = {
    "another scale back": lambda x: (x / 0.5).round().clamp(-128, 127) * 0.25,
    "unsigned": lambda x: (x / 0.5).round().clamp(0, 255) * 0.5,
    "too many": lambda x: (x / 0.5).round().clamp(-200, 200) * 0.5,
    "a zero point": lambda x: ((x / 0.5).round() + 3).clamp(-128, 127) * 0.5,
    "digits": lambda x: (x / 0.5).round(decimals=2).clamp(-128, 127) * 0.5,
    "a scale for each column": lambda x: (x / torch.arange(1.0, 8)).round().clamp(-128, 127) * torch.arange(1.0, 8),
    "used in between": shared,
    "through bytes": lambda x: (x / 0.5).round().clamp(-128, 127).to(torch.uint8).float() * 0.5,
    "negative": lambda x: (x / -0.5).round().clamp(-128, 127) * -0.5,
    "no bound above": lambda x: (x / 0.5).round().clamp(min=-128) * 0.5,
    "between halves": lambda x: (x / 0.5).round().clamp(-1.5, 2.5) * 0.5,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else(name):
    graph = run(trace(Call(OTHERS[name]), [torch.randn(5, 7)]), passes.default())
    assert not graph.graph.find_nodes(op="call_function", target=fake_quantize)


class Trained(nn.Module):
    """A layer as quantisation-aware training leaves it."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call
        self.scales = nn.Parameter(layer.weight.detach().flatten(1).abs().amax(1) / 127)
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.scales, self.zeros, 0, -128, 127)
        return self.call(x, weight, self.layer.bias)


def trained():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5, bias=False)
    return nn.Sequential(
        Trained(conv, F.conv2d),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Trained(linear, F.linear),
    ).eval()


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_quantisation_aware_training(precision):
    model, x = trained(), torch.randn(4, 3, 9, 8)
    model_trt = torch2rt(model, [x], precision=precision, max_batch_size=6)
    assert model_trt.report.verified
    products = [k for k in kernels(model_trt._networks[0]) if k.type in ("gemm", "correlation")]
    convolution = ("Int8", "Int8") if builds_int8_convolutions() else ({None: "Float", "fp16": "Half"}[precision],) * 2
    assert [(k.inputs[0], k.constants[0]) for k in products] == [convolution, ("Int8", "Int8")]
    graph = run(trace(model, [x]), passes.default())
    calls = graph.graph.find_nodes(op="call_function", target=dequantize)
    kept = [(8, 3, 3, 3), (5, 8)][0 if builds_int8_convolutions() else 1 :]
    assert [tuple(call.args[0].meta["val"].shape) for call in calls] == kept


def test_numbers_on_a_grid():
    torch.manual_seed(0)
    steps = torch.randint(-100, 100, (6, 3, 5))
    scale = torch.rand(6) + 0.01
    weight = steps * scale[:, None, None]
    weight[2] = 0
    values, found = on_grid(weight)
    torch.testing.assert_close(values * found[:, None, None], weight, rtol=1e-5, atol=1e-6)
    assert on_grid(torch.randn(6, 15)) is None
    assert on_grid(torch.cat([weight.flatten(1), torch.randn(1, 15)])) is None
    assert on_grid(torch.full((2, 3), torch.nan)) is None


class Decomposed(nn.Module):
    """As pt2e leaves a program: integers in between, weights as they are stored, and a zero point further on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randint(-127, 128, (5, 6), dtype=torch.int8), requires_grad=False)
        self.scales, self.zeros = torch.rand(5) + 0.1, torch.zeros(5, dtype=torch.int64)

    def forward(self, x):
        ops, int8 = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, 0.02, 0, *int8), 0.02, 0, *int8)
        weight = ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, *int8)
        y = F.linear(x, weight)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(y, 0.5, 3, *int8), 0.5, 3, *int8)


@pytest.mark.parametrize("exported", [False, True])
def test_quantised_programs(exported):
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    model, x = Decomposed().eval(), torch.randn(4, 6)
    program = torch.export.export(model, (x,)) if exported else model
    model_trt = torch2rt(program, [x])
    compare(model_trt.reference()(x), model(x), 1e-5, 1e-5)
    kinds = [kind for _, kind in model_trt._networks[0].facts()["layers"]]
    assert kinds.count("QUANTIZE") == 1 and kinds.count("DEQUANTIZE") == 2


def test_ranges_of_programs_that_are_computed():
    """As pt2e leaves dynamic quantisation, with a range for each call."""
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    ops = torch.ops.quantized_decomposed

    def call(x):
        for choose, kind in ((ops.choose_qparams, (0, 255)), (ops.choose_qparams_symmetric, (-128, 127))):
            dtype = torch.uint8 if kind[0] == 0 else torch.int8
            given = (*choose.tensor(x, *kind, 1e-5, dtype), *kind, dtype)
            x = ops.dequantize_per_tensor.tensor(ops.quantize_per_tensor.tensor(x, *given), *given)
        return x + 1

    model, x = Call(call), torch.rand(4, 6) * 3 + 1
    model_trt = torch2rt(model, [x], max_batch_size=5)
    for part in (x, -x[:2], x[:1] * 0):
        compare(model_trt.reference()(part), model(part), 1e-5, 1e-5)


@pytest.mark.parametrize("options", [{}, {"fallback": True, "min_segment_calls": 1}])
def test_quantised_tensors_are_refused_by_name(options):
    """torch's own quantised tensors are the CPU's, and are neither converted nor left to torch."""
    model = Call(lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).dequantize() + 1)
    with pytest.raises(TraceError, match="is of torch's quantised tensors"):
        torch2rt(model, [torch.randn(2, 8)], **options)


# Packages -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
def test_modelopt():
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(4, 3, 8, 8)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(x))
    model_trt = torch2rt(model, [x], precision="fp16")
    products = [k for k in kernels(model_trt._networks[0]) if k.type in ("gemm", "correlation")]
    assert [(k.inputs[0], k.constants[0]) for k in products] == [("Int8", "Int8")] * 2
    compare(model_trt.reference()(x), model(x), 0.02, 0.02)


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
def test_modelopt_in_fp8():
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 5)).eval(), torch.randn(4, 64)
    rows = copy.deepcopy(model)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(x))
    model_trt = torch2rt(model, [x], precision="fp16")
    products = [k for k in kernels(model_trt._networks[0]) if k.type == "gemm"]
    assert [(k.inputs[0], k.constants[0]) for k in products] == [("FP8", "FP8")] * 2
    compare(model_trt.reference()(x), model(x), 0.02, 0.02)
    mtq.quantize(rows, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, lambda model: model(x))  # with ranges of each call
    x[1] = 0
    compare(torch2rt(rows, [x]).reference()(x), rows(x), 1e-4, 1e-4)
    blocks = Call(torch.ops.tensorrt.dynamic_block_quantize_op, (16, torch.tensor(3.0), 4, 2, 8, 4))
    with pytest.raises(UnsupportedError, match="blocks with scales of their own"):
        torch2rt(blocks, [x])


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize("rows", [False, True])
def test_weights_in_fp8_are_recognized(rows):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).eval(), torch.randn(3, 64)
    scale = layer.weight.abs().amax(1, keepdim=True) / 448 if rows else layer.weight.abs().max() / 448
    layer.weight.data = (layer.weight / scale).detach().to(torch.float8_e4m3fn).float() * scale.detach()
    model = Call(lambda x: F.linear(fake_quantize_fp8(x * 2, 0.02), layer.weight, layer.bias))
    model_trt = torch2rt(model, [x], max_batch_size=5)
    (product,) = [k for k in kernels(model_trt._networks[0]) if k.type == "gemm"]
    assert (product.inputs[0], product.constants[0]) == ("FP8", "FP8")
    compare(model_trt.reference()(x), model(x), 1e-4, 1e-4)
    layer.weight.data += 0.003  # on no such grid: plain arithmetic
    kinds = [kind for _, kind in torch2rt(model, [x])._networks[0].facts()["layers"]]
    assert kinds.count("DEQUANTIZE") == 1
    assert on_fp8_grid(torch.zeros(2, 3)) is None and on_fp8_grid(torch.full((2, 3), torch.nan)) is None


TORCHAO = {  # what the weights are kept in
    "Int8WeightOnlyConfig()": torch.int8,
    "IntxWeightOnlyConfig()": torch.int8,
    "IntxWeightOnlyConfig(torch.int4, PerGroup(32))": torch.uint8,
    "Float8WeightOnlyConfig()": torch.float32,
    "Int8DynamicActivationInt8WeightConfig()": torch.int8,
    "Int8DynamicActivationIntxWeightConfig()": torch.float32,
}


@pytest.mark.parametrize("config", TORCHAO)
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).eval()
    quantization.quantize_(model, eval(config, {"torch": torch}, vars(quantization)))
    x = torch.randn(4, 64)
    model_trt = torch2rt(model, [x], max_batch_size=5)
    assert model_trt.report.verified
    compare(model_trt.reference()(x), model(x), 1e-4, 1e-5)
    kept = [w.tensor.dtype for w in model_trt._networks[0].weights.values() if w.tensor.numel() >= 32 * 32]
    assert kept[0] == TORCHAO[config]
    if "Int8DynamicActivationInt8" in config and IS_RTX:  # the product itself, whose values are quantised row by row
        products = [k for k in kernels(model_trt._networks[0]) if k.type == "gemm"]
        assert [(k.inputs[0], k.constants[0]) for k in products] == [("Int8", "Int8")] * 2


@pytest.mark.parametrize(("config", "kept"), [("INT8_WEIGHT_ONLY_CFG", torch.int8), ("INT4_AWQ_CFG", torch.uint8)])
@pytest.mark.parametrize("compressed", [False, True])
def test_modelopt_weights_alone(config, kept, compressed):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 128)).eval(), torch.randn(4, 256)
    mtq.quantize(model, getattr(mtq, config), lambda model: model(x))
    if compressed:
        mtq.compress(model)
    model_trt = torch2rt(model, [x])
    compare(model_trt.reference()(x), model(x), 1e-4, 1e-5)
    assert kept in {w.tensor.dtype for w in model_trt._networks[0].weights.values()}


# Weights that are quantised alone -------------------------------------------------------------------------------------


class Stored(nn.Module):
    """A linear layer whose weight is kept as whole numbers and scales, in one of several ways."""

    def __init__(self, way, least=128):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.register_buffer("values", torch.randint(-least, least, (32, 64), dtype=torch.int8))
        self.values[3] = 0
        self.register_buffer("scale", torch.rand(32, 1 if least > 8 else 2) * 0.01 + 1e-3)
        self.bias = nn.Parameter(torch.randn(32))
        self.weight = nn.Parameter(self.values * torch.rand(32, 1))

    def forward(self, x):
        values = self.values.to(x.dtype)
        scale = self.scale.to(x.dtype)
        if self.way == "parameter":
            return F.linear(x, self.weight)
        if self.way == "mask":
            return F.linear(x, (values > 0).to(x.dtype))
        if self.way == "outputs":
            return torch.mm(x, values.t()) * scale[:, 0] + self.bias
        if self.way == "matmul":
            return x @ (values * scale).t()
        return F.linear(x, values * scale.repeat_interleave(64 // scale.shape[1], 1), self.bias)


STORED = [
    ("linear", 128, {}, torch.int8),
    ("outputs", 128, {}, torch.int8),
    ("matmul", 128, {"precision": "fp16"}, torch.int8),
    ("linear", 8, {}, torch.uint8),
    ("linear", 8, {"precision": "bf16"}, torch.uint8),
    ("parameter", 128, {}, torch.float32),
    ("mask", 128, {}, torch.float32),
]


@pytest.mark.parametrize(("way", "least", "options", "kept"), STORED)
def test_weights_that_are_quantised_alone(way, least, options, kept):
    model, x = Stored(way, least).eval(), torch.randn(3, 64)
    model_trt = torch2rt(model, [x], max_batch_size=5, **options)
    low = bool(options)
    compare(model_trt.reference()(x), model(x), 0.03 if low else 1e-5, 0.03 if low else 1e-5)
    (weight,) = [w for w in model_trt._networks[0].weights.values() if w.tensor.numel() >= 32 * 32]
    if kept is torch.uint8 and not low and lacks_dynamic_int4_in_float32():
        kept = torch.float32
    assert weight.tensor.dtype is kept
    if kept is torch.int8 and IS_RTX:
        (product,) = [k for k in kernels(model_trt._networks[0]) if "Int8" in k.constants]
        assert not {"Int8"} & set(product.inputs)


def test_such_weights_are_quantised_with_their_inputs_where_that_is_asked():
    model, x = Stored("outputs").eval(), torch.randn(3, 64)
    model_trt = torch2rt(model, [x], precision="int8", calibration=[x], quantize_all=True)
    kinds = [kind for _, kind in model_trt._networks[0].facts()["layers"]]
    assert kinds.count("QUANTIZE") == 1
    compare(model_trt.reference()(x), model(x), 0.1, 0.1)


def test_grids():
    """Rows with the smallest integer; and numbers of a narrow type, which random ones are not taken for."""
    values, scale = on_grid(torch.tensor([[-128.0, 3.0, 127.0], [5.0, 0.0, -2.0]]) * 0.25)
    assert values.tolist()[0] == [-128, 3, 127] and scale[0] == 0.25
    for dtype in (torch.float16, torch.bfloat16):
        made = (torch.randint(-128, 128, (40, 64)) * (torch.rand(40, 1) + 0.1)).to(dtype)
        values, scale = on_grid(made)
        torch.testing.assert_close(
            (values * scale[:, None]).to(dtype), made, rtol=1.5 * torch.finfo(dtype).eps, atol=0.0
        )
        assert on_grid(torch.randn(40, 64).to(dtype)) is None


# Tensor subclasses ----------------------------------------------------------------------------------------------------


class Halves(torch.Tensor):
    """A tensor that is the sum of two others, and says what a linear layer does with it."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, device=a.device)

    def __init__(self, a, b):
        self.a, self.b = a, b

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.a, bias) + F.linear(x, weight.b)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].a, args[0].b)
        if func is torch.ops.aten.mul.Tensor:  # says what it does, but not in torch functions
            return args[0] * args[1].a + args[0] * args[1].b
        raise NotImplementedError(f"Halves has no {func}")


def with_halves(call):
    model = nn.Linear(4, 3)
    halves = Halves(torch.randn(3, 4), torch.randn(3, 4))
    model.weight = nn.Parameter(halves, requires_grad=False)
    model.forward = lambda x: call(x, model.weight, model.bias)
    return model.eval()


def test_a_subclass_is_opened():
    model, x = with_halves(F.linear), torch.randn(2, 4)
    model_trt = torch2rt(model, [x], max_batch_size=3)
    compare(model_trt.reference()(x), model(x))


def test_a_subclass_that_does_not_say_is_refused_by_name():
    model, x = with_halves(lambda x, weight, bias: x * weight), torch.randn(3, 4)
    assert model(x).shape == (3, 4)
    with pytest.raises(
        TraceError, match=r"'weight' is a .*Halves, which does not say what torch.Tensor.mul does with it"
    ):
        torch2rt(model, [x])
