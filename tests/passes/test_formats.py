"""fp8 products, weights alone in int8 and int4, SmoothQuant and bias correction: what they compute, and in what."""

import pytest
import torch
from harness import compare
from harness.layers import kernels
from torch import nn

from torch2rt import InputError, lower, passes, torch2rt, trace
from torch2rt.backend.quirks import builds_int8_convolutions, crashes_on_equal_weights
from torch2rt.backend.tensorrt import IS_RTX
from torch2rt.graph import check_graph
from torch2rt.passes.options import Precision
from torch2rt.passes.order import run
from torch2rt.passes.quantization.calibrate import calibrate
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.histogram import FP8_NUMBER, Histogram, mse
from torch2rt.passes.quantization.products import observed, quantizable
from torch2rt.passes.quantization.quantize import quantize
from torch2rt.passes.quantization.quantized import LARGEST, dequantize, fake_quantize_fp8, packed, quantized, unpacked
from torch2rt.passes.quantization.smooth import smooth, smoothable
from torch2rt.vocabulary import context


class Mixed(nn.Module):
    """Products by all spellings, between convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(3, 5, 3, padding=1), nn.Linear(64, 128)
        self.first, self.second = (nn.Parameter(torch.randn(*size) / 10) for size in ((128, 192), (192, 64)))
        self.bias, self.norm = nn.Parameter(torch.randn(192)), nn.LayerNorm(64)

    def forward(self, x):
        x = torch.addmm(self.bias, self.linear(self.norm(x[:, 0])).relu(), self.first) @ self.second
        return self.conv(x.reshape(-1, 1, 64).expand(-1, 3, 64)), torch.nn.functional.gelu(x).mm(self.second.T)


def mixed():
    torch.manual_seed(1)
    return Mixed().eval()


X = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(0))
CALIBRATED = {"calibration": [X, X.flip(0)], "quantize_all": True}
ERRORS = {"int8": 0.03, "fp8": 0.06, "int8_weights": 0.015, "int4_weights": 0.2}  # of eager's norm


@pytest.mark.parametrize(
    ("name", "rest"),
    [*((name, "") for name in FORMATS), ("fp8", "+bf16"), ("int8", "+fp32"), ("int4_weights", "+fp32")],
)
def test_formats_beside_eager(name, rest, device):
    model, x = mixed().to(device), X.to(device)
    options = {"calibration": [x, x.flip(0)], "quantize_all": True} if FORMATS[name].is_whole else {}
    model_trt = torch2rt(model, [x], precision=name + rest, max_batch_size=8, **options)
    engine = model_trt if device.type == "cuda" else model_trt.reference()
    for part in (x, x[:1]):
        for ours, theirs in zip(engine(part), model(part), strict=True):
            assert ours.dtype is torch.float32
            assert 1e-3 * theirs.norm() < (ours - theirs).norm() < ERRORS[name] * theirs.norm()
    notes = [text for text in model_trt.report.assumptions if "is not quantised" in text]
    others = [text for text in notes if "in conv" not in text]
    assert len(others) == (
        2 if name == "int8_weights" and crashes_on_equal_weights() else 0
    )  # one weight of two products
    assert len(notes) - len(others) == (0 if name == "int8" and builds_int8_convolutions() else 1)


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize(
    ("rest", "sizes", "dtype"),
    [
        ("+fp32", {"max_batch_size": 8}, torch.float32),
        ("+fp32", {}, torch.uint8),
        ("", {"max_batch_size": 8}, torch.uint8),
    ],
)
def test_int4_is_brought_back_where_there_is_no_kernel(monkeypatch, lacks, rest, sizes, dtype):
    monkeypatch.setattr(context, "lacks_dynamic_int4_in_float32", lambda: lacks)
    model, x = nn.Linear(128, 64), torch.randn(6, 128)
    model_trt = torch2rt(model, [x], precision="int4_weights" + rest, **sizes)
    assert {weight.tensor.dtype for weight in model_trt._networks[0].weights.values() if weight.tensor.dim() > 1} >= {
        dtype if lacks else torch.uint8
    }
    error = (model_trt.reference()(x) - model(x)).norm() / model(x).norm()
    assert 1e-3 < error < ERRORS["int4_weights"]


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize("smooth_quant", [None, 0.5])
def test_tensorrt_computes_products_in_fp8(smooth_quant):
    """All but the convolution, and scales that are moved cost no kernel."""
    options = dict(precision="fp8", smooth_quant=smooth_quant, **CALIBRATED)
    made = kernels(torch2rt(mixed(), [X], verify=False, **options)._networks[0])
    products = [k for k in made if k.type == "gemm"]
    assert len(products) == 4 and all(k.inputs[0] == k.constants[0] == "FP8" for k in products), "\n".join(
        map(str, made)
    )
    layers = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)]
    model, x = nn.Sequential(nn.LayerNorm(64), *layers).eval(), X.flatten(0, 1)
    options = dict(precision="fp8", smooth_quant=smooth_quant, calibration=[x], quantize_all=True)
    assert [k.type for k in kernels(torch2rt(model, [x], verify=False, **options)._networks[0])] == [
        *("kgen", "gemm") * 2,
        "kgen",
    ]


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize(("name", "kind"), [("int8_weights", "Int8"), ("int4_weights", "Int4")])
def test_weights_stay_narrow_in_the_engine(name, kind):
    made = kernels(torch2rt(mixed(), [X], precision=name, verify=False)._networks[0])
    count = 2 if kind == "Int8" and crashes_on_equal_weights() else 4
    assert sum(kind in k.constants for k in made) == count, "\n".join(map(str, made))
    large, x = nn.Linear(1024, 2048, bias=False).eval(), torch.randn(2, 1024)
    sizes = [len(torch2rt(large, [x], precision=p, verify=False).engine_bytes) for p in ("fp16", name)]
    assert sizes[0] - sizes[1] > {"Int8": 1.5, "Int4": 2.5}[kind] * 2**20


class Twice(nn.Module):
    """A gated MLP that is called twice, where RTX 1.7 crashes if products share a layer that brings weights back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((64, 128), (64, 128), (128, 64)))

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return x


@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_shared(name, device):
    model, x = Twice().eval().to(device), torch.randn(2, 5, 64, device=device)
    options = {"calibration": [x], "quantize_all": True} if FORMATS[name].is_whole else {}
    model_trt = torch2rt(model, [x], precision=name, max_batch_size=3, **options)
    network = model_trt._networks[0]
    kinds = [kind for _, kind in network.facts()["layers"]]
    if name == "int8_weights" and crashes_on_equal_weights():
        assert "DEQUANTIZE" not in kinds and any("one int8 weight" in text for text in model_trt.report.assumptions)
        return
    assert kinds.count("DEQUANTIZE") == (7 if FORMATS[name].is_whole else 6)
    stored = [w.tensor for w in network.weights.values() if w.tensor.dtype in LARGEST]
    assert len({tensor.data_ptr() for tensor in stored}) == 3  # as much memory as without sharing
    ours, theirs = (model_trt if device.type == "cuda" else model_trt.reference())(x), model(x)
    assert (ours - theirs).norm() < ERRORS[name] * theirs.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_half_modules_are_quantised_too(name, device):
    model, x = mixed().half().to(device), X.half().to(device)
    options = {"calibration": [x], "quantize_all": True} if FORMATS[name].is_whole else {}
    model_trt = torch2rt(model, [x], precision=name, **options)
    kinds = [kind for _, kind in model_trt._networks[0].facts()["layers"]]
    count = {"int8": 10 if builds_int8_convolutions() else 8, "fp8": 8}.get(name, 4)
    assert kinds.count("DEQUANTIZE") == (2 if name == "int8_weights" and crashes_on_equal_weights() else count)
    ours, theirs = (model_trt if device.type == "cuda" else model_trt.reference())(x)[1], model(x)[1]
    assert ours.dtype is torch.float16
    assert (ours.float() - theirs.float()).norm() < ERRORS[name] * theirs.float().norm()


def test_int4_is_two_in_a_byte():
    values = torch.tensor([[[-8, 7, 0, -1], [1, 2, -3, 4]]], dtype=torch.int8)
    assert packed(values).tolist() == [[[0x78, 0xF0], [0x21, 0x4D]]]
    assert torch.equal(unpacked(packed(values)), values)
    weight = torch.randn(6, 256) * torch.tensor([1.0, 50, 0, 1e-2, 1e-3, 7])[:, None]
    for matrix, axis in ((weight, 0), (weight.T.contiguous(), 1)):
        stored, scale = quantized(matrix, axis, torch.uint8, 128)
        assert stored.dtype is torch.uint8 and stored.numel() == weight.numel() // 2 and scale.numel() == 12
        back = dequantize(stored, scale, axis, torch.float32)
        steps = scale.repeat_interleave(128, 1 - axis)
        assert ((back - matrix).abs() <= steps * 0.501).all()
        torch.testing.assert_close(dequantize(stored, scale, axis, torch.float16).float(), back, rtol=1e-3, atol=0)


def test_fp8_is_as_torch_rounds_it():
    x = torch.cat([torch.randn(500) * 10.0**n for n in range(-5, 4)])
    assert torch.equal(fake_quantize_fp8(x, 1.0), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    numbers = torch.rand(3000) * torch.logspace(-5, 2.6, 3000)
    rounded = torch.from_numpy(FP8_NUMBER.rounded(numbers.double().numpy())).float()
    torch.testing.assert_close(rounded, numbers.to(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    histogram = Histogram()
    histogram.add(torch.randn(100_000))
    assert mse(histogram, FP8_NUMBER) > 0.9 * histogram.largest > mse(histogram)  # fp8 has small steps near 0 anyhow


# SmoothQuant and biases -----------------------------------------------------------------------------------------------


class Outlier(nn.Module):
    """A channel much larger than the others goes to two layers, of which one spells its weight the other way."""

    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(48), nn.Linear(48, 20)
        self.b = nn.Parameter(torch.randn(48, 12) / 7)
        self.norm.weight.data[7] = 90.0
        self.a.weight.data[:, 3], self.b.data[5] = 0.0, 0.0

    def forward(self, x):
        x = self.norm(x)
        return self.a(x), x @ self.b, x


def outlier():
    torch.manual_seed(0)
    return Outlier().eval(), torch.randn(40, 48)


def test_smoothing_leaves_products_as_they_are():
    model, x = outlier()
    model.norm.weight.data[4] = model.norm.bias.data[4] = 0.0
    graph = run(trace(model, [x], max_batch_size=64), passes.default())
    channels = {product.input: product.channels for product in smoothable(graph)}
    seen = calibrate(graph, [x[:30], x[30:]], [], "minmax", channels=channels).channels
    (found,) = seen.values()
    normed = model.norm(x)
    torch.testing.assert_close(found.largest, normed.abs().amax(0))
    torch.testing.assert_close(found.mean, normed.mean(0), rtol=1e-4, atol=1e-5)
    text = str(graph.graph)
    for strength in (0.5, 0.8, 1.0):
        made = smooth(graph, seen, strength)
        check_graph(made)
        assert str(graph.graph) == text
        for ours, theirs in zip(made(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        value = observed(made)[0]
        assert value.target is torch.mul
        origins = {p.weight.meta["made_of"].parameter for p in quantizable(made)}
        assert origins == {"a.weight", "b"}
    weight = model.a.weight.data.clone()
    model.a.weight.data[:, 7], model.b.data[7] = 0.0, 0.0  # what is large is not used: nothing is won
    same = run(trace(model, [x]), passes.default())
    model.norm.weight.data.fill_(1.0)
    seen = {node.name: calibrate(same, [x], [], channels={node: -1}).channels[node.name] for node in observed(same)}
    assert str(smooth(same, seen, 0.0).graph) == str(same.graph)
    model.a.weight.data = weight
    kept = {product.node: "as asked" for product in smoothable(graph)}
    assert str(smooth(graph, seen, 0.5, kept).graph) == text


def test_smoothing_makes_int8_better(device):
    model, x = outlier()
    model, x = model.to(device), x.to(device)
    expected, errors = model(x), []
    for strength in (None, 0.5, 0.8):
        batches = (part for part in x.split(20))  # a generator is read twice
        options = dict(calibration=batches, calibration_method="minmax", smooth_quant=strength)
        model_trt = torch2rt(model, [x], precision="int8", quantize_all=True, **options)
        found = (model_trt if device.type == "cuda" else model_trt.reference())(x)
        errors.append([float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, expected, strict=True)])
    plain, half, more = errors
    assert plain[0] > 1.5 * half[0] and plain[1] > 1.5 * half[1] and max(half + more) < 0.05 and plain[2] < 1e-3


def with_mean(*size):
    """Numbers whose channels, along the second dimension, have means of their own."""
    return torch.rand(50, *size) + torch.arange(float(size[0])).reshape(-1, *[1] * (len(size) - 1))


BIASED = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), (0, 2, 3)),
    "no bias": (lambda: nn.Conv1d(6, 8, 1, bias=False), (6, 9), (0, 2)),
    "linear": (lambda: nn.Linear(9, 5), (3, 9), (0, 1)),
}


@pytest.mark.parametrize("name", BIASED)
def test_biases_are_corrected(name):
    """The mean of each output is eager's again."""
    if name != "linear" and not builds_int8_convolutions():
        pytest.skip("this TensorRT has no int8 convolutions")
    make, size, places = BIASED[name]
    torch.manual_seed(0)
    layer, x = make().eval(), with_mean(*size) + torch.arange(float(size[-1]))
    layer.weight.data.flatten(1)[:, 1] *= 20  # a large number in each row makes the steps of all others large
    graph = run(trace(layer, [x]), passes.default())
    (product,) = quantizable(graph)
    found = calibrate(graph, [x], observed(graph), "minmax", channels={product.input: product.channels})
    means = {node: channels.mean for node, channels in found.channels.items()}
    made = [quantize(graph, found.largest, means=given) for given in (None, means)]
    check_graph(made[1])
    plain, corrected = (float((y(x)[0] - layer(x)).detach().mean(places).norm()) for y in made)
    assert corrected < 0.3 * plain
    options = dict(precision="int8", calibration=[x], quantize_all=True)
    model_trt = torch2rt(layer, [x], bias_correction=True, **options)
    changes = [weight.origin.changes for weight in model_trt._networks[0].weights.values()]
    assert any("corrected for the rounding of the weight" in change for change in changes)


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = {
    r"precision='int4' is not one of 'fp32', .*'int4_weights', 'auto'; what is not quantised": dict(precision="int4"),
    r"precision='fp8' needs calibration=": dict(precision="fp8"),
    r"calibration_method='entropy' is for int8. For fp8": dict(
        calibration_method="entropy", precision="fp8", **CALIBRATED
    ),
    r"calibration is for int8 and fp8; precision='int8_weights' has none": dict(precision="int8_weights", **CALIBRATED),
    r"smooth_quant=1.5 is not a number from 0 to 1": dict(precision="int8", smooth_quant=1.5, **CALIBRATED),
    r"smooth_quant is for int8 and fp8; precision='fp16'": dict(precision="fp16", smooth_quant=0.5),
    r"bias_correction is for int8 and fp8; precision='int4_weights'": dict(
        precision="int4_weights", bias_correction=True
    ),
    r"smooth_quant looks at each channel": dict(precision="fp8", smooth_quant=1, calibration_cache="x", **CALIBRATED),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(InputError, match=message):
        torch2rt(mixed(), [X], **REFUSED[message])


def test_smoothing_needs_products_of_matrices():
    x = torch.randn(1, 3, 8)
    with pytest.raises(InputError, match="the module has none"):
        torch2rt(nn.Conv1d(3, 4, 3).eval(), [x], precision="int8", calibration=[x], smooth_quant=0.5)


WEIGHTS = {
    "its 100 inputs are no multiple of 64": nn.Linear(100, 8),
    "float16 has no scale for its weight of up to": nn.Linear(64, 8),
    "its weight has rows of 7 numbers": nn.Linear(64, 7),
    "its weight has a NaN or an infinity": nn.Linear(64, 8),
}


@pytest.mark.parametrize("reason", WEIGHTS)
def test_weights_that_int4_cannot_hold_are_named(reason):
    layer = WEIGHTS[reason].eval()
    x = torch.randn(3, layer.in_features)
    if "scale" in reason:
        layer.weight.data *= 1e-5
    if "NaN" in reason:
        layer.weight.data[3] = torch.nan
    if "rows" in reason:
        weight = layer.weight.data.T.contiguous()
        graph = run(trace(Product(weight), [x]), passes.default())
    else:
        graph = run(trace(layer, [x]), passes.default())
    made = quantize(graph, {}, format=FORMATS["int4_weights"])
    (text,) = made.meta["torch2rt"].assumptions
    assert "is not quantised" in text and reason in text
    compare(made(x), graph(x), 0, 0)


class Product(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x @ self.weight


def test_a_module_without_products_is_said_to_have_none():
    report = torch2rt(nn.ReLU(), [X], precision="int8", **CALIBRATED).report
    assert report.assumptions[0] == ("nothing is quantised to int8: no convolution or product has a constant weight")


def test_passes_of_a_precision():
    (made,) = Precision("int4_weights").passes({}, lambda graph: [[X]])
    graph = made(run(trace(mixed(), [X]), passes.default()))
    check_graph(graph)
    assert lower(graph, passes=[]).num_layers > 10
