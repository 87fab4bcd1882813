"""Plugins: calls of torch functions as data, TensorRT's classes around them, and what is done where there are none."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from harness.bindings import Unavailable, bindings

import torch2rt as package
from torch2rt import lower, plugin, torch2rt, torch_plugin, trace
from torch2rt.backend.plugins import TorchCall
from torch2rt.backend.tensorrt import has_plugins
from torch2rt.errors import ConversionError, UnsupportedError
from torch2rt.registry import REGISTRY
from torch2rt.vocabulary import plugins

VERSIONS = ["10.3.0", "11.4.0.106"]
LIBRARY = torch.library.Library("torch2rt_test_plugins", "FRAGMENT")
LIBRARY.define("windows(Tensor x, Tensor weight, int size, str mode) -> (Tensor, Tensor)")
LIBRARY.define("doubled(Tensor x) -> Tensor")


def windows(x, weight, size, mode):
    """Sums of windows, half as many as there are places, and the remainders of the places."""
    sums = F.pad(x, (1, size - 2)).unfold(-1, size, 2).sum(-1)
    return (sums * weight if mode == "sum" else sums), x[..., : x.shape[-1] % 4 + 1].half()


def doubled(x):
    return torch.cat([x, x])


for function in (windows, doubled):
    LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torch2rt_test_plugins::{function.__name__}", function, lib=LIBRARY)
OPERATORS = torch.ops.torch2rt_test_plugins


class Windows(torch.nn.Module):
    def forward(self, x, y):
        sums, rest = OPERATORS.windows(torch.relu(x), y, 3, "sum")
        return sums + 1, rest


class Doubled(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(OPERATORS.doubled(torch.relu(x) + 1) * 2)


@pytest.fixture
def _registered():
    """What tests register is taken back."""
    before = dict(REGISTRY.converters), dict(REGISTRY.rewrites)
    yield
    for table, kept in zip((REGISTRY.converters, REGISTRY.rewrites), before, strict=True):
        table.clear()
        table.update(kept)


def call_of(monkeypatch, creator, module=None, inputs=None, **options):
    """The `TorchCall` that a creator's `torch_plugin` makes of a module's call."""
    made = []
    monkeypatch.setattr(plugins, "create", made.append)

    def convert(ctx, x, weight, size, mode):
        creator(ctx, x, weight, size, mode)
        raise ConversionError("this test makes no layer")

    package.converter(OPERATORS.windows)(convert)
    x = torch.randn(2, 3, 9)
    graph = trace(module or Windows(), inputs or [x, torch.randn(3, 5)], **options)
    with pytest.raises(UnsupportedError) as raised:
        lower(graph)
    return made, str(raised.value)


class Builder:
    """TensorRT's builder of expressions, on integers."""

    def constant(self, value):
        return Size(value)

    def operation(self, kind, first, second):
        a, b = first.value, second.value
        found = {
            "SUM": a + b,
            "PROD": a * b,
            "SUB": a - b,
            "MIN": min(a, b),
            "MAX": max(a, b),
            "FLOOR_DIV": a // (b or 1),
        }
        return Size(found[kind.name])


class Size:
    def __init__(self, value):
        self.value = value


@pytest.mark.usefixtures("_registered")
def test_a_call_as_data_computes_what_torch_does(monkeypatch):
    def creator(ctx, x, weight, size, mode):
        return torch_plugin(ctx, f"{__name__}:windows", [x, weight], {"size": size, "mode": mode})

    ranges = {"min_shapes": [(1, 3, 7), (3, 4)], "max_shapes": [(5, 3, 31), (3, 16)]}
    (call,), _ = call_of(monkeypatch, creator, inputs=[torch.randn(2, 3, 9), torch.randn(3, 5)], **ranges)
    call = TorchCall.from_bytes(call.to_bytes())
    assert call.inputs == ["float32", "float32"] and [name for name, _ in call.outputs] == ["float32", "float16"]
    for batch, length in ((1, 7), (4, 12), (5, 31)):
        x, y = torch.randn(batch, 3, length), torch.randn(3, (length + 1) // 2)
        expected = windows(x, y, 3, "sum")
        sizes = call.shapes([list(map(Size, t.shape)) for t in (x, y)], Builder())
        shapes = [[size.value for size in each] for each in sizes]
        assert shapes == [list(t.shape) for t in expected]
        results = [torch.empty(s, dtype=t.dtype) for s, t in zip(shapes, expected, strict=True)]
        call.run([x, y], results)
        torch.testing.assert_close(results, list(expected), rtol=0, atol=0)
    with pytest.raises(ConversionError, match=r"returns torch.float32\[5, 3, 16\], and was recorded to return"):
        call.run([x, y], [results[0][:, :, :3], results[1]])


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        (f"{__name__}:windows", {"size": torch.tensor(3)}, "attributes .* are no numbers, strings, lists and dicts"),
        (f"{__name__}:windows", {"size": (3,)}, "others as JSON"),
        (f"{__name__}:nowhere", {}, "nowhere cannot be imported"),
        ("no_such_package:f", {}, "cannot be imported"),
        (f"{__name__}:VERSIONS", {}, "is not callable"),
    ],
)
def test_calls_that_cannot_be_data(monkeypatch, name, attributes, message):
    def creator(ctx, x, weight, size, mode):
        torch_plugin(ctx, name, [x, weight], attributes)

    made, said = call_of(monkeypatch, creator)
    assert not made
    assert re.search(message, said), said


@pytest.mark.usefixtures("_registered")
def test_types_that_plugins_do_not_take(monkeypatch):
    def creator(ctx, x, weight, size, mode):
        torch_plugin(ctx, f"{__name__}:windows", [x, torch.tensor(True)])

    made, said = call_of(monkeypatch, creator)
    assert not made and "a plugin in torch takes and returns" in said and "not torch.bool" in said


@pytest.mark.usefixtures("_registered")
@pytest.mark.skipif(has_plugins(), reason="this TensorRT has plugins")
def test_without_plugins_the_call_stays_torch():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"torch.relu has a converter, .* override=True"):
        plugin(torch.relu)(lambda ctx, input: None)
    before = REGISTRY.find(torch.relu)
    plugin(torch.relu, override=True)(lambda ctx, input: None)
    assert REGISTRY.find(torch.relu) is before
    plugin(OPERATORS.doubled)(lambda ctx, x: None)
    with pytest.raises(UnsupportedError, match=r"needs TensorRT 10 or 11.* fallback=True it stays a torch call"):
        torch2rt(Doubled(), [x])
    reference = torch2rt(Doubled(), [x], fallback=True, min_segment_calls=1).reference()
    torch.testing.assert_close(reference(x), Doubled()(x), rtol=1e-5, atol=1e-6)


INSIDE = """
import json, sys
from torch2rt.backend.plugins import TorchCall, _classes
from torch2rt.backend.tensorrt import TORCH_DTYPES, has_plugins, trt
outputs = [("float32", [["dim", 0, 0], ["mod", ["dim", 0, 1], 4], 7]), ("int32", [["maximum", ["dim", 0, 1], 2]])]
call = TorchCall("torch.nn.functional:leaky_relu", {"negative_slope": 0.2, "of": "\u00e4" * 300}, ["float16"], outputs)
Plugin, Creator = _classes()
first, creator = Plugin(call), Creator()
assert has_plugins() and first.num_outputs == 2 and creator.name == first.plugin_name == "TorchFunction"
for made in (first.clone(), first.attach_to_context(None)):
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.call.to_bytes() == call.to_bytes() and again.get_capability_interface(None) is again
kinds = [TORCH_DTYPES[kind] for kind in again.get_output_data_types([trt.DataType.HALF])]
class Builder:
    def constant(self, value):
        return str(value)
    def operation(self, kind, a, b):
        return f"{kind.name}({a}, {b})"
class Described:
    def __init__(self, type, format):
        self.desc = self
        self.type, self.format = type, format
linear, other = trt.TensorFormat.LINEAR, trt.TensorFormat.CHW2
half, single = trt.DataType.HALF, trt.DataType.FLOAT
described = [Described(half, linear), Described(single, other), Described(half, linear)]
takes = [again.supports_format_combination(i, described, 1) for i in range(3)]
print(json.dumps([list(map(str, kinds)), call.shapes([["n", "m"]], Builder()), takes]))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrts_classes(version, tmp_path):
    """The plugin itself, in the bindings of TensorRTs that are not installed here."""
    try:
        with bindings("tensorrt_cu12_bindings", version) as environment:
            environment["PYTHONPATH"] += f"{os.pathsep}{os.path.dirname(os.path.dirname(package.__file__))}"
            command = [sys.executable, "-c", INSIDE]
            done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    except Unavailable as error:
        if os.environ.get("CI") and not error.expected:
            raise
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr[-2000:]
    kinds, shapes, takes = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["torch.float32", "torch.int32"] and takes == [True, False, False]
    assert shapes == [["n", "SUB(m, PROD(FLOOR_DIV(m, 4), 4))", "7"], ["MAX(m, 2)"]]
