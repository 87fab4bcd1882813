"""Graphs as data: what is taken apart is put together again, and nothing else is called."""

import json

import pytest
import torch

from torch2rt import EngineError, torch2rt
from torch2rt.conversion.rebuilt import check_source, network_of
from torch2rt.engine.source import decode, encode


class Parts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.tensor([1.5, -0.5, 2.0, 0.25]).reshape(4, 1, 1))
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x):
        y = torch.nn.functional.leaky_relu(self.norm(self.conv(x)), 0.3) * self.scale
        first, second = y.split([1, 3], dim=1)
        kept = torch.where(first > float("-inf"), first, second[:, -1:])
        return {"a": kept.to(torch.float16), "b": (second[..., 1::2, None].flatten(2), x.shape[0])}


class Loop(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)), torch.fft.rfft(x).abs()


CASES = {
    "parts": (Parts(), (2, 3, 9, 8), dict(max_batch_size=5)),
    "cond": (Loop(), (2, 6), {}),
    "lstm": (torch.nn.LSTM(4, 3, 2, bidirectional=True), (5, 2, 4), dict(max_shapes=[(9, 2, 4)])),
    "attention": (torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8), dict(max_batch_size=3)),
    "fp16": (Parts(), (2, 3, 9, 8), dict(precision="fp16")),
    "fp8": (Parts(), (2, 3, 9, 8), dict(precision="fp8", calibration=[[torch.rand(2, 3, 9, 8)]], quantize_all=True)),
    "int4": (torch.nn.Sequential(torch.nn.Linear(64, 9)), (2, 64), dict(precision="int4_weights")),
    "int8": (Parts(), (2, 3, 9, 8), dict(precision="int8", calibration=[[torch.rand(2, 3, 9, 8)]], quantize_all=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_gives_the_same_network_again(name):
    module, shape, options = CASES[name]
    x = torch.randn(shape)
    model_trt = torch2rt(module.eval(), [x], verify=False, progress=False, **options)
    (network,) = model_trt._networks
    nodes, tensors = encode(network.lowered)
    again = network_of(json.loads(json.dumps(nodes)), tensors, network.interface, network.nan)
    check_source(again, network)
    assert again.interface is network.interface
    ours, theirs = again.facts()["layers"], network.facts()["layers"]
    assert len(ours) == len(theirs) or name in ("int8", "fp8", "int4")  # whose passes leave calls that nobody uses
    if name == "parts":
        assert ours == theirs and any(layer.startswith("conv.") for layer, _ in ours), "the names of modules survive"
    given = torch.randn(shape)
    decoded = decode(nodes, tensors, torch.device("cpu"))
    with torch.no_grad():
        for a, b in zip(decoded.graph(given), network.lowered(given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tied_weights_are_kept_once():
    layer = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).eval()
    model_trt = torch2rt(model, [torch.randn(2, 3)], verify=False, progress=False)
    _, tensors = encode(model_trt._networks[0].lowered)
    assert len(tensors) == 2


X = [["x", "placeholder", "x"]]
OUT = ["output", "output", {"tuple": [{"node": "y"}]}]


def call(name, *args):
    return [*X, ["y", "call", name, {"list": [{"node": "x"}, *args]}, {"dict": []}, ["", ""]], OUT]


DAMAGED = [
    (call("os.system", "true"), "calls os.system, which has no converter"),
    (call("torch.load"), "calls torch.load, which has no converter"),
    (call("torch.ops.load_library", "x.so"), "calls torch.ops.load_library"),
    (call("operator.methodcaller"), "calls operator.methodcaller"),
    (call("torch.relu", {"dtype": "load"}), "takes torch.load for a dtype"),
    (call("torch.relu", {"code": "1"}), "argument of an unknown kind, 'code'"),
    (call("torch.relu", {"node": "z"}), "makes no sense"),
    ([["x", "placeholder", "x=print(1)"], OUT], "which is no name"),
    ([*X, ["y", "tensor", 'a".b', 0], OUT], "which is no name"),
    ([*X, ["y", "subgraph", "__class__.forward", X], OUT], "which is no name"),
    ([*X, ["y", "tensor", "a", 7], OUT], "makes no sense"),
    ([["x", "exec", "print()"]], "unknown kind, 'exec'"),
]


@pytest.mark.parametrize(("nodes", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_nothing_but_converted_calls_is_read(nodes, message):
    with pytest.raises(EngineError, match=message):
        decode(nodes, [torch.ones(2)], torch.device("cpu"))


def test_what_cannot_be_said_is_refused():
    graph = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    x = graph.graph.placeholder("x")
    graph.graph.output((graph.graph.call_function(torch.relu, (x, object())),))
    graph.graph.find_nodes(op="call_function", target=torch.relu)[0].meta.update(
        val=torch.ones(1), module="", source=""
    )
    with pytest.raises(EngineError, match="among the arguments of a call, which cannot be saved"):
        encode(graph)
