"""What a replay does on the host, with the GPU's part left out."""

import collections
import contextlib
import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from threads import at_once

from torch2rt import runtime as runtime_file
from torch2rt.cuda import Copy
from torch2rt.errors import EngineError
from torch2rt.execution import Graph
from torch2rt.runtime import Runtime


class Target:
    """A copy out of a graph: the address that it was told last."""

    address = 0

    def move(self, end, address):
        assert end == Copy.TARGET
        self.address = address


@pytest.fixture
def graph(without_gpu_memory):
    """A captured call that writes 1, 2, 3, ... to where its copy points."""
    graph, target, blocks = Graph.__new__(Graph), Target(), {}
    count = iter(range(1, 1000))
    fresh = graph.fresh

    def remember():
        outputs = fresh()
        blocks.update((output.data_ptr(), output) for output in outputs)
        return outputs

    def replay():
        blocks.pop(target.address).fill_(next(count))

    x = torch.zeros(100)
    graph.own, graph.addresses, graph.sources, graph.outputs = False, [x.data_ptr()], [None], []
    graph.results = [((100,), (1,), torch.float32, target)]
    graph.ready, graph.last, graph.replay, graph.fresh = None, lambda: None, replay, remember
    runtime = SimpleNamespace(dtypes=[torch.float32], dense=[torch.Tensor.is_contiguous], index=-1)
    return SimpleNamespace(call=lambda: graph.run(runtime, [x])[0], graph=graph, target=target, runtime=runtime)


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
    assert graph.graph.run(graph.runtime, [torch.zeros(100)]) is None
    assert graph.call().unique().item() == 1


class Captured:
    """A graph that notices when it is replayed twice at once, or after it was let go of."""

    made = 0

    def __init__(self, runtime, execution, tensors, borrow, own):
        self.execution, self.own = execution, own
        self.lock, self.gone, self.running = threading.Lock(), False, False
        self.shape = tensors[0].shape
        Captured.made += 1
        if random.random() < 0.1:
            raise EngineError("no capture today")
        time.sleep(0)

    def run(self, runtime, tensors):
        assert not self.gone and not self.running and tensors[0].shape == self.shape
        self.running = True
        time.sleep(0)
        self.running = False
        return [tensors[0]] if self.own or random.random() < 0.9 else None


def test_graphs_of_many_threads_come_and_go(monkeypatch):
    """Six keys, of which three are kept: each replay is of a graph that is there, and one at a time."""
    monkeypatch.setattr(runtime_file, "Graph", Captured)
    monkeypatch.setattr(runtime_file, "GRAPHS", 3)
    monkeypatch.setattr(runtime_file.cuda, "synchronize", lambda stream: random.random() < 0.9)
    monkeypatch.setattr(runtime_file.cuda, "beside_captures", contextlib.nullcontext)
    runtime = Runtime.__new__(Runtime)
    runtime.lock, runtime.graphs = threading.RLock(), collections.OrderedDict()
    runtime.check = lambda tensors: None
    runtime.take = lambda idle: idle.pop() if idle else SimpleNamespace(shapes=None)
    inputs = [torch.zeros(size) for size in range(1, 7)]
    idle = {stream: [] for stream in (1, 2)}
    done = itertools.count()

    def work(seed):
        choose = random.Random(seed)
        for _ in range(400):
            x, stream = choose.choice(inputs), choose.choice([1, 2])
            with contextlib.suppress(EngineError):  # no capture today, or a stream that is busy
                (result,) = runtime.replay([x], stream, idle[stream], borrow=False)
                assert result is x
                next(done)

    at_once([lambda seed=seed: work(seed) for seed in range(8)])
    assert next(done) > 1000 and Captured.made > 100 and len(runtime.graphs) <= 12
