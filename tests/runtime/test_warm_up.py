"""What is done before traffic comes: calls at the shapes that are tuned for, graphs, execution contexts."""

import contextlib

import pytest
import torch
from harness.fake_gpu import FakeGpu, rows

from torch2rt import EngineError, InputError, TRTModule, torch2rt
from torch2rt.engine.engine import Engine
from torch2rt.interface import Interface
from torch2rt.runtime import pool
from torch2rt.runtime.graph_cache import GraphCache

CALL = {"tuple": [{"tuple": [{"leaf": 0}]}, {"dict": [], "items": []}]}


@pytest.fixture
def gpu(monkeypatch, without_gpu_memory):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pool, "on_device", lambda index: contextlib.nullcontext())
    return FakeGpu(monkeypatch, [rows(opts=(8, 3))], scratch=64)


@pytest.fixture
def model(gpu, monkeypatch):
    monkeypatch.setattr(TRTModule, "device", torch.device("cpu"))  # where its memory is
    interface = Interface(gpu.pool.interface.inputs, CALL, ["x"], ["y"], {"leaf": 0}, [{"output": 0}])
    model = TRTModule(Engine(b"", interface, {}))
    gpu.pool.interface = interface
    model._pools, model._index = {gpu.pool.index: gpu.pool}, gpu.pool.index
    return model


def shapes(gpu):
    return [told[1] for context in gpu.made for told in context.told if told[0] == "x"]


def test_the_shapes_that_are_tuned_for_are_run(gpu, model):
    model.warm_up()
    assert shapes(gpu) == [(8, 5), (3, 5)] and sum(context.runs for context in gpu.made) == 2


@pytest.mark.parametrize("given", [[[(4, 5)], [(64, 5)]], [{"x": (4, 5)}, [[64, 5]]]], ids=["lists", "names"])
def test_shapes_may_be_given(gpu, model, given):
    model.warm_up(given)
    assert shapes(gpu) == [(4, 5), (64, 5)]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_graphs_are_captured(gpu, model, after):
    model.cuda_graph = GraphCache(after=after)
    model.warm_up()
    assert len(gpu.pool.graphs) == 2
    gpu.captured = 0
    x = torch.rand(8, 5)
    assert torch.equal(model(x), 2 * x) and gpu.captured == 0 and gpu.replayed


def test_contexts_are_made_for_other_streams(gpu, model):
    model.warm_up()
    assert len(gpu.pool.unused) == 0
    model.warm_up(contexts=3)
    count = len(gpu.made)
    assert len(gpu.pool.unused) == 3 and count >= 4
    for gpu.stream in (11, 12, 13):
        model(torch.rand(8, 5))
    assert len(gpu.made) == count


WRONG = [
    (dict(shapes=[[(65, 5)]]), "has size 65 in dimension 0"),
    (dict(shapes=(8, 5)), "8"),
    (dict(shapes=8), "no list of the shapes of calls"),
    (dict(contexts=0), "contexts"),
    (dict(shapes=[{"y": (8, 5)}]), r"names \['y'\]"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_what_is_not_served_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        model.warm_up(**options)


class Both(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.ones(3))

    def forward(self, x, *, mask):
        self.total += x.sum(0)
        return torch.linalg.svdvals(x)[0] * self.total * mask


def test_a_reference_warms_up_and_state_stays(device):
    x, mask = torch.rand(4, 3, device=device), torch.ones(3, device=device)
    model_trt = torch2rt(
        Both().to(device), [x], kwargs={"mask": mask}, state="write", fallback=True, min_segment_calls=1, progress=False
    )
    before = model_trt.state["total"].clone()
    (model_trt if device.type == "cuda" else model_trt.reference()).warm_up()
    assert torch.equal(model_trt.state["total"], before)


def test_an_engine_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="torch sees none"):
        torch2rt(torch.nn.ReLU(), [torch.rand(2, 3)], verify=False, progress=False).warm_up()
