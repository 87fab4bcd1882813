"""int8: calibration on data, what it makes of a graph, and that TensorRT computes it in int8."""

import json
import math
from unittest import mock
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import compare
from harness.layers import kernels
from torch import nn

from torch2rt import InputError, lower, passes, torch2rt, trace
from torch2rt.backend.quirks import builds_int8_convolutions
from torch2rt.backend.tensorrt import IS_RTX
from torch2rt.graph import check_graph
from torch2rt.passes.options import Precision
from torch2rt.passes.order import run
from torch2rt.passes.precision import mixed_precision
from torch2rt.passes.quantization import quantize as quantize_file
from torch2rt.passes.quantization.calibrate import calibrate
from torch2rt.passes.quantization.calibrated import ranges_of
from torch2rt.passes.quantization.calibration_file import fingerprint, names
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.histogram import BINS, METHODS, Histogram, entropy, mse, percentile
from torch2rt.passes.quantization.products import observed, quantizable, skips
from torch2rt.passes.quantization.quantize import quantize
from torch2rt.passes.quantization.quantized import dequantize, fake_quantize, quantized, scaled
from torch2rt.passes.ranges import measure


def quantized_graph(model, inputs, precision="int8", **options):
    graph = run(trace(model.eval(), inputs, **options), passes.default())
    asked = Precision(precision, calibration=[inputs], quantize_all=True)
    return run(graph, asked.passes(dict(model.named_modules()), lambda graph: [inputs]))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x).relu(), self.b(x)], 1))


PATTERNS = {
    "conv, norm, relu": (nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()), (3, 12, 10)),
    "conv1d": (nn.Sequential(nn.Conv1d(8, 16, 3), nn.ReLU(), nn.Conv1d(16, 4, 3)), (8, 20)),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 16, 3), nn.ReLU()), (4, 6, 6, 6)),
    "groups": (nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.SiLU(), nn.Conv2d(16, 32, 1, groups=4)), (16, 9, 10)),
    "patches": (nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.Flatten(2)), (3, 16, 8)),
    "single places": (nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1)), (16, 1, 1)),
    "residual": (nn.Sequential(nn.Conv2d(3, 16, 3), Residual(16), Residual(16)), (3, 12, 12)),
    "max pool": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3)), (8, 12, 12)),
    "concatenation": (Joined(), (8, 12, 10)),
    "linear": (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), (64,)),
    "linear on tokens": (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128, bias=False)), (5, 64)),
    "encoder": (nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, activation="gelu"), (16, 64)),
}
NARROW = {"Half", "BFloat16", "Float"}


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "int8") for name in PATTERNS),
        *((n, p) for n in ("residual", "linear") for p in ("int8+bf16", "int8+fp32")),
    ],
)
def test_tensorrt_computes_products_in_int8(name, precision):
    """Each has a kernel of its own that reads int8 and int8 weights, and no other kernel reads a weight."""
    model, size = PATTERNS[name]
    if (
        any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in model.modules())
        and not builds_int8_convolutions()
    ):
        pytest.skip("this TensorRT has no int8 convolutions")
    torch.manual_seed(0)
    inputs = [torch.randn(2, *size)]
    dynamic = {"max_batch_size": 4} if name in ("linear", "linear on tokens", "conv1d", "max pool") else {}
    graph = quantized_graph(model, inputs, precision, **dynamic)
    check_graph(graph)
    count = len(quantizable(run(trace(model.eval(), inputs), passes.default())))
    made = kernels(lower(graph, passes=[]))
    products = [k for k in made if k.type in ("gemm", "correlation")]
    assert len(products) == count, "\n".join(map(str, made))
    assert all(k.inputs[0] == k.constants[0] == "Int8" for k in products), "\n".join(map(str, made))
    assert all(k.type in ("kgen", "shape_call") or "mha" in k.name or k in products for k in made)
    if precision != "int8+fp32" and ("linear" in name or name == "encoder"):
        assert all(k.outputs != ["Float"] for k in products), "\n".join(map(str, made))
    if name == "residual":  # the skip connection is read as it is
        assert sum("Int8" in k.inputs for k in made if k.type == "kgen") == 2


class Spellings(nn.Module):
    """Products of one value in each spelling; of one weight a row is 0, and one is much larger than the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.plain = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
        self.linear.weight.data[1], self.linear.weight.data[2] = 0.0, 500.0

    def forward(self, x):
        products = x @ self.weight, torch.mm(x, self.weight), torch.addmm(self.bias, x, self.weight)
        return *products, self.linear(x), self.plain(x), torch.addmm(self.bias, x, self.weight, alpha=2)


@pytest.mark.parametrize("largest", [4.0, 3e3])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_outputs_are_scaled_behind_products(format, largest):
    """Where the sums, all as large as the largest weight makes them, cannot overflow float16."""
    x = torch.randn(5, 8) * largest / 4
    graph = run(trace(Spellings().eval(), [x]), passes.default())
    ranges = {node.name: largest for node in observed(graph)}
    made = quantize(graph, ranges, format=FORMATS[format])
    check_graph(made)
    assert check_scaled(made) == ([True, True, True, largest == 4.0, True])
    with mock.patch.object(quantize_file, "scale_outputs", lambda graph: 0):
        plain = quantize(graph, ranges, format=FORMATS[format])
    assert not any(check_scaled(plain))
    for ours, theirs in zip(made(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest)
    low = mixed_precision(made, torch.float16, ranges=ranges_of(made, measure(graph, [[x]])))
    for ours, theirs in zip(low(x), plain(x), strict=True):
        assert ours.isfinite().all() and (ours - theirs).norm() < 2e-3 * theirs.norm()


class Levels(nn.Module):
    """The mean of each channel has as many numbers as the batch it was traced with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y + y.relu().mean((0, 2, 3))[:, None, None], y + y.flip(2)


def test_sizes_stay_dynamic():
    """What is equal for the sizes of the trace alone is not compared."""
    x = torch.randn(2, 3, 5, 5)
    graph = run(trace(Levels().eval(), [x], max_batch_size=9), passes.default())
    added = [n for n in graph.graph.nodes if n.op == "call_function" and "add" in str(n.target)]
    found = skips(graph, {product.node for product in quantizable(graph)})
    assert len(added) == 2 and list(found) == [] and len(observed(graph)) == 1  # the convolution has several users
    environment = added[0].meta["val"].fake_mode.shape_env
    assert not environment.replacements
    made = quantize(graph, {node.name: 4.0 for node in observed(graph)})
    assert not environment.replacements and made(torch.randn(7, 3, 5, 5))[0].shape == (7, 4, 5, 5)


def check_scaled(graph):
    """Of the products in their order, but for the last, which has a factor: whether their outputs are scaled."""
    nodes = [n for n in graph.graph.nodes if n.target in (scaled, F.linear, torch.mm, torch.addmm, torch.matmul)]
    nodes = [n for n in nodes if not any(user.target is scaled for user in n.users)]
    assert [n.target for n in nodes][-1] is torch.addmm
    return [n.target is scaled for n in nodes[:-1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["int8", "int8+fp32"])
def test_conversions(method, precision, device):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5)).eval().to(device)
    batches = [torch.randn(8, 3, 16, 14, device=device) for _ in range(3)]
    x = torch.randn(3, 3, 16, 14, device=device)
    options = dict(
        precision=precision, calibration=batches, calibration_method=method, max_batch_size=4, quantize_all=True
    )
    model_trt = torch2rt(model, [x], **options)
    report = model_trt.report
    assert (
        report.verified is not None and "output_0 is quantised: on the example it is off by" in report.assumptions[-1]
    )
    ours, theirs = (model_trt if device.type == "cuda" else model_trt.reference())(x), model(x)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert (ours - theirs).norm() > 1e-3 * theirs.norm()


def test_weights_do_not_saturate():
    weight = torch.randn(5, 3, 2) * torch.tensor([1.0, 1e3, 1e-3, 0.0, 1e-45])[:, None, None]
    for axis in (0, 1):
        values, scale = quantized(weight, axis)
        back = dequantize(values, scale, axis, torch.float32)
        assert values.dtype is torch.int8 and values.shape == weight.shape and len(scale) == weight.shape[axis]
        shape = [-1 if dim == axis else 1 for dim in range(3)]
        assert ((back - weight).abs() <= scale.reshape(shape) * 0.501).all()
        assert values.abs().amax() == 127 and (scale > 0).all()


# Ranges ---------------------------------------------------------------------------------------------------------------


def normal(count=10**6, seed=0):
    histogram = Histogram()
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    for batch in x.split(count // 4):
        histogram.add(batch)
    return histogram, x


def as_published(histogram):
    """The entropy method as NVIDIA's pytorch-quantization has it, in its own words, for 8 bits and no unsigned."""
    bins, edges = histogram.counts.copy(), histogram.edges
    bins[0] = bins[1]
    divergences, thresholds = [], []
    for i in range(128, len(bins) + 1):
        space = np.linspace(0, i, num=129)
        digitized = np.digitize(range(i), space) - 1
        digitized[bins[:i] == 0] = -1
        sums, counts = np.zeros(128), np.zeros(128)
        for place, number in zip(digitized, bins[:i]):
            if place >= 0:
                sums[place] += number
                counts[place] += 1
        means = np.divide(sums, counts, out=np.zeros(128), where=counts > 0)
        q = np.where(digitized >= 0, means[digitized], 0)
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences.append(np.where(p > 0, p * np.log(p / q), 0).sum())
        thresholds.append(edges[i])
    return thresholds[len(divergences) - 1 - int(np.argmin(divergences[::-1]))]


def test_methods_on_normal_numbers():
    histogram, x = normal()
    largest = float(x.abs().max())
    assert histogram.largest == largest and histogram.counts.sum() == 10**6
    assert percentile(histogram) == pytest.approx(x.abs().quantile(0.9999).item(), abs=2 * histogram.width)
    assert mse(histogram) == pytest.approx(4.0, abs=0.3)
    assert 3.5 < entropy(histogram) < largest
    assert METHODS["minmax"](histogram) == largest


def test_entropy_is_the_published_one():
    histogram = Histogram()
    torch.manual_seed(3)
    histogram.add(torch.cat([torch.randn(40_000), torch.randn(60) * 4]))
    histogram.counts, histogram.width = (
        histogram.counts.reshape(512, 4).sum(1),
        histogram.width * 4,
    )  # so that it is quick
    assert entropy(histogram) == pytest.approx(as_published(histogram), abs=1e-9)


def test_one_outlier_in_a_million():
    histogram, _ = normal()
    histogram.add(torch.tensor([3000.0]))
    assert METHODS["minmax"](histogram) == 3000
    assert percentile(histogram) < 6 and entropy(histogram) == pytest.approx(3000, rel=1e-4)
    assert len(histogram.counts) <= 32 * BINS and histogram.counts.sum() == 10**6 + 1


def test_a_histogram_grows():
    histogram = Histogram()
    histogram.add(torch.zeros(7))
    histogram.add(torch.tensor([]))
    assert histogram.largest == 0 and not len(histogram.counts)
    histogram.add(torch.tensor([1.0, -0.5]))
    assert histogram.counts[0] == 7 and histogram.counts[-1] == 1 and len(histogram.counts) == BINS
    histogram.add(torch.tensor([-2.0]))
    assert len(histogram.counts) == 2 * BINS and histogram.counts[-1] == 1 and histogram.counts[BINS - 1] == 1
    histogram.add(torch.tensor([1e9]))
    assert histogram.counts.sum() == 11 and histogram.largest == 1e9 and len(histogram.counts) <= 32 * BINS
    histogram.add(torch.tensor([3.0, -torch.inf]))
    assert histogram.not_finite == "an infinity"


# Files ----------------------------------------------------------------------------------------------------------------


def two_layers(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


X = torch.randn(2, 6)


@pytest.mark.parametrize("file", ["table.json", "calibration.cache"])
def test_a_calibration_is_kept_and_read(file, tmp_path):
    path = tmp_path / file
    batches = [torch.randn(5, 6) for _ in range(4)]
    options = dict(precision="int8", calibration_cache=path, quantize_all=True)
    first = torch2rt(two_layers(), [X], calibration=batches, **options).reference()(X)
    text = path.read_text()
    if file.endswith(".json"):
        table = json.loads(text)
        assert list(table["largest"]) == ["input", "1.relu"] and table["method"] == "entropy"
        assert table["largest"]["input"] == max(float(batch.abs().max()) for batch in batches)
    else:
        header, *lines = text.splitlines()
        assert header.startswith("TRT-") and header.endswith("-EntropyCalibration2")
        assert [line.split(":")[0] for line in lines] == ["input", "1.relu"] and len(lines[0].split(": ")[1]) == 8
    again = torch2rt(two_layers(), [X], **options).reference()(X)
    torch.testing.assert_close(again, first, rtol=0, atol=0 if file.endswith(".json") else 1e-2)
    if file.endswith(".json"):
        table["largest"]["1.relu"] /= 50
        path.write_text(json.dumps(table))
        assert (torch2rt(two_layers(), [X], **options).reference()(X) - first).abs().max() > 1e-2
    with pytest.raises(InputError, match="belongs to another module"):
        torch2rt(nn.Sequential(nn.ReLU(), nn.Linear(5, 4)).eval(), [torch.randn(1, 5)], **options)


def test_tensorrts_own_cache_is_read(tmp_path):
    path = tmp_path / "cache"
    path.write_text("TRT-8601-EntropyCalibration2\ninput: 3c010a14\n1.relu: 3d000000\nother: 3c000000\n")
    model_trt = torch2rt(two_layers(), [X], int8_mode=True, int8_calib_cache=path, quantize_all=True)
    scales = list(_scales(model_trt.network))
    assert scales == pytest.approx([0.0078759, 0.03125], rel=1e-4)


def _scales(network):
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "QUANTIZE":
            yield float(np.frombuffer(np.asarray(_constant(network, layer.get_input(1))), np.float32)[0])


def _constant(network, tensor):
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.get_output(0).name == tensor.name:
            layer.__class__ = __import__("torch2rt.backend.tensorrt", fromlist=["trt"]).trt.IConstantLayer
            return layer.weights
    raise AssertionError


FILES = {
    "TRT-8601-EntropyCalibration2\ninput: 3c010a14\n": "has no '1.relu'",
    "TRT-8601-EntropyCalibration2\ninput: nonsense\n": "line 2: 'input: nonsense' is no scale",
    "{": "is no calibration: JSONDecodeError",
    '{"format": "other", "largest": {}}': "has the format 'other'",
    '{"format": "torch2rt calibration 1", "graph": "x", "largest": {"input": 1}}': "belongs to another module",
}


@pytest.mark.parametrize("text", FILES)
def test_files_that_are_refused(text, tmp_path):
    (path := tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=FILES[text]):
        torch2rt(two_layers(), [X], precision="int8", calibration_cache=path)


def test_names_and_fingerprints():
    graphs = [
        run(trace(two_layers(width), [X], max_batch_size=n), passes.default()) for width, n in ((8, 2), (8, 4), (9, 2))
    ]
    assert fingerprint(graphs[0]) == fingerprint(graphs[1]) != fingerprint(graphs[2])
    twice = nn.Sequential(relu := nn.ReLU(), nn.Linear(6, 6), relu, nn.Linear(6, 2))
    graph = run(trace(twice, [X]), passes.default())
    assert list(names(graph, observed(graph))) == ["0.relu", "0.relu.1"]


# What may be wrong with data ------------------------------------------------------------------------------------------


class Dead(nn.Module):
    """A layer whose input is always 0 beside one whose input is always negative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dead, self.alive = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.dead(x.abs() * 0) + self.alive(-x.abs() - 1)


def test_what_cannot_be_quantised_is_named(device):
    x = X.to(device)
    model_trt = torch2rt(Dead().eval().to(device), [x], precision="int8", calibration=[x, x * 3], quantize_all=True)
    (text,) = [t for t in model_trt.report.assumptions if "is not quantised" in t]
    assert "in dead: is not quantised: torch.nn.functional.linear, the range of its input is 0 on the" in text
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), Dead().to(device)(x), 0.05, 0.05)


def test_what_is_kept_in_floating_point():
    options = dict(precision="int8", calibration=[X], quantize_all=True)
    for option, dtype in (("keep_float", torch.float16), ("keep_fp32", torch.float32)):
        network = torch2rt(two_layers(), [X], **options, **{option: ["2"]})._networks[0]
        kinds = [kind for _, kind in network.facts()["layers"]]
        assert kinds.count("QUANTIZE") == 1
        assert any(w.tensor.dtype is dtype and w.origin.parameter == "2.weight" for w in network.weights.values())


NAN = torch.tensor([[1.0, torch.nan, 2, 3, 4, 5]])
DATA = {
    r"precision='int8' needs calibration=": dict(),
    r"calibration= has no batch": dict(calibration=[]),
    r"calibration= is a list of samples, .*not a Tensor": dict(calibration=X),
    r"the input 'input' has NaN on the calibration data": dict(calibration=[X, NAN], quantize_all=True),
    r"the input 'input' has an infinity": dict(calibration=[X / 0], quantize_all=True),
    r"batch 1 is not what the module takes. The call does not have the form": dict(calibration=[X, [X, X]]),
    r"batch 0 is not what the module takes. .*has 3 dimensions": dict(calibration=[X[None]]),
    r"batch 0 is not what the module takes. .*is torch.int64": dict(calibration=[X.long()]),
    r"batch 0 is not what the module takes. .*has size 5 in dimension 1": dict(calibration=[X[:, :5]]),
    r"calibration_method='best' is not one of": dict(calibration=[X], calibration_method="best"),
    r"int8_calib_algorithm='best' is none of": dict(int8_mode=True, int8_calib_algorithm="best", precision=None),
    r"calibration is for int8 and fp8; precision='fp16' has none": dict(precision="fp16", calibration=[X]),
    r"quantize_all is for int8 and fp8": dict(precision="int8_weights", quantize_all=True),
    r"keep_float is for quantised products": dict(precision="fp16", keep_float=["0"]),
    r"io_precision is for a low precision": dict(precision="int8+fp32", io_precision="fp16", calibration=[X]),
    r"keep_float: '7' means no call": dict(calibration=[X], keep_float=["7"]),
}


@pytest.mark.parametrize("message", DATA)
def test_refused(message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        torch2rt(two_layers(), [X], **{"precision": "int8", **DATA[message]})


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x, *, bias):
        return self.linear(x * 2) + bias


def test_batches_of_any_kind_and_size():
    graph = run(trace(two_layers(), [X], max_batch_size=3), passes.default())
    nodes, data = observed(graph), torch.randn(11, 6)
    expected = calibrate(graph, [data[i : i + 1] for i in range(11)], nodes, "minmax").largest
    dataset = torch.utils.data.TensorDataset(data)
    for batches in (
        [data],
        [[data[:4]], (data[4:],)],
        (part for part in data.split(4)),
        torch.utils.data.DataLoader(dataset, batch_size=4),
        dataset,
    ):
        if batches is dataset:
            batches = [[x[None]] for (x,) in dataset]
        assert calibrate(graph, batches, nodes, "minmax").largest == expected
    static = run(trace(two_layers(), [X]), passes.default())
    assert calibrate(static, [data], observed(static), "minmax").largest == pytest.approx(expected)


def test_keywords_and_dicts():
    model, kwargs = TwoInputs().eval(), {"bias": torch.ones(2, 3)}
    batches = [{"x": torch.full((2, 6), 5.0), "bias": torch.zeros(2, 3)}]
    graph = run(trace(model, [X], kwargs=kwargs), passes.default())
    assert calibrate(graph, batches, observed(graph), "minmax").largest == {observed(graph)[0].name: 10.0}
    with pytest.raises(InputError, match=r"batch 0 is not what the module takes.*bias"):
        torch2rt(model, [X], kwargs=kwargs, precision="int8", calibration=[{"x": X}])
    options = dict(int8_mode=True, int8_calib_dataset=[[X[:1]], [X[1:]]], int8_calib_batch_size=2)
    assert torch2rt(two_layers(), [X], int8_calib_algorithm="ENTROPY_CALIBRATION_2", **options).report.verified


def test_a_graph_is_quantised_without_being_changed():
    graph = run(trace(two_layers(), [X]), passes.default())
    text, (first, second) = str(graph.graph), observed(graph)
    made = quantize(graph, {first.name: 3.0, second.name: math.inf})
    assert str(graph.graph) == text
    check_graph(made)
    assert [n.args for n in made.graph.find_nodes(op="call_function", target=fake_quantize)] == [(ANY, 3.0 / 127)]
    ours, theirs = made(X)[0], graph(X)[0]
    assert 0 < (ours - theirs).abs().max() < 0.1
    origins = [n.meta["made_of"] for n in made.graph.find_nodes(op="get_attr") if "made_of" in n.meta]
    assert {origin.parameter for origin in origins} == {"0.weight"}
