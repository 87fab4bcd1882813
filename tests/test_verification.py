import pytest
import torch

from torch2rt import verification
from torch2rt.verification import Difference


@pytest.mark.parametrize(
    ("actual", "expected", "absolute", "relative"),
    [
        ([1.0, 2.0], [1.0, 4.0], 2.0, 0.5),
        ([float("nan"), float("inf")], [float("nan"), float("inf")], 0.0, 0.0),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf"), float("inf")),
        ([1.0, 1.0], [1.0, float("inf")], float("inf"), float("inf")),
        ([0.5], [0.0], 0.5, 0.5),
        ([], [], 0.0, 0.0),
    ],
)
def test_difference(actual, expected, absolute, relative):
    difference = Difference(torch.tensor(actual), torch.tensor(expected))
    assert (difference.absolute, difference.relative) == (absolute, relative)


def test_latency_is_the_median(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = Event.clock

        def elapsed_time(self, end):
            return end.time - self.time

    calls = []

    def function(x):
        calls.append(x)
        Event.clock += 100.0 if len(calls) % 10 == 0 else 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert verification._latency(function, function, [torch.ones(1)]) == ("engine 2.000 ms", "eager 2.000 ms")
    assert len(calls) == 120
