"""What may be wrong with calibration data and with values: in every format, a right graph or a named reason."""

import functools
import math

import pytest
import torch
from torch import nn

from torch2rt import InputError, passes, torch2rt, trace
from torch2rt.passes.options import Precision
from torch2rt.passes.order import run
from torch2rt.passes.quantization.calibrate import calibrate
from torch2rt.passes.quantization.calibration_file import load
from torch2rt.passes.quantization.products import observed
from torch2rt.passes.quantization.quantized import dequantize, fake_quantize

WAYS = {
    "int8": dict(precision="int8"),
    "int8 mse": dict(precision="int8", calibration_method="mse"),
    "int8 percentile": dict(precision="int8+fp32", calibration_method="percentile"),
    "fp8": dict(precision="fp8"),
    "smooth": dict(precision="int8", smooth_quant=0.5, calibration_method="minmax"),
    "biases": dict(precision="int8", bias_correction=True),
    "auto": dict(precision="auto", tolerance=0.1),
    "int8 weights": dict(precision="int8_weights"),
    "int4 weights": dict(precision="int4_weights"),
}
LIMIT = 0.2  # of eager's norm, on the example


class Two(nn.Module):
    """Two layers, of which one sees what `change` makes of the input."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.change, self.a, self.b, self.c = change, *(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.c(torch.relu(self.a(self.change(x)) + self.b(x)))


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
DATA = [X, torch.randn(40, 64, generator=torch.Generator().manual_seed(1))]


@functools.cache
def traced(model):
    return run(trace(model, [X], max_batch_size=8), passes.default())


def quantised(model, batches, way, **options):
    if not way.endswith("weights"):
        options = dict(calibration=batches, quantize_all=True, **options)
    asked = Precision(**WAYS[way], **options)
    return run(traced(model), asked.passes(dict(model.named_modules()), lambda graph: [[X]]))


@functools.cache
def model_of(name):
    change, weights = VALUES[name]
    model = Two(change).eval()
    with torch.no_grad():
        weights(model)
    return model


def nothing(model):
    pass


def row(factor):
    return lambda model: model.a.weight[3].mul_(factor)


# What the first layer sees, and what becomes of weights.
VALUES = {
    "zeros": (lambda x: x * 0, nothing),
    "a constant": (lambda x: x * 0 + 3, nothing),
    "all negative": (lambda x: -x.abs() - 1, nothing),
    "subnormal": (lambda x: x * 1e-42, nothing),
    "large": (lambda x: x * 1e6, nothing),
    "zero weights": (lambda x: x, lambda model: model.a.weight.zero_()),
    "constant weights": (lambda x: x, lambda model: model.a.weight.fill_(0.3)),
    "a row of zeros": (lambda x: x, row(0.0)),
    "a subnormal row": (lambda x: x, row(1e-42)),
    "a large row": (lambda x: x, row(1e6)),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "int8 mse"])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, way):
    model = model_of(name)
    graph = quantised(model, DATA, way)
    found, expected = graph(X)[0], model(X)
    assert found.isfinite().all()
    assert (found - expected).norm() < LIMIT * expected.norm()


def loader(count):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(count, 64)), batch_size=4)


OUTLIERS = torch.randn(2_000, 64, generator=torch.Generator().manual_seed(2))
OUTLIERS[77, 5] = 3e3
NAN = X.clone()
NAN[3, 7] = torch.nan
BATCHES = {
    "of unequal size": (lambda: [X[:1], DATA[1][:17], X[2:]], None),
    "a generator": (lambda: (part for part in DATA), None),
    "none": (list, "calibration= has no batch"),
    "a generator of none": (lambda: iter(()), "calibration= has no batch"),
    "a loader of none": (lambda: loader(0), "calibration= has no batch"),
    "of no rows": (lambda: [X, X[:0]], r"batch 1 is not what the module takes. Input 'x' has size 0 in dimension 0"),
    "a NaN": (lambda: [X, NAN], "the input 'x' has NaN on the calibration data"),
    "an infinity": (lambda: [X / X.abs().min() * 3e38], "the input 'x' has an infinity on the calibration data"),
    "without the input": (lambda: [[]], "batch 0 is not .* it takes 1 positional arguments and got 0"),
    "labels": (lambda: [(X, torch.zeros(6))], "batch 0 is not .* it takes 1 positional arguments and got 2"),
    "by another name": (lambda: [{"y": X}], "batch 0 is not .* it takes 1 positional arguments and got 0"),
    "arrays": (lambda: [X.numpy()], "batch 0 is not what the module takes. .*ndarray is not a tensor"),
    "half": (lambda: [X.half()], "batch 0 is not what the module takes. Input 'x' is torch.float16"),
    "zeros": (lambda: loader(9), "the input 'x' is up to .* on the example, and up to 0 on the calibration data"),
    "of another kind": (lambda: [X / 255], " is up to .* on the example, and up to .* on the calibration data"),
}
WITH_DATA = [way for way in WAYS if "weights" not in way]


def ways_of(name):
    """All for data that is served or is like no example; what is refused at once is so in the same way."""
    return WITH_DATA if BATCHES[name][1] is None or "example" in BATCHES[name][1] else WITH_DATA[::4]


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in BATCHES for way in ways_of(name)])
def test_batches(name, way):
    make, message = BATCHES[name]
    model = model_of("a row of zeros")
    if message is None:
        found, expected = quantised(model, make(), way)(X)[0], model(X)
        assert (found - expected).norm() < LIMIT * expected.norm()
        return
    with pytest.raises(InputError, match=f"(?s){message}"):
        quantised(model, make(), way)


@pytest.mark.parametrize("way", [way for way in WITH_DATA if way not in ("smooth", "fp8")])
def test_one_outlier(way):
    """One number in a hundred thousand is not what all others are rounded for: they saturate, or stay as they are."""
    model = model_of("all negative")
    graph = quantised(model, [OUTLIERS], way)
    found, expected = graph(X)[0], model(X)
    text = "\n".join(graph.meta["torch2rt"].assumptions)
    if way != "int8 percentile":
        assert "in b: is not quantised: torch.nn.functional.linear, beside its input's largest values" in text
    assert (found - expected).norm() < 2 * LIMIT * expected.norm()
    count = len(graph.graph.find_nodes(op="call_function", target=dequantize))
    assert count == (3 if way == "int8 percentile" else 0)


def test_no_range_is_kept_in_files(tmp_path):
    """What no range fits is known again, from a table that was kept."""
    graph = traced(model_of("all negative"))
    for name in ("table.json", "table.cache"):
        options = dict(calibration_cache=tmp_path / name, calibration_method="minmax", calibration=[OUTLIERS])
        asked = Precision("int8", quantize_all=True, **options)
        run(graph, asked.passes({}, lambda graph: [[X]]))
        kept = load(tmp_path / name, graph, observed(graph))
        assert [value == math.inf for value in kept.values()].count(True) >= 1
        assert Precision("int8", quantize_all=True, calibration_cache=tmp_path / name)._reads_cache


def test_what_is_kept_is_not_looked_at():
    """NaN in a value that nothing is quantised of is the module's own affair."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x):
            return self.a(x), self.b(torch.where(x > 0, x, torch.nan))

    model = Masked().eval()
    with pytest.raises(InputError, match="has NaN on the calibration data"):
        quantised(model, DATA, "int8")
    for way in ("int8", "fp8", "biases", "smooth"):
        graph = quantised(model, DATA, way, keep_float=["b"])
        assert graph(X)[1].isnan().all()
        assert 0 < (graph(X)[0] - model(X)[0]).norm() < LIMIT * model(X)[0].norm()


def test_rare_channels_stay_small_when_they_are_smoothed():
    """A channel that is 0 in the data, or nearly, does not become the largest at other inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    data = torch.randn(50, 64)
    data[:, 3], data[:, 5] = 0.0, data[:, 5] * 1e-4
    for strength in (0.5, 1.0):
        options = dict(precision="int8", calibration_method="minmax", smooth_quant=strength, quantize_all=True)
        graph = run(trace(model, [X]), passes.default())
        asked = Precision(calibration=[data], **options)
        graph = run(graph, asked.passes({}, lambda graph: [[data]]))
        rare = data.clone()
        rare[:, 3], rare[:, 5] = 0.7, 0.7
        assert (graph(rare[:6])[0] - model(rare[:6])).norm() < 0.1 * model(rare[:6]).norm()


def test_likeness_of_examples():
    """An example is made up, and may be larger by some factor; where a layer sees 0 it may be anything."""
    graph = traced(model_of("all negative"))
    nodes = observed(graph)
    assert calibrate(graph, [X], nodes, "minmax", examples=[[X * 20]]).largest
    with pytest.raises(InputError, match="an example such as that"):
        calibrate(graph, [X], nodes, "minmax", examples=[[X * 200]])
    assert calibrate(graph, [X], nodes, "minmax", examples=[[X * 200]], needless=nodes).largest
    rare = nn.Sequential(nn.Hardtanh(), nn.Threshold(0.9, 0.0), nn.Linear(64, 5)).eval()
    graph = run(trace(rare, [X]), passes.default())
    assert calibrate(graph, [X.clamp(-0.5, 0.5)], observed(graph), examples=[[X]]).largest == {"_threshold": 0.0}


class Memory(nn.Module):
    """A layer of the input and of what the last call has left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("last", torch.ones(4, 16) * 2)

    def forward(self, x):
        y = self.layer(x + self.last)
        self.last.copy_(y)
        return self.head(y)


@pytest.mark.parametrize("make", [list, iter])
def test_data_of_modules_with_state(make):
    """Each batch begins with the state that the module has, and paths are the module's."""
    data = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = dict(calibration=make(data), keep_float=["head"], quantize_all=True, calibration_method="minmax")
    model_trt = torch2rt(Memory().eval(), [data[0]], state="explicit", precision="int8", **options)
    (node,) = model_trt._networks[0].lowered.graph.find_nodes(op="call_function", target=fake_quantize)
    assert node.args[1] == pytest.approx(max(float((x + 2).abs().max()) for x in data) / 127)
    found = model_trt.reference()(data[1], state={"last": torch.ones(4, 16) * 2})[0]
    expected = Memory()(data[1])
    assert (found - expected).norm() < LIMIT * expected.norm()
