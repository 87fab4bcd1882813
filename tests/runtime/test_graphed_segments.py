"""One CUDA graph over engines and torch calls, with the GPU's part played by the CPU; engines double their inputs."""

import copy
import gc

import pytest
import torch
from harness.fake_gpu import OTHER, SIDE, Context, FakeGpu, rows
from harness.threads import at_once
from torch import nn

from torch2rt import GraphCache, trace
from torch2rt.engine.engine import Engine
from torch2rt.interface import Interface
from torch2rt.runtime.cuda_graph import UNCAPTURABLE
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.graphed import BROKEN, TRIES, GraphedRun, in_groups
from torch2rt.runtime.partitioned.schedule import Schedule
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.partitioned.torch_segment import TorchSegment

CALL = {"tuple": [{"tuple": [{"leaf": 0}]}, {"dict": [], "items": []}]}
DOUBLE = "an engine"
SHIFT = torch.tensor([0.5, -1.5, 2.5])


def shift(x):
    return x[:, [2, 0, 1]] - SHIFT


def accumulate(x):
    y = x.clone()
    y[1:] += x[:-1] * 3
    return y


def turn(x):
    return (x + 1).T.contiguous().T  # whose memory lies in another way


def solve(x):
    return x + torch.linalg.svdvals(x)[0]


class Uncapturable(Context):
    def is_stream_capturable(self, stream):
        return False


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def gpu(monkeypatch, without_gpu_memory):
    yield FakeGpu(monkeypatch, [rows()])
    gc.collect()  # where there is a GPU, a graph that is let go of later would ask it for a stream of this one


@pytest.fixture
def make(gpu):
    """Makes a module of these parts one after the other, and the same in eager torch."""

    def chain(*parts, schedule=None, outputs=1):
        segments = [engine(gpu) if part is DOUBLE else torch_calls(part) for part in parts]
        places = range(len(parts))
        if schedule is None:
            schedule = Schedule.of([[i] for i in places], [[i + 1] for i in places], [len(parts)], len(parts) + 1)
        leaves = [{"output": i} for i in range(outputs)]
        result = {"tuple": [{"leaf": i} for i in range(outputs)]} if outputs > 1 else {"leaf": 0}
        whole = Interface([rows("x", 9, (4,), 3)], CALL, ["x"], [f"y{i}" for i in range(outputs)], result, leaves)
        model_trt = PartitionedModule(segments, schedule, whole)
        model_trt.cuda_graph = True

        def eager(x):
            for part in parts:
                x = x * 2 if part is DOUBLE else part(x)
            return x

        return model_trt, eager

    return chain


def engine(gpu, name="x"):
    interface = Interface([rows(name, 9, (4,), 3)], CALL, ["x"], ["y"], {"tuple": [{"leaf": 0}]}, [{"output": 0}])
    model_trt = TRTModule(Engine(b"", interface, {}))
    gpu.run_on(model_trt)
    return model_trt


TRACED = {}


def torch_calls(function):
    if function not in TRACED:
        TRACED[function] = trace(Calls(function), [torch.randn(4, 3)], max_batch_size=9, fallback=True)
    return TorchSegment(TRACED[function])


def runs(model_trt):
    return [runner for runner in model_trt._running.runners if isinstance(runner, GraphedRun)]


def x(count=4):
    return torch.randn(count, 3)


def same(model_trt, eager, given):
    expected, actual = eager(given), model_trt(given)
    torch.testing.assert_close(actual, expected)
    return actual


def test_all_segments_are_one_graph(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE, accumulate, turn, DOUBLE)
    held = []
    for turn_ in range(12):
        given = x(4 + turn_ % 2)
        held.append((given, same(model_trt, eager, given)))
    assert gpu.captured == 2 and gpu.replayed == 10
    for given, result in held:  # results are nobody else's
        torch.testing.assert_close(result, eager(given))
    with torch.inference_mode():
        assert same(model_trt, eager, x()).is_inference()
    assert not same(model_trt, eager, x()).is_inference()
    given = torch.randn(3, 4).T  # to be laid out first
    same(model_trt, eager, given)
    assert gpu.captured == 2 and model_trt.cuda_graph_refused is None


def test_a_segment_that_waits_is_left_out(gpu, make):
    model_trt, eager = make(DOUBLE, shift, solve, accumulate, DOUBLE, shift, solve, DOUBLE)
    for _ in range(20):
        same(model_trt, eager, x())
    assert [len(run.parts) for run in runs(model_trt)] == [2, 3]
    assert [engine.cuda_graph for engine in model_trt.engines] == [False, False, True]  # the last has its own
    assert [len(run.graphs) for run in runs(model_trt)] == [1, 1]
    assert 2 * TRIES < gpu.captured < 12
    assert "segment 2: RuntimeError: operation not permitted when stream is capturing; segment 6" in str(
        model_trt.cuda_graph_refused
    )
    assert "without CUDA graphs: segment 2" in repr(model_trt)
    model_trt.cuda_graph = False
    same(model_trt, eager, x())
    assert not runs(model_trt) and not any(engine.cuda_graph for engine in model_trt.engines)
    assert model_trt.cuda_graph_refused is None


def test_what_draws_and_what_has_sizes_of_values_is_not_captured(gpu, make):
    model_trt, eager = make(DOUBLE, shift, accumulate, DOUBLE)
    model_trt.segments[1].draws, model_trt.segments[2].waits = True, True
    for _ in range(3):
        same(model_trt, eager, x())
    assert not runs(model_trt) and model_trt.engines[0].cuda_graph is True and gpu.captured == 2


def test_an_engine_that_cannot_be_captured_is_left_out(gpu, make, monkeypatch):
    model_trt, eager = make(shift, turn, DOUBLE, shift, DOUBLE)
    (pool,) = model_trt.engines[0]._pools.values()
    monkeypatch.setattr(pool.loaded, "create_context", lambda: Uncapturable(gpu, pool.interface))
    for _ in range(6):
        same(model_trt, eager, x())
    assert [len(run.parts) for run in runs(model_trt)] == [2, 2]
    assert model_trt.cuda_graph_refused == f"segment 2: {UNCAPTURABLE}"


def test_captures_that_cuda_breaks_off_are_tried_again_a_few_times(gpu, make, monkeypatch):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    gpu.breaks = BROKEN - 1
    for _ in range(BROKEN + 2):
        same(model_trt, eager, x())
    assert gpu.replayed and model_trt.cuda_graph_refused is None
    gpu.breaks = BROKEN
    for _ in range(BROKEN + 1):
        same(model_trt, eager, x(3))
    assert model_trt.cuda_graph_refused and not runs(model_trt)
    assert all(engine.cuda_graph for engine in model_trt.engines)


def test_an_error_in_a_capture_leaves_a_module_that_works(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    same(model_trt, eager, x())
    gpu.fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        model_trt(x())
    made = len(gpu.made)
    for _ in range(4):
        same(model_trt, eager, x())
    assert gpu.replayed and len(gpu.made) == made + 1  # the contexts were given back


def test_values_that_others_take(gpu, make):
    """A graph that takes several values and gives several, one of them its input's view, beside other segments."""
    steps = [[0], [1], [2], [1], [4], [3, 5]], [[1], [2], [3], [4], [5], [6]]
    schedule = Schedule.of(*steps, [6, 4, 6, 2], 7)
    total = TorchSegment(trace(Sum(), [torch.randn(4, 3)] * 2, max_batch_size=9, fallback=True))
    model_trt, _ = make(solve, DOUBLE, DOUBLE, shift, solve, DOUBLE, schedule=schedule, outputs=4)
    model_trt.segments[5] = total
    model_trt.segments[0].waits = model_trt.segments[4].waits = True

    def eager(given):
        first = solve(given)
        return (first * 4 + solve(shift(first))), shift(first), (first * 4 + solve(shift(first))), first * 2

    for _ in range(4):
        a, b, c, d = same(model_trt, eager, x())
        assert a is c and len({value.data_ptr() for value in (a, b, d)}) == 3
    (run,) = runs(model_trt)
    assert run.inputs == [1] and run.schedule.results == [2, 3, 4] and gpu.replayed == 3


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def test_sizes_and_layouts_of_inputs_are_the_graphs_own(gpu, make):
    """Carriers of sizes, also of a value of which nothing but the size is read, and values laid out in another way."""

    class Sized(nn.Module):
        def forward(self, rows, value):
            return value.as_strided((rows.shape[0], 3), (1, rows.shape[0])) + rows.shape[0]

    steps = [[0], [1], [["dim", 0, 0], ["laid out", 2, [1, 0]]], [3]], [[1], [2], [3], [4]]
    model_trt, _ = make(solve, DOUBLE, shift, DOUBLE, schedule=Schedule.of(*steps, [4], 5))
    traced = trace(Sized(), [torch.zeros(4, dtype=torch.bool), torch.randn(4, 3)], max_batch_size=9, fallback=True)
    model_trt.segments[0].waits, model_trt.segments[2] = True, TorchSegment(traced)
    for count in (4, 3, 5, 4, 3, 5, 3):
        same(model_trt, lambda given: (solve(given) * 2 + len(given)) * 2, x(count))
    (run,) = runs(model_trt)
    assert run.inputs == [1, 0] and [len(g.sources) - g.sources.count(None) for g in run.graphs.values()] == [1, 1, 1]


def test_borrowed_outputs_are_the_graphs_own(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    model_trt.borrow_outputs = True
    results = [same(model_trt, eager, x(count)) for count in (3, 4) * 3]
    assert results[2].data_ptr() == results[4].data_ptr() != results[3].data_ptr() == results[5].data_ptr()
    model_trt.borrow_outputs = False
    kept = [same(model_trt, eager, x(3)) for _ in range(4)]
    assert len({result.data_ptr() for result in kept}) == 4


def test_graphs_are_kept_as_the_cache_says(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    model_trt.cuda_graph = GraphCache(shapes=2, after=3)
    for count in (1, 2, 3) * 2:
        same(model_trt, eager, x(count))
    assert not gpu.captured
    for _ in range(40):
        same(model_trt, eager, x(1 + _ % 2))
    (run,) = runs(model_trt)
    assert len(run.graphs) == 2 and gpu.captured == 2
    for _ in range(200):
        same(model_trt, eager, x(5))
    assert len(run.graphs) == 2 and (SIDE, False, ((5, 3),), -1) in run.graphs and len(gpu.made) <= 8
    gpu.held = 2000
    model_trt.cuda_graph = GraphCache(bytes=1999)
    for _ in range(4):
        same(model_trt, eager, x(3))
    assert not runs(model_trt)[0].graphs and model_trt.cuda_graph_refused is None


def test_parameters_and_engines_may_change(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    for _ in range(3):
        same(model_trt, eager, x())
    (buffer,) = [b for b in model_trt.segments[1].constants() if b.is_floating_point()]
    before = buffer.clone()
    buffer.mul_(2)  # in place, as a step of training does
    try:
        given = x()
        torch.testing.assert_close(model_trt(given), (given[:, [2, 0, 1]] * 2 - 2 * before) * 2)
    finally:
        buffer.copy_(before)
    captured = gpu.captured
    gpu.run_on(model_trt.engines[0])  # loaded anew
    for _ in range(3):
        same(model_trt, eager, x())
    assert gpu.captured == captured + 1


def test_contexts_are_given_back(gpu, make):
    model_trt, eager = make(DOUBLE, shift, DOUBLE)
    pools = [next(iter(engine._pools.values())) for engine in model_trt.engines]
    for _ in range(3):
        same(model_trt, eager, x())
    assert [len(pool.unused) for pool in pools] == [0, 0]
    again = copy.deepcopy(model_trt)
    assert again.cuda_graph is True and again._running is None
    model_trt.cuda_graph = False
    gc.collect()
    assert [len(pool.unused) for pool in pools] == [1, 1]


def test_threads_and_streams(gpu, make):
    model_trt, eager = make(DOUBLE, accumulate, DOUBLE, turn, shift, DOUBLE)
    model_trt.cuda_graph = GraphCache(shapes=4, after=1)

    def work(seed):
        gpu.current.stream = (SIDE, OTHER, 9)[seed % 3]
        held = []
        for turn_ in range(25):
            given = torch.full((1 + (seed + turn_) % 2, 3), float(seed * 100 + turn_))
            held = [*held[-5:], (given, model_trt(given))]
            for before, result in held:
                torch.testing.assert_close(result, eager(before))

    at_once([lambda seed=seed: work(seed) for seed in range(8)])
    (run,) = runs(model_trt)
    assert gpu.replayed > 100 and {key[0] for key in run.graphs} <= {SIDE, OTHER, 9}
    assert len({graph.place.stream for graph in run.graphs.values()}) == len({key[0] for key in run.graphs})


@pytest.mark.parametrize(
    ("able", "inputs", "expected", "long"),
    [
        ([1, 1, 1], [[0], [1], [2]], [(0, 3)], []),
        ([1, 0, 1, 1], [[0], [1], [2], [3]], [(2, 4)], []),
        ([1, 1, 1], [[], [1], [2]], [(1, 3)], []),
        ([1, 1, 1], [[["dim", 0, 0]], [], [2]], [], []),
        ([0, 0], [[0], [1]], [], []),
        ([], [], [], []),
        ([1], [[0]], [(0, 1)], [True]),
        ([1, 0, 1, 1], [[0], [1], [], [3]], [(3, 4)], [False, True, True, True]),
        ([1, 0, 1], [[0], [1], [2]], [(2, 3)], [False, True, True]),
    ],
)
def test_groups(able, inputs, expected, long):
    schedule = Schedule.of(inputs, [[i + 1] for i in range(len(able))], [], len(able) + 1)
    assert in_groups(list(map(bool, able)), schedule, long) == [range(*each) for each in expected]
