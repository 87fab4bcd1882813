"""Conversions are compared with their modules: wrong ones are found and named, right ones never blamed."""

import contextlib
import copy
import dataclasses
import functools
import json
import random

import numpy as np
import pytest
import torch
from harness import With, zoo
from test_module import COPIES
from test_tracing import module
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from torch2rt import AccuracyError, InputError, TRTModule, build, torch2rt, trace
from torch2rt.debug import inputs as verification_inputs
from torch2rt.debug import verify as verification
from torch2rt.debug.bisection import OfEngine
from torch2rt.debug.comparison import Comparison, is_near
from torch2rt.debug.disturbance import Disturbed
from torch2rt.engine.report import Report
from torch2rt.registry import load
from torch2rt.runtime.module import ReferenceModule
from torch2rt.vocabulary import elementwise, trt


@contextlib.contextmanager
def wrong(target, change, number=0):
    """The converter of a call gives something else for the `number`-th such call of a network."""
    registry, calls = load(), {}
    before = registry.find(target)

    def function(ctx, *args, **kwargs):
        result = before.function(ctx, *args, **kwargs)
        count = calls[id(ctx)] = calls.get(id(ctx), (ctx, -1))[0], calls.get(id(ctx), (ctx, -1))[1] + 1
        return change(ctx, result) if count[1] == number else result

    targets = [t for t, converter in registry.converters.items() if converter is before]
    registry.converters.update(dict.fromkeys(targets, dataclasses.replace(before, function=function)))
    try:
        yield
    finally:
        registry.converters.update(dict.fromkeys(targets, before))


def times(factor):
    return lambda ctx, x: elementwise(ctx, trt.ElementWiseOperation.PROD, x, factor)


def plus(number):
    return lambda ctx, x: elementwise(ctx, trt.ElementWiseOperation.SUM, x, number)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(3 * size, size)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *[Block(8) for _ in range(4)], nn.Linear(8, 5)).eval()


def convolutions():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6, 6, 6)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


FAULTS = {  # a model, an example, the call that is wrong, how, which of them, and the path of its module
    "linear": (network(), torch.randn(3, 6), F.gelu, times(1.0003), 2, "3"),
    "a norm": (network(), torch.randn(3, 6), torch.layer_norm, plus(1e-4), 1, "2.norm"),
    "dynamic": (network(), torch.randn(3, 6), F.gelu, times(1.001), 0, "1"),
    "convolutions": (convolutions(), torch.randn(2, 3, 7, 9), F.relu, plus(1e-4), 1, "1.2"),
    "a fused norm": (convolutions(), torch.randn(2, 3, 7, 9), torch.conv2d, times(0.999), 2, "2.1"),
    "attention": (
        encoder(),
        torch.randn(2, 5, 8),
        F.scaled_dot_product_attention,
        times(1.001),
        1,
        "layers.1.self_attn",
    ),
    "float16": (network().half(), torch.randn(3, 6).half(), F.gelu, times(1.5), 1, "2"),
    "bfloat16": (network().bfloat16(), torch.randn(3, 6).bfloat16(), F.gelu, times(3.0), 1, "2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_converter_is_found_and_named(name):
    model, x, target, change, number, path = FAULTS[name]
    sizes = {"max_batch_size": 4} if name == "dynamic" else {}
    with wrong(target, change, number), pytest.raises(AccuracyError, match=r"output_0: error .* allowed") as info:
        torch2rt(model, [x], **sizes)
    assert info.value.module == path, str(info.value)
    assert f"'{path}'" in str(info.value)
    assert info.value.source and info.value.source.rsplit(":", 1)[1].isdigit()
    assert info.value.differences[0].error > info.value.differences[0].allowed > 0
    assert torch2rt(model, [x], **sizes).report.verified.differences[0].output == "output_0"


def test_a_wrong_trace_is_told_from_a_wrong_converter(monkeypatch):
    """A module that is something else in a trace."""

    class Liar(nn.Module):
        def forward(self, x):
            return x.sin() if type(x) is torch.Tensor else x.cos()

    with pytest.raises(AccuracyError, match="traced as something else") as info:
        torch2rt(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), Liar()), nn.Linear(4, 2)), [torch.randn(2, 3)])
    assert info.value.module == "1.1"


def test_boxes_do_not_hide_probabilities():
    """A detector's output has pixels and probabilities side by side."""
    made = module(lambda self, x: torch.cat([x[:, :4].exp2() * 640, x[:, 4:].sigmoid() * 1e-3], 1))
    x = torch.rand(2, 44, 50)
    with wrong(torch.Tensor.sigmoid, times(1.001)), pytest.raises(AccuracyError) as info:
        torch2rt(made, [x])
    assert info.value.differences[0].allowed < 1e-7
    assert torch2rt(made, [x]).report.verified


ILL = {
    "a difference of large numbers": (lambda self, x: (x.cumsum(1) + 1e6 - 1e6).softmax(1), torch.randn(3, 50)),
    "amplified": (lambda self, x: ((x @ self.a) @ self.b).sin(), torch.randn(3, 20)),
    "a small variance": (lambda self, x: F.layer_norm(x * 1e-3 + 7, (20,), eps=1e-12), torch.randn(3, 20)),
    "far off": (lambda self, x: (x * 1e5).sin(), torch.randn(3, 20)),
    "jumps": (lambda self, x: (x @ self.a).mul(1e4).round() % 7, torch.randn(30, 20)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ILL)
def test_ill_conditioned_networks_are_not_blamed(name, dtype):
    torch.manual_seed(1)
    function, x = ILL[name]
    made = module(function, a=torch.randn(20, 20), b=torch.randn(20, 20) * 1e3).to(dtype)
    assert torch2rt(made, [x.to(dtype)]).report.verified


def test_a_result_whose_size_a_disturbance_changes_teaches_nothing():
    actual, expected = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    comparison = Comparison(actual, expected)
    comparison.learn(expected, torch.tensor([1.0, 2.0, 3.0]), 8.0)
    comparison.learn(torch.tensor([1.0]), torch.tensor([2.0]), 8.0)
    assert not comparison.passes()
    assert not is_near(torch.ones(3), torch.ones(2))


def test_complex_results_learn_from_disturbances():
    expected = torch.tensor([1.0 + 2.0j, -3.0j])
    comparison = Comparison(expected + 1e-4, expected)
    assert not comparison.passes()
    comparison.learn(expected, expected - 1e-4j, 1.0)
    assert comparison.passes() and comparison.worst()[1] == pytest.approx(3e-4, rel=0.01)


def test_what_says_little_is_noted():
    comparison = Comparison(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    comparison.learn(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 1.5]), 8.0)
    assert comparison.passes() and "more than its largest value" in comparison.doubt
    (note,) = torch2rt(module(lambda self, x: x * 0), [torch.randn(3, 20)]).report.verified.notes
    assert "output_0 has no number but 0" in note


def test_a_nan_in_a_disturbed_run_excuses_nan_alone():
    """The disturbance goes past the end of a function's domain, where the module's own number is finite."""
    nan = float("nan")
    for actual, passes in ((nan, True), (2.0, False), (float("inf"), True)):
        comparison = Comparison(torch.tensor([1.0, actual]), torch.tensor([1.0, 0.0]))
        comparison.learn(torch.tensor([1.0, 0.0]), torch.tensor([1.0, nan]), 8.0)
        assert comparison.passes() == passes


INTEGERS = {
    "ties": lambda self, x: (x @ self.a).argmax(-1),
    "rounded": lambda self, x: (x @ self.a * 255).round().to(torch.int32),
    "compared": lambda self, x: x @ self.a > 0.25,
    "order": lambda self, x: (x @ self.a).sort(-1),
    "chosen": lambda self, x: (x @ self.a).topk(3, -1),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    torch.manual_seed(0)
    column = torch.randn(20, 1)
    made = module(INTEGERS[name], a=(column + 1e-7 * torch.randn(20, 8)) if name == "ties" else torch.randn(20, 8))
    report = torch2rt(made, [torch.randn(500, 20)]).report
    assert all(d.error <= max(d.allowed, 20) for d in report.verified.differences)


def test_wrong_integers_are_found():
    made = module(lambda self, x: ((x @ self.a).argmax(-1), (x * 2).int()), a=torch.randn(20, 8))
    with wrong(torch.Tensor.int, plus(1)), pytest.raises(AccuracyError, match="output_1: error") as info:
        torch2rt(made, [torch.randn(7, 20)])
    (difference,) = info.value.differences
    assert (difference.output, difference.error) == ("output_1", 140)


def test_nan_and_infinities_must_be_where_the_modules_are():
    x = torch.tensor([[1.0, -1.0, 0.0, float("nan"), float("inf"), 4.0]])
    made = module(lambda self, x: (x.sqrt(), x.log(), x / x))
    report = torch2rt(made, [x]).report
    assert [d.error for d in report.verified.differences] == [0.0, 0.0, 0.0] or report.verified
    no_nan = lambda ctx, y: elementwise(ctx, trt.ElementWiseOperation.MAX, y, 0.0)  # noqa: E731
    with wrong(torch.Tensor.sqrt, lambda ctx, y: times(0.0)(ctx, no_nan(ctx, y))), pytest.raises(AccuracyError):
        torch2rt(made, [x])


def test_nested_results_and_arguments():
    def forward(self, x, *, more):
        return {"a": (x + more["y"], [more["y"] * 2, None]), "n": 3, "same": x + more["y"], "size": x.shape[0]}

    model_trt = torch2rt(
        module(forward),
        [torch.randn(2, 3)],
        kwargs={"more": {"y": torch.randn(3)}},
        min_shapes=[(1, 3), (3,)],
        max_shapes=[(4, 3), (3,)],
        verify="range",
    )
    verified = model_trt.report.verified
    assert {d.shapes[0][0] for d in verified.differences} >= {1, 2, 4}
    assert all(d.shapes[1] == [3] for d in verified.differences)


# Which inputs --------------------------------------------------------------------------------------------------------


def test_range_finds_what_the_example_does_not_show():
    """Wrong for large values only, and for sizes from 4 on."""
    by_size = module(lambda self, x: F.relu(x))
    clip = lambda ctx, y: elementwise(ctx, trt.ElementWiseOperation.MIN, y, 2.9)  # noqa: E731
    x = torch.full((2, 3), 1.0)
    x[0, 0] = 3.0
    with wrong(F.relu, clip):
        with pytest.raises(AccuracyError):
            torch2rt(by_size, [x])
        x[0, 0] = 2.0
        assert torch2rt(by_size, [x], verify=True)

    with wrong(F.relu, times_rows), pytest.raises(AccuracyError, match=r"for drawn inputs float32\[\d+, 3\]"):
        torch2rt(by_size, [torch.randn(2, 3)], max_batch_size=9, verify="range")


def times_rows(ctx, y):
    """Wrong where there are more than three rows."""
    from torch2rt.vocabulary import dims, shape_tensor

    rows = ctx.network.add_shape(y).get_output(0)
    rows = ctx.network.add_slice(rows, (0,), (1,), (1,)).get_output(0)
    rows = ctx.network.add_cast(rows, trt.DataType.FLOAT).get_output(0)
    clipped = ctx.network.add_elementwise(
        rows,
        ctx.network.add_constant((1,), trt.Weights(np.array([3.0], np.float32))).get_output(0),
        trt.ElementWiseOperation.MIN,
    ).get_output(0)
    share = ctx.network.add_elementwise(clipped, rows, trt.ElementWiseOperation.DIV).get_output(0)
    shuffle = ctx.network.add_shuffle(share)
    shuffle.reshape_dims = (1, 1)
    scaled = ctx.network.add_elementwise(y, shuffle.get_output(0), trt.ElementWiseOperation.PROD).get_output(0)
    return ctx.track(scaled, dims(ctx, y)) if shape_tensor else scaled


def test_sizes_of_the_range_are_those_that_are_served():
    class Halves(nn.Module):
        def forward(self, x, y):
            return (F.max_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3) + x) * y[:, None, None, None]

    example = [torch.randn(2, 3, 8, 8), torch.randn(2)]
    model_trt = torch2rt(
        Halves(), example, min_shapes=[(1, 3, 4, 4), (1,)], max_shapes=[(5, 3, 16, 16), (5,)], verify="range"
    )
    shapes = [d.shapes for d in model_trt.report.verified.differences]
    assert all(x[0] == y[0] and x[2] % 2 == x[3] % 2 == 0 for x, y in shapes)
    assert len(shapes) >= 4 and [[1, 3, 4, 4], [1]] in shapes and [[5, 3, 16, 16], [5]] in shapes


def test_sizes_that_the_module_refuses_must_not_be_served():
    class Small(nn.Module):
        def forward(self, x):
            if not _get_current_function_mode_stack() and x.shape[0] > 4:  # which a trace does not see
                raise ValueError("too large")
            return x + 1

    with pytest.raises(AccuracyError, match=r"serves sizes that the module refuses: .* float32\[9, 3\]"):
        torch2rt(Small(), [torch.randn(2, 3)], max_batch_size=9, verify="range")


def test_values_that_the_module_refuses_are_no_fault_of_sizes():
    """Lengths drawn for other sizes are too large for the smallest."""
    made = module(lambda self, x, at: x.index_select(1, at))
    model_trt = torch2rt(
        made,
        [torch.randn(2, 9), torch.tensor([8, 7])],
        min_shapes=[(1, 3), (2,)],
        max_shapes=[(4, 9), (2,)],
        verify="range",
    )
    assert any("the module raises" in note for note in model_trt.report.verified.notes)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (5, 5, 7)], ids=str)
def test_an_example_that_is_not_served_is_cut_or_repeated(sizes):
    low, opt, high = ([(n, 3)] for n in sizes)
    model_trt = torch2rt(
        nn.Linear(3, 4), [torch.randn(3, 3)], min_shapes=low, opt_shapes=opt, max_shapes=high, verify=True
    )
    assert [d.shapes for d in model_trt.report.verified.differences] == [[list(opt[0])]]


def test_the_reference_takes_few_of_a_large_batch(monkeypatch):
    monkeypatch.setattr(verification_inputs, "LARGE", 50)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model_trt = torch2rt(nn.Linear(30, 4), [torch.randn(16, 30)], max_batch_size=16)
    assert [d.shapes for d in model_trt.report.verified.differences] == [[[2, 30]]]
    model_trt = torch2rt(nn.Linear(30, 4), [torch.randn(16, 30)])
    assert [d.shapes for d in model_trt.report.verified.differences] == [[[16, 30]]]


# Nothing else changes ------------------------------------------------------------------------------------------------


class Observed(nn.Module):
    """Counts its calls, keeps a mask, and has a hook."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.calls, self.mask, self.seen = 0, None, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        if self.mask is None:
            self.mask = torch.ones(4)
        return self.inner(x) * self.mask


def test_the_module_and_the_inputs_stay_as_they_were():
    model = Observed().eval()
    model.inner[0].train()  # which changes nothing but its flag
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3)
    given, hooks = x.clone(), len(model.inner[0]._forward_hooks)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch2rt(model, [x], max_batch_size=4, verify="range")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert torch.equal(x, given) and (model.calls, model.mask, model.seen) == (0, None, [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [False, False, True, False, False]
    assert len(model.inner[0]._forward_hooks) == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_can_be_switched_off_and_the_network_dropped():
    with wrong(F.relu, times(2.0)):
        assert torch2rt(nn.ReLU(), [torch.randn(2, 3)], verify=False).report.verified is None
        with pytest.raises(AccuracyError):
            torch2rt(nn.ReLU(), [torch.randn(2, 3)], keep_network=False)
    model_trt = torch2rt(nn.ReLU(), [torch.randn(2, 3)], keep_network=False)
    assert model_trt.network is None and model_trt.report.verified.mode == "example"


@pytest.mark.parametrize("mode", ["ranges", None, 1, "False"])
def test_other_modes_are_refused(mode):
    with pytest.raises(InputError, match="none of True, False and 'range'"):
        torch2rt(nn.ReLU(), [torch.randn(2, 3)], verify=mode)


def test_a_module_that_fails_on_its_example():
    ids = torch.tensor([[1, 99]])
    with pytest.raises(InputError, match=r"the module raises IndexError .*verify=False"):
        torch2rt(nn.Embedding(9, 4), [ids])
    assert torch2rt(nn.Embedding(9, 4), [ids], verify=False).report.verified is None


def test_a_module_that_does_not_run_here_is_not_verified_and_says_so():
    """torch has no such kernel on this machine, say."""

    class Elsewhere(nn.Module):
        def forward(self, x):
            if type(x) is torch.Tensor:
                raise NotImplementedError("no kernel")
            return x + 1

    report = torch2rt(Elsewhere(), [torch.randn(2, 3)]).report
    assert report.verified is None and "NotImplementedError" in report.assumptions[0]
    assert "not verified" in str(report)


def test_under_autocast():
    model, x = network(), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch2rt(model, [x]).report.verified


def test_float16_products_in_float32_are_the_modules():
    """What is compared with on a CPU, where torch's own float16 products take very long."""
    model, x = network().half(), torch.randn(3, 6).half()
    with torch.no_grad():
        expected = model(x)
        with verification.WideProducts():
            torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


# The report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", COPIES, ids=lambda f: f.__name__)
def test_the_report_is_kept(route, tmp_path):
    model_trt = torch2rt(nn.Sequential(nn.Linear(3, 5), nn.ReLU()).eval(), [torch.randn(2, 3)], max_batch_size=4)
    model_trt.report.assumptions.append("a float64 table is computed in float32")
    assert route(model_trt, tmp_path).report == model_trt.report
    assert Report.from_json(json.loads(json.dumps(model_trt.report.to_json()))) == model_trt.report


def test_engines_without_a_report_are_read():
    state = torch2rt(nn.ReLU(), [torch.randn(2, 3)]).state_dict()
    header = json.loads(bytes(state["header"].tolist()))
    del header["report"], header["check"]  # as older versions wrote it
    state["header"] = torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)
    loaded = TRTModule()
    loaded.load_state_dict(state)
    assert loaded.report == Report()


def test_the_report_says_what_calls_need():
    made = module(lambda self, x, y: x + y)
    model_trt = torch2rt(made, [torch.randn(2, 3), torch.randn(2, 3)], max_batch_size=4)
    assert model_trt.report.needs == [text for _, text in model_trt.interface.constraints]
    assert "verified (example)" in str(model_trt.report) and "float" not in str(model_trt.report.needs)


# What is compared ----------------------------------------------------------------------------------------------------


def test_the_engine_is_compared_where_it_runs(device):
    report = torch2rt(network().to(device), [torch.randn(3, 6, device=device)]).report
    assert ("the engine on" in report.verified.by) == (device.type == "cuda")


def test_values_of_an_engine_are_looked_at(device):
    """Of all calls, an input that is passed on and a value that is an output among them."""
    if device.type == "cpu":
        pytest.skip("an engine runs on a GPU alone")

    def forward(self, x):
        y = self.conv(x.contiguous())
        return y, F.silu(y).flatten(1).softmax(1)

    made, x = module(forward, conv=nn.Conv2d(3, 4, 3)).to(device), torch.randn(2, 3, 5, 7, device=device)
    graph = trace(made, [x], max_batch_size=3)
    values = OfEngine(graph, [x], "keep", functools.partial(build, progress=False))
    assert len(values.names) >= 5
    disturbed = Disturbed(graph, 0.0, keep=values.names)
    disturbed([x])
    for name, value in values(values.names).items():
        torch.testing.assert_close(value, disturbed.kept[name].cpu(), rtol=1e-4, atol=1e-5)


PRODUCTS = [
    (nn.Linear(512, 64), (32, 512)),
    (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 16, 16)),
    (nn.Conv1d(3, 8, 3), (2, 3, 9)),
    (nn.ConvTranspose2d(32, 8, 3, 2), (2, 32, 5, 7)),
    (With(nn.Identity(), lambda m, x: x @ x.mT), (2, 64, 96)),
    (With(nn.Identity(), lambda m, x: F.scaled_dot_product_attention(x, x, x)), (2, 4, 64, 32)),
    (nn.LSTM(16, 16), (5, 2, 16)),
]


@pytest.mark.parametrize(("made", "shape"), PRODUCTS, ids=lambda v: getattr(v, "_get_name", lambda: "")())
def test_what_products_are_off_by(made, shape, device):
    """An engine is off by a few disturbances at most, and these are small."""
    made, x = made.to(device).eval(), torch.randn(shape, device=device)
    (first, *_) = torch2rt(made, [x]).report.verified.differences
    graph = trace(made, [x])
    on_gpu = device.type == "cuda"
    before, after = (Disturbed(graph, roundings, on_gpu=on_gpu)([x])[0] for roundings in (0.0, 1.0))
    disturbance = (after - before).abs().max().item()
    assert first.error < 4 * disturbance < 2e-3 * before.abs().max().item()


def test_a_reference_that_fails_is_an_error(monkeypatch):
    def fails(self, tensors):
        raise verification.Torch2RTError("layer 'x' is float32 [2], TensorRT declares float32 [3]")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ReferenceModule, "outputs", fails)
    with pytest.raises(AccuracyError, match=r"fails for inputs float32.*declares"):
        torch2rt(nn.ReLU(), [torch.randn(2, 3)])


def test_a_bert_with_a_wrong_gelu():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=30
    )
    model, ids = transformers.BertModel(config).eval(), torch.randint(0, 30, (2, 5))
    zoo.awaken(model)
    with wrong(F.gelu, times(1.001), 1), pytest.raises(AccuracyError) as info:
        torch2rt(model, [ids], max_batch_size=4)
    assert info.value.module.startswith("encoder.layer.1.intermediate")


FUSED = {
    "alone": (lambda m, x: torch.tanh(x), False),
    "behind a sum": (lambda m, x: torch.tanh(x + 0.5), False),
    "behind a product": (lambda m, x: torch.tanh(m(x)), True),
    "behind more": (lambda m, x: torch.expm1((m(x) * 0.5 - x).view(-1, 2, 3).exp().chunk(2, -1)[1]), True),
    "by tanh": (lambda m, x: F.gelu(m(x), approximate="tanh"), True),
    "without tanh": (lambda m, x: torch.sigmoid(F.gelu(m(x))), False),
    "of another tensor": (lambda m, x: (m(x) > 0) * torch.tanh(x), False),
}


@pytest.mark.parametrize("name", FUSED)
def test_functions_that_are_part_of_a_products_kernel_are_approximations(name):
    call, is_fused = FUSED[name]
    x = torch.randn(40, 6)
    graph = trace(With(torch.nn.Linear(6, 6), call), [x])
    plain, disturbed = (Disturbed(graph, roundings, on_gpu=True)([x])[0] for roundings in (0.0, 1.0))
    error = float(((disturbed - plain) / plain).abs().median())
    assert (error > 2.0**-18) == is_fused
