"""One CUDA graph over engines and torch calls, on a GPU: `pytest --device cuda`."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from harness.threads import at_once
from torch import nn

from torch2rt import GraphCache, torch2rt
from torch2rt.runtime.partitioned.graphed import GraphedRun


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")


class Net(nn.Module):
    """Layers for engines, and between them calls for torch: products with cuBLAS, convolutions with cuDNN, sorts."""

    def __init__(self, *calls):
        super().__init__()
        self.calls = calls
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(len(calls) + 1))
        self.left = nn.Parameter(torch.randn(64, 64) / 8)
        self.conv = nn.Conv1d(1, 3, 5, padding=2)

    def forward(self, x):
        for layer, call in zip(self.layers, self.calls):
            x = call(self, torch.tanh(layer(x)) * 2 - 0.5)
        return torch.sigmoid(self.layers[-1](x)) * 3, x.sum(1)


def products(self, x):
    return torch.logcumsumexp(torch.matmul(x, self.left), 0)


def convolutions(self, x):
    return torch.logcumsumexp(F.conv1d(x[:, None], self.conv.weight, self.conv.bias, padding=2).mean(1), 1)


def turned(self, x):
    return torch.logcumsumexp(x.T.contiguous(), 0).T


def solves(self, x):
    return x + torch.linalg.svdvals(x.double()).float()[0]


def draws(self, x):
    return torch.logcumsumexp(x, 0) + torch.randn_like(x)


def chooses(self, x):
    return torch.logcumsumexp(x[(x.sum(1) > 0).nonzero()[:, 0]], 0).sum(0) + x


EXECUTED = [torch.logcumsumexp, torch.conv1d, torch.matmul]


def converted(*calls, rows=4, **options):
    module = Net(*calls).cuda().eval()
    x = torch.randn(rows, 64, device="cuda")
    called = {name for call in calls for name in call.__code__.co_names}
    executed = [target for target in EXECUTED if target.__name__ in called]
    options = {"max_batch_size": 16, "fallback": True, "min_segment_calls": 1, "cuda_graph": True, **options}
    return module, torch2rt(module, [x], torch_executed=executed, **options)


def x(rows=4):
    return torch.randn(rows, 64, device="cuda")


def same(module, model_trt, given, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        expected = module(given)
    torch.manual_seed(seed)
    actual = model_trt(given)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    return actual


def runs(model_trt):
    return [runner for runner in model_trt._running.runners if isinstance(runner, GraphedRun)]


@pytest.mark.parametrize("compiled", [False, True])
def test_all_segments_are_one_graph(compiled):
    module, model_trt = converted(products, convolutions, turned, **({"torch_segments": "compile"} if compiled else {}))
    held = []
    for turn in range(16):
        given = x((4, 7)[turn % 2])
        held.append((given, same(module, model_trt, given)))
    (run,) = runs(model_trt)
    assert len(run.graphs) == 2 and sum(graph.calls for graph in run.graphs.values()) == 14
    assert model_trt.cuda_graph_refused is None
    for given, results in held:
        torch.testing.assert_close(results, module(given), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        assert same(module, model_trt, x())[0].is_inference()
    same(module, model_trt, torch.randn(64, 4, device="cuda").T)


def test_nobody_else_gets_the_memory_of_a_graph():
    module, model_trt = converted(products, convolutions, turned)
    for _ in range(3):
        same(module, model_trt, x())
    others = [torch.full((1 << k,), float("nan"), device="cuda") for k in range(6, 22)]
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others += [torch.full((1 << k,), float("nan"), device="cuda") for k in range(6, 22)]
    for _ in range(3):
        same(module, model_trt, x())
    assert all(torch.isnan(other).all() for other in others)


def test_a_solver_that_waits_ends_a_graph():
    module, model_trt = converted(products, solves, turned, products)
    for _ in range(10):
        same(module, model_trt, x())
    assert len(runs(model_trt)) == 2 and all(run.graphs for run in runs(model_trt))
    assert "svd" in repr(model_trt) and "segment " in model_trt.cuda_graph_refused
    print(model_trt.cuda_graph_refused)
    torch.cuda.synchronize()
    same(module, model_trt, x(9))


@pytest.mark.parametrize("call", [draws, chooses])
def test_random_numbers_and_sizes_of_values_end_a_graph(call):
    module, model_trt = converted(products, call, turned, products)
    for turn in range(10):
        same(module, model_trt, x(), seed=turn)
    assert runs(model_trt) and model_trt.cuda_graph_refused is None


def test_threads_on_their_own_streams_and_on_one():
    module, model_trt = converted(products, turned, convolutions)
    model_trt.cuda_graph = GraphCache(shapes=64)
    streams = [torch.cuda.Stream() for _ in range(4)]

    def work(seed):
        with torch.cuda.stream(streams[seed % 4]), torch.no_grad():
            generator = torch.Generator("cuda").manual_seed(seed)
            for turn in range(60):
                given = torch.randn(1 + (seed + turn) % 3, 64, device="cuda", generator=generator)
                torch.rand(3, device="cuda")  # which a capture of torch's own would forbid
                results = model_trt(given)
                torch.testing.assert_close(results, module(given), rtol=1e-3, atol=1e-4)

    at_once([lambda seed=seed: work(seed) for seed in range(8)])
    (run,) = runs(model_trt)
    assert len(run.graphs) >= 6


def test_a_callers_own_capture():
    module, model_trt = converted(products, turned)
    given, stream = x(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model_trt(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = model_trt(given)
    given.copy_(x())
    graph.replay()
    torch.testing.assert_close(results, module(given), rtol=1e-3, atol=1e-4)


def test_other_weights_and_borrowed_outputs():
    module, model_trt = converted(products, turned)
    model_trt.borrow_outputs = True
    *_, first, second = [same(module, model_trt, x())[0] for _ in range(4)]
    assert first.data_ptr() == second.data_ptr()
    with torch.no_grad():
        module.conv.bias.add_(1)
        module.left.mul_(1.5)  # of a torch call, which has the module's own memory
    same(module, model_trt, x())


def test_memory_is_let_go_of():
    module, model_trt = converted(products, turned, convolutions)
    same(module, model_trt, x())
    gc.collect()
    before = torch.cuda.memory_allocated()
    model_trt.cuda_graph = GraphCache(shapes=3)
    for turn in range(80):
        same(module, model_trt, x(1 + turn % 16))
    model_trt.cuda_graph = False
    same(module, model_trt, x())
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 40 << 20  # workspaces of cuBLAS stay
    again = copy.deepcopy(model_trt)
    del model_trt
    gc.collect()
    same(module, again, x())


def test_a_capture_beside_threads_that_wait_for_the_device():
    module, model_trt = converted(products, turned, convolutions)
    model_trt.cuda_graph = GraphCache(shapes=64, after=1)
    stop = threading.Event()

    def wait():
        while not stop.is_set():
            with contextlib.suppress(RuntimeError):  # CUDA breaks both off
                torch.cuda.synchronize()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        for turn in range(40):
            same(module, model_trt, x(1 + turn % 16))
    finally:
        stop.set()
        thread.join()
    print(model_trt.cuda_graph_refused)
