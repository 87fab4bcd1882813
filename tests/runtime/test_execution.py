"""What a replay does on the host, with the GPU's part left out."""

import contextlib
import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from harness.threads import at_once

from torch2rt import torch2rt
from torch2rt.backend import cuda
from torch2rt.backend.cuda import CaptureError, Copy
from torch2rt.errors import EngineError
from torch2rt.runtime import idle_contexts
from torch2rt.runtime import pool as pool_file
from torch2rt.runtime.cuda_graph import UNCAPTURABLE, CudaGraph
from torch2rt.runtime.graph_cache import GraphCache, Traffic
from torch2rt.runtime.graph_memory import GraphMemory
from torch2rt.runtime.pool import ContextPool
from torch2rt.runtime.shared_lock import SharedLock


class Target:
    """A copy out of a graph: the address that it was told last."""

    address = 0

    def move(self, end, address):
        assert end == Copy.TARGET
        self.address = address


@pytest.fixture
def graph(without_gpu_memory):
    """A captured call that writes 1, 2, 3, ... to where its copy points."""
    graph, target, blocks = CudaGraph.__new__(CudaGraph), Target(), {}
    count = iter(range(1, 1000))
    fresh = graph.fresh

    def remember():
        outputs = fresh()
        blocks.update((output.data_ptr(), output) for output in outputs)
        return outputs

    def replay():
        blocks.pop(target.address).fill_(next(count))

    x = torch.zeros(100)
    graph.copies_inputs, graph.addresses, graph.sources, graph.outputs = False, [x.data_ptr()], [None], []
    graph.results = [((100,), (1,), torch.float32, target)]
    graph.ready, graph.last, graph.replay, graph.fresh = None, lambda: None, replay, remember
    graph.inputs = SimpleNamespace(dtypes=[torch.float32], dense=[torch.Tensor.is_contiguous], index=-1)
    return SimpleNamespace(call=lambda: graph.run([x])[0], graph=graph, target=target)


def test_outputs_that_are_held_are_made_ready_ahead(graph):
    held = [graph.call() for _ in range(5)]
    assert [x[0].item() for x in held] == [1, 2, 3, 4, 5]
    assert graph.graph.ready is not None and graph.target.address == graph.graph.ready[0].data_ptr()
    held += [graph.call()]
    assert [x.unique().item() for x in held] == [1, 2, 3, 4, 5, 6]


def test_outputs_that_are_dropped_are_not(graph):
    for turn in range(1, 6):
        assert graph.call().unique().item() == turn
        assert graph.graph.ready is None


def test_outputs_made_ready_in_another_mode_are_not_given(graph):
    held = [graph.call() for _ in range(3)]
    with torch.inference_mode():
        held += [graph.call() for _ in range(2)]
    held += [graph.call()]
    assert [x.is_inference() for x in held] == [False, False, False, True, True, False]
    assert [x.unique().item() for x in held] == [1, 2, 3, 4, 5, 6]


def test_no_memory_for_the_next_outputs_is_the_next_calls_error(graph):
    held, fresh = [graph.call(), graph.call()], graph.graph.fresh

    def fails():
        raise torch.OutOfMemoryError("no memory")

    graph.graph.fresh = fails
    held += [graph.call()]  # it has what it needs
    with pytest.raises(torch.OutOfMemoryError):
        graph.call()
    graph.graph.fresh = fresh
    held += [graph.call()]
    assert [x.unique().item() for x in held] == [1, 2, 3, 4]


def test_another_input_is_not_read_by_a_graph_of_the_first(graph):
    assert graph.graph.run([torch.zeros(100)]) is None
    assert graph.call().unique().item() == 1


class Captured:
    """A graph that notices when it is replayed twice at once, or after it was let go of."""

    made = calls = calls_before = need = own = 0

    def __init__(self, execution, tensors, capture_stream, borrow, copies_inputs, memory):
        self.execution, self.copies_inputs = execution, copies_inputs
        self.lock, self.gone, self.running = threading.Lock(), False, False
        self.shape = tensors[0].shape
        Captured.made += 1
        if random.random() < 0.1:
            raise EngineError("no capture today")
        time.sleep(0)

    def run(self, tensors):
        assert not self.gone and not self.running and tensors[0].shape == self.shape
        self.running = True
        time.sleep(0)
        self.running = False
        return [tensors[0]] if self.copies_inputs or random.random() < 0.9 else None


def test_graphs_of_many_threads_come_and_go(monkeypatch):
    """Six keys, of which three are kept: each replay is of a graph that is there, and one at a time."""
    monkeypatch.setattr(pool_file, "CudaGraph", Captured)
    monkeypatch.setattr(pool_file.cuda, "synchronize", lambda stream: random.random() < 0.9)
    monkeypatch.setattr(pool_file.cuda, "beside_captures", contextlib.nullcontext)
    monkeypatch.setattr(pool_file.cuda, "enter_context", lambda index: None)
    pool = ContextPool.__new__(ContextPool)
    pool.lock, pool.graphs, pool.uncapturable, pool.memory = threading.RLock(), {}, None, GraphMemory()
    pool.traffic, pool.unused = Traffic(), []
    monkeypatch.setattr(pool.traffic, "is_worth", lambda *arguments: True)
    pool.index, pool.failures, pool.inputs = 0, 0, SimpleNamespace(check=lambda tensors: None)
    pool.capture_stream, pool.unused_context = (
        4,
        lambda: SimpleNamespace(forget=lambda: None, shapes=None, changes=0, exact=True),
    )
    inputs = [torch.zeros(size) for size in range(1, 7)]
    idle = {stream: [] for stream in (1, 2)}
    done = itertools.count()

    def work(seed):
        choose = random.Random(seed)
        for _ in range(400):
            x, stream = choose.choice(inputs), choose.choice([1, 2])
            with contextlib.suppress(EngineError):  # no capture today, or a stream that is busy
                (result,) = pool.replay([x], stream, idle[stream], borrow=False, cache=GraphCache(shapes=3))
                assert result is x
                next(done)

    at_once([lambda seed=seed: work(seed) for seed in range(8)])
    assert next(done) > 1000 and Captured.made > 100 and len(pool.graphs) <= 12


class Uncapturable:
    """A call that cannot be captured, for the reason that a test gives."""

    made, reason = 0, CaptureError("TensorRT cannot")

    def __init__(self, *arguments, **options):
        Uncapturable.made += 1
        raise Uncapturable.reason


@pytest.fixture
def plain_pool(monkeypatch):
    """A pool without a GPU: its plain calls double their input, none of its calls can be captured."""
    monkeypatch.setattr(pool_file, "CudaGraph", Uncapturable)
    monkeypatch.setattr(pool_file.cuda, "beside_captures", contextlib.nullcontext)
    monkeypatch.setattr(pool_file.cuda, "enter_context", lambda index: None)
    monkeypatch.setattr(pool_file.cuda, "is_torchs", lambda stream, index: True)
    monkeypatch.setattr(pool_file, "current_device", lambda: 0)
    monkeypatch.setattr(pool_file, "current_stream", lambda index: 7)
    for file in (pool_file, idle_contexts):
        monkeypatch.setattr(file, "is_capturing", lambda: False)
    monkeypatch.setattr(Uncapturable, "made", 0)
    pool = ContextPool.__new__(ContextPool)
    pool.lock, pool.graphs, pool.uncapturable = threading.RLock(), {}, None
    pool.traffic, pool.memory = Traffic(), GraphMemory()
    monkeypatch.setattr(pool_file, "DEFAULT", GraphCache(after=1))
    pool.profiles, pool.loaded = 1, SimpleNamespace(scratch=None, engine=None, lock=SharedLock())
    pool.index, pool.idle, pool.external, pool.stream, pool.failures = 0, {}, object(), 3, 0
    pool.captured, pool.capture_stream = [], 4
    pool.inputs = SimpleNamespace(check=lambda tensors: None)
    pool.unused_context = lambda: SimpleNamespace(
        run=lambda xs, stream: [xs[0] * 2], forget=lambda: None, shapes=None, changes=0, exact=True
    )
    return pool


def test_an_engine_that_cannot_be_captured_runs_plainly_and_says_so(plain_pool):
    """A few calls of many threads and shapes try to capture it; all calls are right."""
    inputs = [torch.full((size,), float(size)) for size in range(1, 5)]

    def work():
        for x in inputs:
            assert torch.equal(plain_pool.run([x], graph=True)[0], x * 2)

    model_trt = torch2rt(torch.nn.ReLU(), [torch.ones(2, 3)], verify=False, cuda_graph=True)
    model_trt._pools = {0: plain_pool}
    assert model_trt.cuda_graph_refused is None and "CUDA graph" not in repr(model_trt)
    plain_pool.run(inputs, graph=True)
    assert Uncapturable.made == 1 and model_trt.cuda_graph_refused is None  # it may succeed the next time
    at_once([work] * 8)
    assert Uncapturable.made == pool_file.TRIES and not plain_pool.graphs
    assert model_trt.cuda_graph_refused == "TensorRT cannot"
    assert repr(model_trt).endswith("; without CUDA graphs: TensorRT cannot)")
    assert str(model_trt.report).endswith("\nruns without CUDA graphs: TensorRT cannot")
    model_trt.cuda_graph = False
    assert model_trt.cuda_graph_refused is None and "CUDA graph" not in repr(model_trt)


def test_captures_that_failed_say_nothing_of_the_callers_own(plain_pool, monkeypatch):
    x = torch.ones(2)
    for _ in range(pool_file.TRIES):
        plain_pool.run([x], graph=True)
    assert plain_pool.uncapturable == "TensorRT cannot"
    monkeypatch.setattr(pool_file, "is_capturing", lambda: True)
    assert torch.equal(plain_pool.run([x], graph=True)[0], x * 2) and len(plain_pool.captured) == 1


def test_an_engine_that_tensorrt_does_not_let_be_captured_is_never_tried(plain_pool, monkeypatch):
    """It says so before the first call."""
    execution = SimpleNamespace(can_be_captured=lambda stream: False)
    monkeypatch.setattr(pool_file, "Execution", lambda loaded: execution)
    monkeypatch.setattr(pool_file, "on_device", lambda index: contextlib.nullcontext())
    plain_pool.unused = []
    plain_pool.loaded = SimpleNamespace(kernels=SimpleNamespace(save=lambda: None), engine=None, lock=SharedLock())
    plain_pool._make_first_context()
    assert plain_pool.uncapturable == UNCAPTURABLE
    x = torch.ones(2)
    assert torch.equal(plain_pool.run([x], graph=True)[0], x * 2) and Uncapturable.made == 0
    monkeypatch.setattr(pool_file, "is_capturing", lambda: True)
    with pytest.raises(EngineError, match="in a CUDA graph: call the module outside of the capture"):
        plain_pool.run([x])


def test_what_may_pass_is_no_reason_to_run_plainly(plain_pool, monkeypatch):
    monkeypatch.setattr(Uncapturable, "reason", torch.OutOfMemoryError("no memory"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            plain_pool.run([torch.ones(2)], graph=True)
    assert Uncapturable.made == 2 and plain_pool.uncapturable is None
    assert torch.equal(plain_pool.run([torch.ones(2)])[0], torch.full((2,), 2.0))


# CUDA's capture ------------------------------------------------------------------------------------------------------


class Driver:
    """CUDA's driver as far as captures need it: it notes what it is told, and fails where a test wants it to."""

    def __init__(self):
        self.told, self.errors = [], {}

    def __getattr__(self, name):
        def function(*arguments):
            self.told.append((name, *[a for a in arguments if isinstance(a, int)]))
            return self.errors.get(name, 0)

        return function

    def names(self):
        return [name for name, *_ in self.told if name != "cuThreadExchangeStreamCaptureMode"]

    def cuStreamEndCapture(self, stream, graph):
        self.told.append(("cuStreamEndCapture", stream))
        graph._obj.value = 0 if self.errors.get("cuStreamEndCapture") else 11
        return self.errors.get("cuStreamEndCapture", 0)

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        self.told.append(("cuGraphInstantiateWithFlags", graph.value))
        executable._obj.value = 0 if self.errors.get("cuGraphInstantiateWithFlags") else 22
        return self.errors.get("cuGraphInstantiateWithFlags", 0)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda alone=False: driver)
    return driver


def test_a_capture_is_cudas_and_of_one_thread(driver):
    with cuda.CapturedGraph(5) as graph:
        driver.told.append(("work",))
    assert driver.told == [
        ("cuStreamBeginCapture_v2", 5, 1),  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        ("work",),
        ("cuStreamEndCapture", 5),
        ("cuGraphInstantiateWithFlags", 11),
    ]
    assert graph.replay_on(6)() == 0 and driver.names()[-1] == "cuGraphLaunch"
    del graph
    assert driver.names()[-2:] == ["cuGraphExecDestroy", "cuGraphDestroy"]


def test_a_capture_ends_whatever_happens_in_it(driver):
    with pytest.raises(KeyboardInterrupt), cuda.CapturedGraph(5):
        raise KeyboardInterrupt
    assert driver.names() == ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphDestroy"]


@pytest.mark.parametrize("name", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_what_cuda_cannot_capture_is_an_error_and_leaves_nothing(driver, name):
    driver.errors[name] = 901
    with pytest.raises(CaptureError, match="error 901"), cuda.CapturedGraph(5):
        pass
    assert ("cuGraphDestroy" in driver.names()) == (name == "cuGraphInstantiateWithFlags")
    assert "cuGraphExecDestroy" not in driver.names()


def test_a_thread_without_a_gpu_gets_one_and_replays(graph, monkeypatch):
    made, replay, errors = [], graph.graph.replay, iter([cuda.NO_CONTEXT])
    graph.graph.replay = lambda: next(errors, None) or replay()
    monkeypatch.setattr(cuda, "enter_context", made.append)
    assert graph.call().unique().item() == 1 and made == [graph.graph.inputs.index]
    graph.graph.replay = lambda: 700
    with pytest.raises(EngineError, match="error 700"):
        graph.call()
