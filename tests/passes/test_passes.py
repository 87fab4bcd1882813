"""Between trace and lower: every pass leaves a graph that can be printed, run, copied, saved and lowered."""

import copy
import io

import pytest
import torch
from harness import Call
from test_fusion import ATTENTIONS, PRODUCTS
from test_precision import CASES
from test_tracing import module
from torch import nn
from torch.nn import functional as F

from torch2rt import AccuracyError, InputError, UnsupportedError, lower, passes, torch2rt, trace
from torch2rt.graph import check_graph


def masked(q, v, seen):
    mask = seen[:, None, None].expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, v, v, mask & torch.ones(1, 1, 1, 3, dtype=torch.bool))


def looped(x):
    return torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))[1]


class Shared(nn.Module):
    """A weight that a fusion replaces in one place and another call still uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight) * x.shape[0]


MODULES = {
    **{name: (model, [torch.randn(2, *size)]) for name, (model, size) in PRODUCTS.items()},
    **{name: (model, [torch.randn(2, 5, 6)]) for name, (model, _) in ATTENTIONS.items()},
    "a shared weight": (Shared(), [torch.randn(2, 3, 5, 4)]),
    "a mask": (Call(masked), [torch.randn(2, 2, 5, 4), torch.randn(2, 2, 3, 4), torch.ones(2, 3, dtype=torch.bool)]),
    "linear layers": (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)), [torch.randn(2, 3)]),
    "a loop": (Call(looped), [torch.randn(2, 3)]),
    **{
        f"float64: {row.id}": (
            row.function if isinstance(row.function, nn.Module) else Call(row.function),
            [torch.randn(2, 3)],
        )
        for row in CASES
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_after_each_pass_a_graph_is_whole(name):
    model, inputs = MODULES[name]
    model = copy.deepcopy(model).cpu().eval()
    graph = trace(model, inputs, max_batch_size=None if name == "a loop" else 4)
    expected = model(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    check_graph(graph)
    for pass_ in passes.default():
        before, text, meta = graph, str(graph.graph), graph.meta["torch2rt"]
        graph = pass_(graph)
        assert str(before.graph) == text and before.meta["torch2rt"] is meta
        check_graph(graph)
        assert str(graph.graph) and "def forward" in graph.print_readable(print_output=False)
        copied = copy.deepcopy(graph)
        check_graph(copied)
        for one in (graph, copied, *([saved(graph)] if name in PRODUCTS else [])):
            for ours, theirs in zip(one(*inputs), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert lower(graph, passes=[]).facts() == lower(copied, passes=[]).facts() == lower(before).facts()


def saved(graph):
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_constants_have_readable_names():
    model, inputs = MODULES["a shared weight"]
    graph = passes.run(trace(copy.deepcopy(model).eval(), inputs), passes.default())
    names = {node.target for node in graph.graph.find_nodes(op="get_attr")}
    assert names == {"conv.weight", "conv_weight_fused", "conv_bias_fused"}
    assert names == {*dict(graph.named_parameters()), *dict(graph.named_buffers())}


def test_a_graph_without_anything_to_do_is_the_same():
    graph = trace(nn.ReLU(), [torch.randn(2, 3)])
    assert passes.run(graph, passes.default()) is graph


def reciprocals(graph):
    """The example of `torch2rt.passes`."""
    graph = passes.copy_graph(graph)
    for node in graph.graph.find_nodes(op="call_function", target=torch.Tensor.div):
        x, divisor = node.args
        if isinstance(divisor, torch.fx.Node) and (value := passes.constant_of(graph, divisor)) is not None:
            node.target = torch.Tensor.mul
            node.args = (x, passes.add_constant(graph, "reciprocal", 1 / value, before=node))
    return passes.finish(graph)


def test_a_pass_of_ones_own():
    made = module(lambda self, x: x.div(self.weight) + 1, weight=torch.tensor([2.0, 4.0, 0.5]))
    x = torch.randn(2, 3)
    graph = trace(made, [x])
    changed = reciprocals(graph)
    assert {n.target for n in changed.graph.find_nodes(op="get_attr")} == {"reciprocal"}
    assert {n.target for n in graph.graph.find_nodes(op="get_attr")} == {"weight"}
    model_trt = torch2rt(made, [x], passes=[*passes.default(), reciprocals])
    torch.testing.assert_close(model_trt.reference()(x), made(x))
    assert any("mul" in name for name, _ in model_trt.built.facts["layers"])


def wrong(graph):
    graph = passes.copy_graph(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.Tensor.div)
    node.target = torch.Tensor.mul
    return passes.finish(graph)


def test_a_pass_that_computes_something_else_is_found_out():
    made = module(lambda self, x: (x + 1).div(self.weight) - 1, weight=torch.tensor([2.0, 4.0, 0.5]))
    with pytest.raises(AccuracyError, match=r"The first call that differs is torch.Tensor.div .* at .*test_passes.py"):
        torch2rt(made, [torch.randn(2, 3)], passes=[*passes.default(), wrong])


def test_without_passes_nothing_is_fused_and_float64_is_refused():
    model, size = PRODUCTS["conv2d"]
    graph = trace(copy.deepcopy(model).cpu(), [torch.randn(2, *size)])
    assert lower(graph, passes=[]).num_layers > lower(graph).num_layers == 1
    with pytest.raises(UnsupportedError, match="float64"):
        torch2rt(Call(lambda x: x.double().mean().float()), [torch.randn(2, 3)], passes=[])


def without_meta(graph):
    return torch.fx.GraphModule(graph, graph.graph)


def with_a_tensor(graph):
    graph = passes.copy_graph(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.Tensor.mul)
    node.args = (node.args[0], torch.ones(3))
    return passes.finish(graph)


def without_source(graph):
    graph = passes.copy_graph(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.Tensor.mul)
    del node.meta["source"]
    return graph


def without_the_attribute(graph):
    graph = passes.copy_graph(graph)
    del graph.weight
    return graph


BROKEN = {
    without_meta: r"Expected a graph from torch2rt.trace, got a GraphModule without meta\['torch2rt'\]",
    with_a_tensor: "node 'mul' has a tensor among its arguments; make it a get_attr node",
    without_source: r"node 'mul' has no meta\['source'\]",
    without_the_attribute: "node 'weight' stands for the attribute 'weight', which the graph module does not have",
    lambda graph: None: "Expected a graph from torch2rt.trace, got a NoneType",
}


@pytest.mark.parametrize(("pass_", "message"), BROKEN.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_pass_that_breaks_the_graph_is_named(pass_, message):
    made = module(lambda self, x: x.mul(self.weight), weight=torch.ones(3))
    with pytest.raises(InputError, match=f"The pass '{pass_.__name__}' leaves a broken graph.*{message}"):
        torch2rt(made, [torch.randn(2, 3)], passes=[pass_])


def test_passes_that_cannot_be():
    with pytest.raises(InputError, match=r"'fuse' in passes= is no pass"):
        torch2rt(nn.ReLU(), [torch.randn(2, 3)], passes=["fuse"])
    with pytest.raises(InputError, match=r"float64='refuse' chooses among the default passes"):
        torch2rt(nn.ReLU(), [torch.randn(2, 3)], passes=[], float64="refuse")
    with pytest.raises(InputError, match=r"Expected a graph from torch2rt.trace"):
        lower(torch.fx.symbolic_trace(nn.ReLU()))
