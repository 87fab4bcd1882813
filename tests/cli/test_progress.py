"""What a terminal shows while a conversion is under way."""

import io
import time

import pytest
import torch

from torch2rt import progress, torch2rt, trace


class Stream(io.StringIO):
    def __init__(self, terminal, encoding="utf-8"):
        super().__init__()
        self.terminal, self.encoding_ = terminal, encoding

    @property
    def encoding(self):
        return self.encoding_

    def isatty(self):
        return self.terminal


class Slow(torch.nn.Module):
    def forward(self, x):
        x = x + 1
        time.sleep(0.4)
        return x * 2


@pytest.mark.parametrize(
    ("terminal", "asked", "encoding", "shown"),
    [
        (True, None, "utf-8", "⠋ trace"),
        (True, None, "ascii", "| trace"),
        (True, False, "utf-8", ""),
        (False, None, "utf-8", ""),
        (False, True, "utf-8", "⠋ trace"),
    ],
)
def test_a_spinner_names_the_module_that_is_traced(monkeypatch, terminal, asked, encoding, shown):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", stream := Stream(terminal, encoding))
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU(), Slow()))
    trace(model, [torch.randn(2, 3)], progress=asked)
    written = stream.getvalue()
    assert written.startswith(f"\r{shown}" if shown else "")
    assert bool(shown) == (" s 0.1\x1b[K\r" in written)
    assert not shown or written.endswith("\r\x1b[K")  # and nothing is left of it
    if not shown:
        assert written == ""


def test_a_short_trace_shows_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Stream(True))
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    trace(torch.nn.ReLU(), [torch.randn(2, 3)])
    assert stream.getvalue() == ""


def test_the_spinner_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", stream := Stream(True))
    spinner = progress.Spinner("trace", None)
    with pytest.raises(KeyError), spinner.turning(lambda: "outer"):
        time.sleep(0.25)
        with spinner.turning(lambda: "inner"):
            time.sleep(0.25)
            raise KeyError
    written = stream.getvalue()
    assert "outer" in written and "inner" in written
    assert written.endswith("\r\x1b[K")


def test_each_stage_is_reported():
    stages = []
    model_trt = torch2rt(
        torch.nn.ReLU(),
        [torch.randn(2, 3)],
        verify=False,
        on_stage=lambda name, result, seconds: stages.append((name, result, seconds)),
    )
    assert [name for name, *_ in stages] == ["trace", "lower", "build"]
    graph, network, engine = (result for _, result, _ in stages)
    assert isinstance(graph, torch.fx.GraphModule) and network.definition is model_trt.network
    assert engine is model_trt.built and all(seconds > 0 for *_, seconds in stages)
