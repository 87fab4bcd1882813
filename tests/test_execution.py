"""What a replay does on the host, with the GPU's part left out."""

from types import SimpleNamespace

import pytest
import torch

from torch2rt import execution
from torch2rt.cuda import Copy
from torch2rt.execution import Graph


class Target:
    """A copy out of a graph: the address that it was told last, and how often it was told one."""

    def __init__(self):
        self.address, self.told = 0, 0

    def move(self, end, address):
        assert end == Copy.TARGET
        if address != self.address:
            self.address, self.told = address, self.told + 1


@pytest.fixture
def graph(monkeypatch):
    """A captured call that writes 1, 2, 3, ... to where its copy points."""
    monkeypatch.setattr(
        execution, "empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    )
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
    runtime = SimpleNamespace(dtypes=[torch.float32], index=-1)
    return SimpleNamespace(call=lambda: graph.run(runtime, [x])[0], graph=graph, target=target, x=x, runtime=runtime)


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
