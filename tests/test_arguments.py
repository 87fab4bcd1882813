"""What users write for an argument is taken as they mean it, or refused by the argument's name."""

import logging

import pytest
import torch
import torch.nn.functional as F
from test_tracing import module

from torch2rt import InputError, TraceError, UnsupportedError, arguments, build, lower, torch2rt, trace
from torch2rt.backend import tensorrt as backend
from torch2rt.backend.tensorrt import LOG, trt

X = torch.randn(2, 3)
Severity = trt.ILogger.Severity

TAKEN = [
    ("whole_number", ("n", 1e9), 1_000_000_000),
    ("whole_number", ("n", None), None),
    ("whole_number", ("n", 3), 3),
    ("given_names", ("n", "x"), ["x"]),
    ("given_names", ("n", ("x", "y")), ["x", "y"]),
    ("given_names", ("n", None), None),
    ("compute_capabilities", ([8.6, "8.9", (9, 0), "current"],), ["8.6", "8.9", "9.0", "current"]),
    ("compute_capabilities", (8.6,), ["8.6"]),
    ("compute_capabilities", ("12.0",), ["12.0"]),
    ("compute_capabilities", ((8, 9),), ["8.9"]),
    ("compute_capabilities", ((8.6, 8.9),), ["8.6", "8.9"]),
    ("compute_capabilities", ([],), []),
    ("severity", ("verbose",), 4),
    ("severity", ("Warning",), 2),
    ("severity", (Severity.INFO,), 3),
    ("severity", (None,), None),
    ("severity", (1,), 1),
]


@pytest.mark.parametrize(("function", "given", "expected"), TAKEN, ids=repr)
def test_arguments_are_taken_as_meant(function, given, expected):
    result = getattr(arguments, function)(*given)
    assert result == expected and type(result) is type(expected)


REFUSED = [
    (dict(max_workspace_size=1.5), r"max_workspace_size=1.5 must be a whole number"),
    (dict(max_workspace_size="1 GiB"), r"max_workspace_size='1 GiB' must be a whole number"),
    (dict(max_workspace_size=float("inf")), r"max_workspace_size=inf must be a whole number"),
    (dict(max_workspace_size=-1), r"max_workspace_size=-1 must be at least 0"),
    (dict(optimization_level=2.5), r"optimization_level=2.5 must be a whole number"),
    (dict(optimization_level=6), r"optimization_level=6 must be 0 to 5"),
    (dict(max_batch_size="4"), r"max_batch_size='4' must be a whole number"),
    (dict(max_batch_size=True), r"max_batch_size=True must be a whole number"),
    (dict(log_level="loud"), r"log_level='loud' is none of TensorRT's severities.*'error', 'warning', 'info'"),
    (dict(log_level=10), r"log_level=10 is none of TensorRT's severities"),
    (dict(input_names=3), r"input_names must be strings: 3"),
    (dict(output_names=["a", 3]), r"output_names must be strings: \['a', 3\]"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_makes_no_sense_is_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        torch2rt(torch.nn.ReLU(), [X], verify=False, **given)


@pytest.mark.skipif(not backend.IS_RTX, reason="only TensorRT for RTX builds for other GPUs")
def test_compute_capabilities_may_be_numbers():
    network = lower(trace(torch.nn.ReLU(), [X], max_batch_size=4.0))
    assert build(network, compute_capabilities=[8.6], max_workspace_size=1e9, optimization_level=3.0)
    with pytest.raises(InputError, match=r"compute_capabilities='7.1': this TensorRT for RTX knows 'current', "):
        build(network, compute_capabilities=7.1)


# TensorRT's messages -------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(monkeypatch):
    """What the logger `torch2rt` gets, and nothing that pytest's handlers are in the way of."""

    class Handler(logging.Handler):
        def emit(self, record):
            records.append((record.levelno, record.getMessage()))

    records, logger, handler = [], logging.getLogger("torch2rt"), Handler()
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("level", "argument", "expected"),
    [
        (logging.NOTSET, None, [logging.ERROR, logging.WARNING]),  # the root logger's level is WARNING
        (logging.DEBUG, None, [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, logging.DEBUG]),
        (logging.CRITICAL, "info", [logging.ERROR, logging.WARNING, logging.INFO]),
        (logging.CRITICAL, None, [logging.ERROR]),
    ],
)
def test_the_logger_carries_tensorrts_messages(messages, capfd, level, argument, expected):
    logging.getLogger("torch2rt").setLevel(level)
    LOG.log(Severity.ERROR, "an error")
    with LOG.capture(arguments.severity(argument)) as errors:
        LOG.log(Severity.WARNING, "a warning")
        LOG.log(Severity.INFO, "an information")
        LOG.log(Severity.VERBOSE, "a detail")
        LOG.log(Severity.ERROR, "captured")
    assert [found for found, _ in messages] == expected
    assert messages[0] == (logging.ERROR, "an error") and errors == ["captured"]
    assert capfd.readouterr().err == ""
    LOG.recent()


@pytest.mark.parametrize(("argument", "shown"), [(None, []), ("verbose", ["a warning", "a detail"])])
def test_without_handlers_messages_are_printed(monkeypatch, capfd, argument, shown):
    monkeypatch.setattr(logging.getLogger("torch2rt"), "propagate", False)
    LOG.log(Severity.ERROR, "an error")
    with LOG.capture(arguments.severity(argument)):
        LOG.log(Severity.WARNING, "a warning")
        LOG.log(Severity.VERBOSE, "a detail")
        LOG.log(Severity.ERROR, "captured")
    assert capfd.readouterr().err.splitlines() == [f"[TensorRT] {line}" for line in ["an error", *shown]]
    LOG.recent()


def test_a_build_speaks_to_the_logger(messages):
    torch2rt(torch.nn.ReLU(), [X], log_level="verbose", verify=False)
    assert {logging.DEBUG, logging.INFO} <= {level for level, _ in messages}


# Advice --------------------------------------------------------------------------------------------------------------


class Cache:
    """As those of transformers are: objects with tensors in them."""

    def __init__(self):
        self.layers = [None]


def test_objects_are_taken_apart():
    cache = Cache()
    cache.layers = [X, {"n": X * 2}]
    graph = trace(module(lambda self, x, cache: (x + cache.layers[1]["n"], cache)), [X, cache])
    arguments = graph.meta["torch2rt"].interface.inputs
    assert [spec.name for spec in arguments] == ["x", "cache_layers_0", "cache_layers_1_n"]


def test_a_changed_object_says_what_to_do():
    def forward(self, x, cache):
        cache.layers = [x]
        return x + 1

    with pytest.raises(TraceError, match=r'changes the Cache among its inputs.*state="write"'):
        trace(module(forward), [X, Cache()])


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 3), iter([1]), torch.Generator(), {1, 2}], ids=type)
def test_other_objects_are_refused(value):
    with pytest.raises(InputError, match="is not a tensor, a constant"):
        trace(module(lambda self, x, other: x + 1), [X, value])


def test_dropout_in_eval_mode_says_what_is_missing():
    with pytest.raises(UnsupportedError, match=r"training=self\.training: training=True is the default"):
        torch2rt(module(lambda self, x: F.dropout(x, 0.3)).eval(), [X])
