"""Modules of which some calls stay torch calls: values, random numbers, custom operators, sizes of results."""

import copy
import io
import json
import math
import pickle
import re
import threading
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness.threads import at_once
from torch import nn

from torch2rt import graph_break, lower, torch2rt
from torch2rt.conversion import fallback, growing, measuring, partitioner, segmenting
from torch2rt.errors import EngineError, InputError, Torch2RTError, TraceError, UnsupportedError
from torch2rt.network import Network
from torch2rt.passes.copies import copy_graph
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned import torch_segment
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.partitioned.torch_segment import TorchSegment
from torch2rt.runtime.reference_module import ReferenceModule


@torch.library.custom_op("torch2rt_tests::waves", mutates_args=())
def waves(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.from_numpy(np.sin(x.numpy()) * np.float32(factor))


@waves.register_fake
def _(x, factor):
    return torch.empty_like(x)


@torch.library.custom_op("torch2rt_tests::add_total", mutates_args={"total"})
def add_total(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    total += x.sum(0)[: total.shape[0]]
    return x * 2


@add_total.register_fake
def _(x, total):
    return torch.empty_like(x)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.save_for_backward(x)
        return x.clamp(-limit, limit) * x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Layers(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, train=False):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 7), nn.Linear(7, 5), between
        self.lstm = nn.LSTM(7, 3, 2, dropout=0.5, batch_first=True) if train else None
        self.train(train)

    def forward(self, x):
        return self.between(self, torch.tanh(self.first(x)) * 2 - 0.5)


def svd(self, y):
    u, s, _ = torch.linalg.svd(y.T[:3])
    return torch.softmax(self.last(y * s[0]), -1), u.abs()  # whose signs are the kernel's choice


def custom(self, y):
    total = torch.zeros(6)
    w = add_total(waves(y, 0.5), total[2:])
    return Clipped.apply(self.last(w), 0.3) + total.sum(), total


def samples(self, y):
    p = F.softmax(F.dropout(self.last(y), 0.4, self.training), -1)
    F.dropout(y, training=True)  # drops nothing that is used, but draws
    noise = torch.randn(y.shape[0], 5, device=y.device) + torch.empty(5, device=y.device).uniform_(-1, 1)
    return torch.multinomial(p, 2), p + noise, F.gumbel_softmax(y, hard=True), torch.bernoulli(p)


def recurrent(self, y):
    return self.lstm(torch.stack([y, y * 2], 1))[0].sigmoid() * 3


def double(self, y):
    wide = y.double().cumsum(0)
    return self.last((wide > 0.1).float() - y), wide, torch.view_as_real(torch.fft.fft(wide))


def complexes(self, y):
    spectrum = torch.fft.fft(y)
    gram = torch.tensordot(spectrum.T, spectrum, dims=1) + 30 * torch.eye(7, device=y.device)
    return spectrum * 2, self.last(y.sin()), torch.logdet(gram)


def nonzero(self, y):
    rows = (y.sum(1) > 0).nonzero()[:, 0]
    chosen = F.softmax(self.last(y[rows]), -1) * rows.shape[0]
    return chosen, torch.cat([chosen, self.last(y)]), rows


def masks(self, y):
    selected = y[y > 0.2]
    u, inverse = torch.unique((y * 2).long(), return_inverse=True)
    return selected.sigmoid().cumsum(0), torch.masked_select(self.last(y), y[:, :5] < 0).exp().sum(), u * 2 - 1, inverse


def where(self, y):
    rows, columns = torch.where(y > 0.2)
    return (y[rows, columns] * 2 + 1).exp(), torch.stack([rows, columns], 1) * 2


def boxes(self, y):
    nms = pytest.importorskip("torchvision").ops.nms
    corners = torch.cat([y[:, :2], y[:, :2] + y[:, 2:4].abs()], 1)
    kept = nms(corners, y[:, 4], 0.3)
    area = (corners[kept, 2] - corners[kept, 0]) * (corners[kept, 3] - corners[kept, 1])
    return corners[kept], area.sqrt() * y[kept, 4], kept


def unseen(self, y):
    """Calls that write to arguments whose names and functions do not say so."""
    y = y.detach()  # running statistics have no gradients
    table, mean = self.last.weight.detach().T.clone(), y.mean(0) * 0.5
    rows = F.embedding((y[:, :4] > 0).long() + 1, table, max_norm=0.1)
    normed = F.instance_norm(torch.stack([y, y * y], 2), mean, (y * y).mean(0), use_input_stats=True, momentum=0.3)
    return rows * 2 + 1, normed.sigmoid() * 2, table.exp() * 2 - 1, mean.exp() * 2 - 1


def empties(self, y):
    none = (y.sum(1) > 99).nonzero()[:, 0]
    return torch.masked_select(y, y > 99).sum() * 2 + 1, y[none].mT.sum(1) * 3 - 1


def numbers(self, y):
    """Integers that Python takes out of tensors, as sizes and numbers."""
    rows = (y[:, 0] > 0).sum().clamp(min=1)
    chosen, width = self.last(y[: int(rows)]), 2 + 2 * (y.sum() > 0).long()
    first, second = y.split(torch.stack([width, 7 - width]).tolist(), 1)
    scaled = chosen.sigmoid() * rows.item() + torch.zeros(rows, 5, device=y.device)
    return scaled, first.exp().sum(1) - 2 * second.sum(1), y.flatten().topk(rows.item())[0].relu() + 1


def packed(self, y):
    lengths = 1 + (y[:, :2] > 0).sum(1)
    found = nn.utils.rnn.pack_padded_sequence(torch.stack([y, y * 2, -y], 1), lengths, True, enforce_sorted=False)
    return self.last(found.data).sigmoid() * 2 - 1, found.batch_sizes * 1, found.unsorted_indices * 1


def constants(self, y):
    wide = torch.full((2, 3), 0.3, dtype=torch.float64, device=y.device)
    return torch.linalg.eigvalsh(y.T @ y) * 2, torch.ones(3, device=y.device), y, self.last.bias, wide


CASES = [svd, custom, samples, recurrent, double, complexes, nonzero, masks, where, boxes, empties, unseen, constants]
CASES += [numbers, packed]


def same(module, run, x):
    torch.manual_seed(5)
    expected = module(x.clone())
    torch.manual_seed(5)
    actual = run(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.rand(1) == _drawn_after(module, x)
    return actual


def _drawn_after(module, x):
    torch.manual_seed(5)
    module(x.clone())
    return torch.rand(1)


def drops(x):
    return F.dropout(x, 0.4, training=True)


DRAWS = {"dropout": drops, "rand_like": torch.rand_like, "exponential_": lambda x: x.clone().exponential_(2.0)}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_seeds_inside_of_a_module_are_kept(draw):
    class Seeded(nn.Module):
        def forward(self, x):
            before = torch.get_rng_state()
            torch.manual_seed(11)
            y = draw(x + 1)
            torch.set_rng_state(before)
            return y * 2 - x, draw(y)

    x = torch.rand(4, 6)
    model_trt = torch2rt(Seeded(), [x], fallback=True, min_segment_calls=1, verify=False)
    same(Seeded(), model_trt.reference(), x)


@pytest.mark.parametrize("between", CASES, ids=lambda f: f.__name__)
def test_segments_equal_eager(between, device):
    if device.type == "cuda" and between in (custom, packed):
        pytest.skip("the operator is numpy's, and lengths of packed sequences are the CPU's")
    module = Layers(between, train=between in (samples, recurrent)).to(device)
    x = torch.randn(4, 6, device=device)
    model_trt = torch2rt(module, [x], max_batch_size=9, min_segment_calls=1, fallback=True, verify="range")
    assert isinstance(model_trt, PartitionedModule)
    assert model_trt.engines and model_trt.torch_segments
    assert model_trt.report.verified.differences
    assert len(model_trt.report.segments) == len(model_trt.segments)
    assert between is boxes or any("test_segments.py:" in line for line in model_trt.report.segments)
    assert not any("KeyError" in line for line in model_trt.report.segments)
    assert model_trt.report.segments[0] in repr(model_trt) and model_trt.report.segments[0] in str(model_trt.report)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for size in (4, 3, 9):
        for value in same(module, run, torch.randn(size, 6, device=device)):
            value.mul_(0)  # the caller's own
    same(module, run, torch.randn(4, 6, device=device))


@pytest.fixture
def evaluated(monkeypatch):
    """Engines are evaluated, so that modules run without a GPU."""

    lock = threading.Lock()  # TensorRT's networks are read by one thread at a time

    def forward(self, *tensors):
        with lock:
            return tuple(ReferenceModule(*self.networks()).outputs(tensors))

    monkeypatch.setattr(TRTModule, "forward", forward)


def chosen(count, of=12):
    """An input of which a module of `nonzero` chooses so many rows."""
    return torch.where(torch.arange(of)[:, None] < count, 1.0, -1.0) + torch.rand(of, 6) * 0.1


class Chosen(nn.Module):
    def forward(self, x):
        rows = x[x[:, 0] > 0]
        return torch.tanh(rows * 2 - 0.5) * 3 + rows.shape[0]


def test_sizes_beyond_max_sizes_are_refused(evaluated):
    model_trt = torch2rt(Chosen(), [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=3, verify=False)
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    for model in (model_trt, model_trt.reference()):
        for count in (3, 0, 1):
            same(Chosen(), model, chosen(count))
        with pytest.raises(InputError, match=r"'\w+' of segment 2 has size 4 in dimension 0, .* max_sizes allows 3"):
            model(chosen(4))
    assert again.growth.is_bound and copy.deepcopy(model_trt).growth.is_bound


def announced(caplog):
    return [record.getMessage() for record in caplog.records if "egment 2" in record.getMessage()]


def decomposed(x):
    rows = x[x[:, 0] > 0]
    return torch.linalg.qr(rows)[0] * 2, torch.zeros(len(rows) + 1, 6).index_add(0, torch.arange(len(rows)), rows)


def largest(x):
    return x[x[:, 1] > 0].topk(1, 0)[0] * 2


def told_apart(x):
    return torch.unique((x * 2).long().clamp(0, 3)) * 2


def seeded(x):
    torch.manual_seed(4)
    return torch.rand_like(x) + each_by_itself(x)


@graph_break
def each_by_itself(x):
    return torch.stack([row.sum() if row[0] > 0 else row.prod() for row in x])[:, None]


@pytest.mark.parametrize(
    ("function", "reasons", "needs"),
    [
        (
            decomposed,
            {"torch.Tensor.__getitem__": "the size of", "torch.linalg.qr": "there is no converter for it"},
            ["x.shape[0] >= 1"],
        ),
        (largest, {"torch.Tensor.__getitem__": "the size of its result depends on values"}, ["x.shape[0] >= 1"]),
        (told_apart, {"torch.unique": "the size of its result depends on values"}, []),
        (
            lambda x: x.double().cumsum(0),
            {"torch.Tensor.double": "TensorRT has no float64", "torch.Tensor.cumsum": "TensorRT has no"},
            [],
        ),
        (
            seeded,
            {
                "set_state": "an engine has no generators",
                "torch.rand_like": "an engine draws no random numbers",
                "each_by_itself": "it is Python code that is not traced",
            },
            ["x.shape[0] == 12", "x.shape[1] == 1"],
        ),
    ],
    ids=["two", "not empty", "one reason", "types", "Python"],
)
def test_reasons_and_needs_are_sentences(function, reasons, needs):
    class Module(nn.Module):
        def forward(self, x):
            return function(torch.tanh(x) * 3)

    report = torch2rt(Module(), [chosen(2)], fallback=True, min_segment_calls=1).report
    given = [text for line in report.segments if ": torch" in line for text in line.split(": ", 2)[2].split("; ")]
    assert len(given) == len(reasons)
    for text, (call, why) in zip(given, reasons.items(), strict=True):
        assert re.fullmatch(r"[\w.]+( at \S+test_segments\.py:\d+)? \([^()]+[^.]\)", text) and "Error" not in text
        assert call in text and f"({why}" in text
    assert [re.sub(r"^\w+", "x", text) for text in report.needs] == needs


@pytest.mark.parametrize(
    ("max_sizes", "counts", "most"),
    [
        ((2, 12), [(3, 4), (4, 4), (0, 4), (1, 4), (5, 8), (12, 12)], 12),
        ((2, 12), [(11, 12), (2, 12)], 12),
        ((3, 7), [(6, 6), (7, 7)], 7),
        (None, [(6, 6), (9, 12)], 12),
    ],
)
def test_engines_grow_with_sizes_that_depend_on_values(evaluated, monkeypatch, caplog, max_sizes, counts, most):
    monkeypatch.setattr(fallback, "MAX_SIZE", 3)
    module = Chosen()
    model_trt = torch2rt(module, [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=max_sizes)
    made = []
    monkeypatch.setattr(growing.Larger, "__call__", noted(made, growing.Larger.__call__))
    for count, expected in counts:
        same(module, model_trt, chosen(count))
        assert model_trt.engines[1].interface.inputs[0].max[0] == expected
        same(module, model_trt.reference(), chosen(count))
    lines, expected = announced(caplog), [expected for _, expected in counts]
    assert len(made) == len(lines) == len(set(expected))
    assert "Segment 2 was built again" in lines[0] and f"now __getitem___1: float32[1..{expected[0]}, 6]" in lines[0]
    verified = [note for note in model_trt.report.verified.notes if "segment 2, which was built again" in note]
    assert len(verified) == len(made) and all(": verified (example) by the reference" in note for note in verified)
    if most < 12:
        with pytest.raises(InputError, match=r"size 8 in dimension 0, .* max_sizes=\(3, 7\) allows no more"):
            model_trt(chosen(8))
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    assert again.engines[1].interface == model_trt.engines[1].interface


def noted(made, function):
    def call(*args):
        made.append(args)
        return function(*args)

    return call


@pytest.mark.parametrize(("verify", "shapes"), [(False, []), (True, ["5x6"]), ("range", ["5x6", "1x6", "8x6"])])
def test_grown_engines_are_verified_as_the_first_are(evaluated, verify, shapes):
    how = dict(fallback=True, min_segment_calls=1, max_sizes=(2, 12), verify=verify)
    model_trt = torch2rt(Chosen(), [chosen(2)], **how)
    same(Chosen(), model_trt, chosen(5))
    notes = model_trt.report.verified.notes if verify else []
    grown = [note for note in notes if note.startswith("segment 2, which was built again")]
    assert len(grown) == bool(verify) and all(
        f"verified ({'range' if verify == 'range' else 'example'}" in n for n in grown
    )
    assert [line.rpartition(" ")[2] for note in grown for line in note.splitlines() if "inputs of" in line] == shapes
    assert not any("built again" in text for text in model_trt.report.assumptions)


def test_a_wrong_grown_engine_is_not_used(evaluated, monkeypatch, caplog):
    model_trt = torch2rt(Chosen(), [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=(2, 12))

    def wrong(graph, **how):
        graph = copy_graph(graph)
        for node in graph.graph.find_nodes(op="call_function", target=torch.tanh):
            node.target = torch.sigmoid
        return lower(graph, **how)

    monkeypatch.setattr(partitioner, "lower", wrong)
    for count in (5, 7, 2):
        same(Chosen(), model_trt, chosen(count))
    assert model_trt.engines[1].interface.inputs[0].max[0] == 2
    (line,) = announced(caplog)
    assert "Torch makes the calls of segment 2" in line and "does not compute what the module does for inputs" in line


def test_what_torch_refuses_is_torchs_error(evaluated):
    class Table(nn.Module):
        def forward(self, x):
            rows = x[x[:, 0] > 0]
            return torch.linspace(-1, 2, 24).view(8, 3)[torch.tanh(rows).ceil().cumsum(0).long()[:, 0]] * 2

    model_trt = torch2rt(Table(), [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=(2, 12))
    for model in (Table(), model_trt):
        with pytest.raises(IndexError, match="index 8 is out of bounds"):
            model(chosen(8))
    same(Table(), model_trt, chosen(7))


class Scaled(Chosen):
    """Rows are scaled before they are chosen, by torch, and after it, by an engine."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.after(super().forward(x + self.before(x).cos() * 0.01))


def test_weights_stay_those_of_the_conversion(evaluated):
    module, x = Scaled(), chosen(2)
    how = dict(fallback=True, torch_executed=["before"], min_segment_calls=1, max_sizes=(2, 12), verify=False)
    model_trt, expected = torch2rt(module, [x], **how), module(x)
    assert any("before" in text for text in model_trt.report.segments)
    with torch.no_grad():
        module.before.weight.mul_(50)
    for model in (model_trt, model_trt.reference()):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"the module's before\.weight is not as it was when it was converted"):
        model_trt(chosen(5))
    with torch.no_grad():
        module.after.weight.mul_(2)
    with pytest.raises(Torch2RTError, match=r"after\.weight was written to since .* convert again"):
        model_trt.reference()(x)


def test_one_thread_builds_for_all(evaluated, monkeypatch):
    module = Chosen()
    model_trt = torch2rt(module, [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=(2, 12), verify=False)
    made, full = [], chosen(9)
    monkeypatch.setattr(growing.Larger, "__call__", noted(made, growing.Larger.__call__))
    at_once([lambda: torch.testing.assert_close(model_trt(full), module(full), atol=1e-4, rtol=1e-4)] * 8)
    assert len(made) == 1 and model_trt.engines[1].interface.inputs[0].max[0] == 12


def test_without_its_network_an_engine_does_not_grow(evaluated, caplog):
    module = Chosen()
    model_trt = torch2rt(module, [chosen(2)], fallback=True, min_segment_calls=1, max_sizes=(2, 12), verify=False)
    model_trt.growth.make = None
    for count in (5, 7):
        same(module, model_trt, chosen(count))
    assert len(announced(caplog)) == 1 and "Torch makes the calls of segment 2" in caplog.text


def test_sizes_that_must_be_equal_are_checked():
    class Equal(nn.Module):
        def forward(self, x):
            rows = (x[:, 0] > 0).nonzero()[:, 0]
            return torch.tanh(x[rows] * 2) + torch.ones(3, 2).cumsum(0)

    x = torch.tensor([[1.0, 2.0], [1.0, 0.5], [-1.0, 0.5], [2.0, 0.25]])
    model_trt = torch2rt(Equal(), [x], fallback=True, min_segment_calls=1)
    same(Equal(), model_trt.reference(), x)
    with pytest.raises((InputError, RuntimeError)):
        model_trt.reference()(x.abs())
    with pytest.raises(RuntimeError):
        Equal()(x.abs())


def test_the_error_without_fallback_ends_with_the_plan():
    with pytest.raises(UnsupportedError, match=r"With fallback=True: 2 TensorRT segments with \d\d % of the"):
        torch2rt(Layers(svd), [torch.randn(4, 6)])


def test_what_converts_is_one_engine_with_fallback_too():
    model_trt = torch2rt(nn.Linear(3, 2), [torch.randn(4, 3)], fallback=True)
    assert type(model_trt) is TRTModule


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6))
        self.b = nn.Sequential(nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x):
        return F.softmax(self.b(self.a(x)), -1)


@pytest.mark.parametrize(
    ("executed", "calls"),
    [(["a"], 3), (["a.2", torch.softmax], 1), ([F.softmax], 1), ([nn.Linear], 3), ([nn.Tanh, "a.0"], 2)],
)
def test_torch_executed(executed, calls):
    module, x = Parts().eval(), torch.randn(3, 6)
    if torch.softmax in executed:
        with pytest.raises(InputError, match=r"torch_executed names torch.softmax, which none"):
            torch2rt(module, [x], fallback=True, torch_executed=executed)
        return
    model_trt = torch2rt(module, [x], max_batch_size=4, fallback=True, torch_executed=executed, min_segment_calls=1)
    found = model_trt.torch_segments
    assert sum(len(s.graph.graph.find_nodes(op="call_function", target=t)) for s in found for t in _targets(s)) == calls
    same(module, model_trt.reference(), torch.randn(4, 6))


def test_a_loaded_module_runs_on_tensors_in_order(device):
    """As the verification of an engine calls it; torch calls alone do so without a GPU too."""
    module, x = Parts().eval().to(device), torch.randn(3, 6, device=device)
    model_trt = torch2rt(module, [x], fallback=True, torch_executed=[""])
    assert not model_trt.engines
    (output,) = model_trt.load(device).run([x])
    torch.testing.assert_close(output, module(x))


def _targets(segment):
    return {node.target for node in segment.graph.graph.nodes if node.op == "call_function"}


def test_small_engines_become_torch_calls():
    module, x = Layers(svd), torch.randn(4, 6)
    counts = [len(torch2rt(module, [x], fallback=True, min_segment_calls=n, verify=False).engines) for n in (1, 6, 99)]
    assert counts[0] == 2 and counts[2] == 0 and counts[1] < 2
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=99)
    same(module, model_trt, x)  # torch alone runs without a GPU
    assert any("too few for an engine" in line or "svd" in line for line in model_trt.report.segments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_executed": ["a"]}, "need fallback=True"),
        ({"min_segment_calls": 2}, "need fallback=True"),
        ({"fallback": "yes"}, "none of True, False and 'measure'"),
        ({"fallback": True, "torch_segments": "fast"}, "none of 'eager' and 'compile'"),
        ({"torch_segments": "compile"}, "need fallback=True"),
        ({"fallback": True, "torch_executed": "a"}, "is not a list"),
        ({"fallback": True, "torch_executed": [3]}, "is no function, no module path"),
        ({"fallback": True, "torch_executed": ["c"]}, "names c, which none"),
        ({"fallback": True, "max_sizes": 0}, "max_sizes"),
        ({"fallback": True, "max_sizes": (4, 3)}, "max_sizes=3 must be at least 4"),
        ({"fallback": True, "max_sizes": (4, None)}, "no pair of the first and the largest"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        torch2rt(Parts().eval(), [torch.randn(3, 6)], **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="which says that there is no GPU")
def test_measuring_needs_a_gpu():
    with pytest.raises(InputError, match="there is none here"):
        torch2rt(Parts().eval(), [torch.randn(3, 6)], fallback="measure")


@pytest.mark.parametrize(
    ("seconds", "engines", "torch_calls"),
    [((1.0, 1.0), 2, 1), ((1.0, 0.995), 2, 1), ((1.0, 0.5), 0, 1), ((1.0, {5: 0.5}), 1, 1)],
    ids=["same", "about the same", "torch", "torch for the second"],
)
def test_what_is_faster_in_torch_stays_there(monkeypatch, seconds, engines, torch_calls):
    """Engines are measured beside their calls by a function that gives these seconds, also by the size of an output."""
    measured = []

    def clock(run, tensors):
        measured.append(tuple(tensors[0].shape))
        if not isinstance(run, TorchSegment) or run.compiles:
            return seconds[0]
        by_size = seconds[1] if isinstance(seconds[1], dict) else {}
        return by_size.get(run(*tensors)[0].shape[-1], 2.0) if by_size else seconds[1]

    monkeypatch.setattr(measuring, "seconds", clock)
    module, x = Layers(svd).eval(), torch.randn(4, 6)
    model_trt = torch2rt(module, [x], max_batch_size=9, fallback="measure", min_segment_calls=1)
    assert (len(model_trt.engines), len(model_trt.torch_segments)) == (engines, torch_calls)
    assert (4, 6) in measured  # the opt shapes
    assert any("torch was faster: 500.000 ms" in line for line in model_trt.report.segments) == (engines < 2)
    run = model_trt.reference() if x.device.type == "cpu" else model_trt
    same(module, run, torch.randn(7, 6))


@pytest.mark.parametrize(
    ("how", "plain", "compiled", "expected"),
    [
        (None, 0.9, 0.5, {True}),
        (None, 0.5, 0.9, {False}),
        ("eager", 0.9, 0.5, {False}),
        ("compile", 0.5, 0.9, {True}),
        (None, 0.9, None, {False}),
        ("compile", 0.9, None, None),
    ],
)
def test_torchs_compiler_is_measured_too(monkeypatch, how, plain, compiled, expected):
    """The seconds of torch's calls beside 1 of each engine; `None` where torch cannot compile them."""

    def clock(run, tensors):
        if isinstance(run, TorchSegment) and run.compiles and compiled is None:
            raise RuntimeError("no compiler")
        return (compiled if run.compiles else plain) if isinstance(run, TorchSegment) else 1.0

    monkeypatch.setattr(measuring, "seconds", clock)
    monkeypatch.setattr(torch_segment, "BACKEND", lambda graph, inputs: graph.forward)
    module, x = Layers(svd).eval(), torch.randn(4, 6)
    model_trt = torch2rt(module, [x], fallback="measure", min_segment_calls=1, torch_segments=how, verify=False)
    assert bool(model_trt.engines) == (expected is None)
    if expected is not None:
        assert {segment.compiles for segment in model_trt.torch_segments} == expected
    same(module, model_trt.reference() if x.device.type == "cpu" else model_trt, x)


@pytest.mark.parametrize("factor", [0.5, 0.995, 2.0])
@pytest.mark.parametrize("module", [Parts(), Layers(svd)], ids=["an engine", "segments"])
def test_the_whole_is_measured_too(monkeypatch, module, factor):
    """Engines may be faster one by one, and the whole slower than torch."""
    monkeypatch.setattr(measuring, "seconds", lambda run, tensors: 2.0 if isinstance(run, TorchSegment) else 1.0)
    monkeypatch.setattr(segmenting, "measured", lambda *args: measuring.Measured(1.0, {False: 3.0, True: factor}))
    monkeypatch.setattr(torch_segment, "BACKEND", lambda graph, inputs: graph.forward)
    x = torch.randn(3, 6)
    model_trt = torch2rt(module.eval(), [x], fallback="measure", min_segment_calls=1)
    assert model_trt.report.measured[0].startswith("whole: TensorRT 1000.000 ms, torch 3000.000 ms, torch.compile")
    if factor > 0.6:
        assert isinstance(model_trt, TRTModule) or len(model_trt.engines) == 2
        assert len(model_trt.report.measured) == (1 if isinstance(model_trt, TRTModule) else 3)
    else:
        assert not model_trt.engines and {segment.compiles for segment in model_trt.torch_segments} == {True}
        assert "torch.compile was faster: 500.000 ms" in model_trt.report.segments[0]


@pytest.mark.parametrize("between", [svd, samples], ids=lambda f: f.__name__)
def test_torch_segments_are_compiled(monkeypatch, device, between):
    graphs = []
    monkeypatch.setattr(torch_segment, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    module, x = Layers(between).to(device).eval(), torch.randn(4, 6, device=device)
    model_trt = torch2rt(
        module, [x], max_batch_size=9, fallback=True, min_segment_calls=1, torch_segments="compile", verify=False
    )
    run = model_trt if device.type == "cuda" else model_trt.reference()
    assert not graphs
    for size in (4, 9):
        same(module, run, torch.randn(size, 6, device=device))
    compiled = [segment.compiles for segment in model_trt.torch_segments]
    assert any(compiled) == bool(graphs) == (between is svd)  # what draws would draw other numbers
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    assert [segment.compiles for segment in again.torch_segments] == compiled


def test_the_module_keeps_its_parameters():
    module, x = Layers(svd), torch.randn(4, 6)
    before = {name: (parameter, parameter.clone()) for name, parameter in module.named_parameters()}
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=99, verify=False)
    model_trt.to("meta")
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert math.isfinite(module(x)[0].sum())


class Decides(nn.Module):
    """Its Python looks at how many rows have a positive sum; they are used only where `uses`."""

    def __init__(self, decide, uses):
        super().__init__()
        self.decide, self.uses = decide, uses

    def forward(self, x):
        rows = (x.sum(1) > 0).nonzero()[:, 0]
        if self.decide(rows):
            return x[rows].exp() - 1 if self.uses else x * 2
        return x[:1]


@pytest.mark.parametrize("uses", [True, False])
def test_a_module_that_asks_whether_a_size_is_0_is_converted_for_where_it_is_not(uses):
    module, x = Decides(lambda rows: 2 * len(rows) > 0, uses), torch.tensor([[1.0, 2], [-3, 1], [0.5, 0.25]])
    model_trt = torch2rt(module, [x], fallback=True)
    torch.testing.assert_close(model_trt.reference()(x), module(x))
    assert any("shape[0] >= 1" in line for line in model_trt.report.needs)
    with pytest.raises(InputError, match=r"needs .*shape\[0\] >= 1, which these inputs' values make false"):
        model_trt.reference()(-x.abs())


def test_another_decision_about_a_size_that_depends_on_values_is_refused():
    with pytest.raises(TraceError, match="depend"):
        torch2rt(Decides(lambda rows: len(rows) > 1, True), [torch.rand(5, 4)], fallback=True)


def test_few_boxes():
    def few(self, y):
        nms = pytest.importorskip("torchvision").ops.nms
        corners = torch.cat([y[:, :2].abs() * 0, y[:, 2:4].abs() * 0 + 1], 1)
        kept = nms(corners, y[:, 4], 0.3)
        return corners[kept] * 2 - y[kept, 4:5].tanh()

    module, x = Layers(few), torch.randn(5, 6)  # all boxes are one: a single one is left
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=1)
    assert model_trt.engines
    assert same(module, model_trt.reference(), x).shape == (1, 4)


@pytest.mark.parametrize("between", [svd, constants, nonzero], ids=lambda f: f.__name__)
def test_several_sets_of_opt_shapes(between, device):
    module, x = Layers(between).to(device).eval(), torch.randn(4, 6, device=device)
    sets = [{"x": (2, 6)}, {"x": (7, 6)}]
    shapes = {"min_shapes": [(1, 6)], "max_shapes": [(9, 6)], "opt_shapes": sets}
    model_trt = torch2rt(module, [x], **shapes, fallback=True, min_segment_calls=1)
    first = model_trt.engines[0].interface
    assert [spec.opts for spec in first.inputs] == [[(2, 6), (7, 6)]]
    assert all(len(spec.opts) == 2 for engine in model_trt.engines for spec in engine.interface.inputs)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for size in (2, 7, 9):
        same(module, run, torch.randn(size, 6, device=device))


@pytest.mark.parametrize(
    ("between", "precision", "near"),
    [(svd, "fp16", 3e-3), (samples, "bf16", 2e-2), (masks, "fp16", 2e-2), (svd, "int8", 1e-1), (double, "fp16", 1e-2)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_engines_in_low_precision_beside_torch_calls(between, precision, near, device):
    module, x = Layers(between).to(device).eval(), torch.randn(4, 6, device=device)
    options = {}
    if precision == "int8":
        calibration = [[torch.randn(4, 6, device=device) * 1.5] for _ in range(8)]
        options = {"calibration": calibration, "calibration_method": "minmax", "quantize_all": True}
    before = torch.get_rng_state()
    model_trt = torch2rt(
        module, [x], max_batch_size=9, fallback=True, min_segment_calls=1, precision=precision, **options
    )
    assert torch.equal(torch.get_rng_state(), before)
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    graphs = [segment.graph.graph for segment in model_trt.torch_segments]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert model_trt.engines and not any(getattr(n.meta.get("val"), "dtype", None) is low for n in nodes)
    networks = [part for part in model_trt.network.parts if isinstance(part, Network)]
    assert any(weight.tensor.dtype is low for network in networks for weight in network.weights.values())
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for size in (4, 7):
        x = torch.randn(size, 6, device=device)
        torch.manual_seed(5)
        expected = module(x)
        torch.manual_seed(5)
        for ours, theirs in zip(run(x), expected, strict=True):
            if ours.shape == theirs.shape and ours.is_floating_point():
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=near, atol=near)


@pytest.mark.parametrize("between", [svd, nonzero, boxes], ids=lambda f: f.__name__)
def test_eight_threads(evaluated, between):
    module = Layers(between).eval()
    model_trt = torch2rt(
        module, [torch.randn(4, 6)], max_batch_size=9, fallback=True, min_segment_calls=1, verify=False
    )

    def work(seed):
        for turn in range(4):
            x = torch.randn(1 + (seed + turn) % 9, 6, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(model_trt(x), module(x), rtol=1e-4, atol=1e-5)

    at_once([lambda seed=seed: work(seed) for seed in range(8)])


def test_replicas_leave_the_module_where_it_is(evaluated):
    module, x = Layers(svd).eval(), torch.randn(4, 6)
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=1, verify=False)
    same(module, model_trt, x)
    replica = model_trt._replicate_for_data_parallel()  # whose children torch replaces by replicas
    assert replica._running is None and replica._lock is not model_trt._lock and model_trt._running is not None
    (segment,) = [
        s for s in model_trt.torch_segments if any(c.numel() for c in s.constants())
    ] or model_trt.torch_segments
    given = [torch.zeros(spec.opt, dtype=spec.dtype) for spec in segment.interface.inputs]
    there = segment._replicate_for_data_parallel()
    assert all(value.is_meta for value in there(*[value.to("meta") for value in given]))
    assert segment.device.type == "cpu" and all(not value.is_meta for value in there(*given))
    assert segment.on(torch.device("meta")) is segment.on(torch.device("meta")) is not segment
    same(module, model_trt, x)


def test_settings_and_copies(evaluated):
    module, x = Layers(constants).eval(), torch.randn(4, 6)
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=1, cuda_graph=True, verify=False)
    model_trt.borrow_outputs = True
    same(module, model_trt, x)
    again = copy.deepcopy(model_trt)
    assert again.cuda_graph is True and again.borrow_outputs and again._running is None
    assert not {value.data_ptr() for s in again.torch_segments for value in s.constants()} & {
        value.data_ptr() for s in model_trt.torch_segments for value in s.constants()
    }
    other = pickle.loads(pickle.dumps(model_trt))
    assert other.schedule == model_trt.schedule and [e.engine_bytes for e in other.engines] == [
        e.engine_bytes for e in model_trt.engines
    ]
    assert model_trt.to("cpu") is model_trt and model_trt._running is None
    same(module, model_trt, x)
    for value in model_trt(x):
        value.mul_(0)
    same(module, model_trt, x)


# Saving --------------------------------------------------------------------------------------------------------------


def torch_only(between, train=False):
    """A module that runs without a GPU, as all of it is torch's, and some of its engines."""
    return torch2rt(
        Layers(between, train), [torch.randn(4, 6)], max_batch_size=9, fallback=True, min_segment_calls=99, verify=False
    )


@pytest.mark.parametrize(
    ("between", "way"),
    [
        *((between, "state dict") for between in (svd, samples, nonzero, double, boxes)),
        (svd, "pickle"),
        (masks, "copy"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_saved_and_loaded(between, way, tmp_path):
    model_trt = torch_only(between, between is samples)
    path = tmp_path / "model.pth"
    if way == "state dict":
        torch.save(model_trt.state_dict(), path)
        again = PartitionedModule()
        again.load_state_dict(torch.load(path, weights_only=True))
    elif way == "pickle":
        torch.save(model_trt, path)
        again = torch.load(path, weights_only=False)
    else:
        again = copy.deepcopy(model_trt)
    assert again.report.segments == model_trt.report.segments
    for size in (4, 1, 9):
        same(model_trt, again, torch.randn(size, 6))


def test_engines_and_their_torch_calls_are_saved():
    model_trt = torch2rt(Layers(nonzero), [torch.randn(4, 6)], fallback=True, min_segment_calls=1, verify=False)
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    assert [type(segment) for segment in again.segments] == [type(segment) for segment in model_trt.segments]
    assert [e.engine_bytes for e in again.engines] == [e.engine_bytes for e in model_trt.engines]
    assert list(again.eager) == list(model_trt.eager) == ["2"]
    assert again.schedule == model_trt.schedule and again.interface == model_trt.interface
    assert list(again.state_dict()) == list(model_trt.state_dict())


def test_custom_operators_are_saved():
    model_trt, x = torch_only(custom), torch.randn(4, 6)
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    same(model_trt, again, x)


def test_an_archive_with_code_is_refused():
    state = dict(torch_only(svd).state_dict())
    (key,) = [key for key in state if key.endswith("program")]
    archive = io.BytesIO(state[key].numpy().tobytes())
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("archive/data/sample_inputs/other.pt", pickle.dumps(print))
    state[key] = torch.frombuffer(bytearray(archive.getvalue()), dtype=torch.uint8)
    with pytest.raises(EngineError, match="truncated or damaged"):
        PartitionedModule().load_state_dict(state)
    name = key.replace("program", "header")
    header = {k: v for k, v in json.loads(state[name].numpy().tobytes()).items() if k not in ("digest", "check")}
    state[name] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)  # as earlier versions
    with pytest.raises(EngineError, match=r"holds 'archive/data/sample_inputs/other.pt', which may be code"):
        PartitionedModule().load_state_dict(state)
    state[key] = state[key][:100]
    with pytest.raises(EngineError, match="damaged"):
        PartitionedModule().load_state_dict(state)


def test_entries_that_nobody_reads_are_named():
    """Also where the module is a part of another one."""
    whole, state = nn.ModuleDict({"part": torch_only(svd)}), {}
    for name, value in whole.state_dict().items():
        state[name] = value
    other = torch.zeros(3, dtype=torch.uint8)
    for name in ("part.other", "part.segments.0.other", "part.segments.7.program", "part.eager.9.header", "else"):
        again = nn.ModuleDict({"part": PartitionedModule()})
        assert again.load_state_dict({**state, name: other}, strict=False).unexpected_keys == [name]
    del state["part.segments.0.program"]
    assert again.load_state_dict(state, strict=False).missing_keys == ["part.segments.0.program"]
    before = again["part"].report
    state["part.header"] = state["part.header"].clone()
    state["part.header"][9] += 1
    with pytest.raises(EngineError, match="header is damaged"):
        again.load_state_dict(state, strict=False)
    assert again["part"].report is before  # nothing has changed


def test_an_empty_module_says_so():
    with pytest.raises(EngineError, match="holds no segments yet"):
        PartitionedModule()(torch.ones(3))
    assert PartitionedModule().load_state_dict({}, strict=False).missing_keys == ["header"]
