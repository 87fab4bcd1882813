"""torch.compile with torch2rt as its backend; the networks are evaluated by the reference."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from torch2rt import compile_backend
from torch2rt.errors import InputError


class Net(nn.Module):
    def __init__(self, between=lambda x: x):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.between = between

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x))).mean((2, 3)) * x.shape[0]
        return F.softmax(self.last(self.between(y)), -1)


class Counted(compile_backend._Compiled):
    """Counts what ran by the engine's network, and what in torch."""

    made = []

    def __init__(self, *args):
        self.engine = self.torch = 0
        super().__init__(*args)
        Counted.made.append(self)

    def __call__(self, *values):
        before = self.converted
        outer, graph = self, self.graph

        def count(*args):
            outer.torch += 1
            return graph(*args)

        self.graph = count
        try:
            return super().__call__(*values)
        finally:
            self.graph = graph
            self.engine += before is not None


@pytest.fixture
def compiled(monkeypatch):
    torch._dynamo.reset()
    Counted.made = []
    monkeypatch.setattr(compile_backend, "_Compiled", Counted)

    def make(module, options=None, **arguments):
        options = {"reference": True, "strict": True, **(options or {})}
        return torch.compile(module, backend=compile_backend.backend, options=options, **arguments)

    yield make
    torch._dynamo.reset()


def test_it_is_registered():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "torch2rt"]
    assert entry.load() is compile_backend.backend


@pytest.mark.parametrize(("dynamic", "mode"), [(None, torch.no_grad), (True, torch.inference_mode)])
def test_sizes(compiled, dynamic, mode):
    module = Net().eval()
    run = compiled(module, fullgraph=True, dynamic=dynamic)
    with mode():
        for size in (3, 5, 4):
            x = torch.randn(size, 3, 4, 5)
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
        large = torch.randn(50, 3, 4, 5)
        torch.testing.assert_close(run(large), module(large), rtol=1e-4, atol=1e-5)
    assert sum(made.torch for made in Counted.made) <= 1 and all(made.converted for made in Counted.made)
    assert len(Counted.made) <= 3


def test_graph_breaks_and_fallback(compiled):
    def between(y):
        y = torch.linalg.svd(y)[0] @ y
        return y * 2 if float(y.sum()) > 1e9 else y + 1

    module = Net(between).eval()
    run = compiled(module, options={"min_segment_calls": 1})
    with torch.no_grad():
        x = torch.randn(3, 3, 4, 5)
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    assert len(Counted.made) >= 2 and all(made.converted is not None for made in Counted.made)


@pytest.mark.parametrize("change", ["in place", "replaced", "fused", "data", "numpy"])
def test_changed_weights(compiled, change, caplog):
    module, x = Net().eval(), torch.randn(2, 3, 4, 5)
    run = compiled(module, options={"compare_weights": change in ("data", "numpy")})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "torch2rt"):
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
        (made,) = Counted.made
        if change == "in place":
            module.last.weight.mul_(-2)
        elif change == "data":
            module.last.weight.data.mul_(-2)
        elif change == "numpy":
            module.last.weight.detach().numpy()[2] *= -3
        elif change == "replaced":
            module.last.weight = nn.Parameter(module.last.weight * -2)
        else:
            module.last.weight.grad = torch.ones_like(module.last.weight)
            torch.optim.SGD([module.last.weight], lr=0.7, fused=True).step()
        for _ in range(5):
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    assert compile_backend.STABLE - 1 <= made.torch <= compile_backend.STABLE + 1  # the last ones in the conversion
    assert made.engine == 6 and made.converted is not None
    assert caplog.text.count("weights or numbers have changed") == 1


def test_gradients_and_refusals_run_in_torch(compiled, caplog):
    module, x = Net().eval(), torch.randn(2, 3, 4, 5)
    with caplog.at_level(logging.WARNING, "torch2rt"):
        compiled(module)(x).sum().backward()
    assert module.last.weight.grad is not None and "needs gradients" in caplog.text

    class Draws(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    refusing = {"fallback": False}
    with torch.no_grad(), caplog.at_level(logging.WARNING, "torch2rt"):
        torch.manual_seed(1)
        ours = compiled(Draws(), options={"strict": False, **refusing})(x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, Draws()(x))
    assert "a graph runs in torch: " in caplog.text and "random" in caplog.text
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="random"):
        compiled(Draws(), options=refusing)(x)


def scaled(x, n):
    return torch.tanh(x) * n + x.new_ones(n + 1).sum()


def written_after_a_break(x):
    y, part = torch.tanh(x), x[1:]
    torch._dynamo.graph_break()
    part.add_(1)
    return y + x


def results_share_memory(x):
    y = torch.tanh(x)
    part = y[1:]
    torch._dynamo.graph_break()
    part.mul_(2)
    return y - x


def returned_as_they_are(x):
    return x, x.view(-1)[2:], torch.tanh(x), x.t()


def written_and_viewed(x):
    return x.add_(1).view(-1), torch.tanh(x)


class Cache(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(5, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.kept.copy_(torch.cat([self.kept[1:], self.linear(x[:1])]))
        self.count.add_(1)
        return torch.softmax(self.kept, 0) * self.count + x[0]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return torch.tanh(self.norm(x) * 2)


@pytest.mark.parametrize(
    ("make", "others", "in_engines"),
    [
        (lambda: scaled, [(2,), (3,), (3,), (3,), (3,), (5,)], 2),
        (lambda: written_after_a_break, [()] * 2, 2),
        (lambda: results_share_memory, [()] * 2, 1),
        (lambda: returned_as_they_are, [()] * 2, 1),
        (lambda: written_and_viewed, [()] * 2, 0),
        (Cache, [()] * 4, 1),
        (lambda: Normed().train(), [()] * 4, 0),
    ],
    ids=["ints", "view of an input", "views", "inputs", "written", "buffers", "statistics"],
)
def test_memory_and_numbers_are_as_in_eager(compiled, make, others, in_engines):
    theirs = make()
    ours = copy.deepcopy(theirs)
    run = compiled(ours, options={"strict": False, "min_segment_calls": 1})
    with torch.no_grad():
        for rest in others:
            x = torch.rand(3, 4)
            y = x.clone()
            actual, expected = run(x, *rest), theirs(y, *rest)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(x, y)
            for one, other in zip(*map(tree_leaves, (actual, expected)), strict=True):
                assert (address(one) == address(x)) == (address(other) == address(y))
    if isinstance(ours, nn.Module):
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-4, atol=1e-5)
    assert sum(made.converted is not None for made in Counted.made) == in_engines


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_weights_that_cannot_be_watched_stay_in_torch(compiled, caplog):
    with torch.inference_mode():
        module, x = nn.Linear(4, 3), torch.rand(2, 4)
        run = compiled(module, options={"strict": False})
        for _ in range(5):
            torch.testing.assert_close(run(x), module(x))
            module.weight.mul_(1.5)
    assert "made in inference mode" in caplog.text and Counted.made[0].converted is None


def test_a_new_weight_in_the_place_of_an_old_one_is_noticed(compiled):
    module, x = nn.Linear(4, 3), torch.rand(2, 4)
    run = compiled(module)
    with torch.no_grad():
        for _ in range(8):
            module.weight = None
            module.weight = nn.Parameter(torch.rand(3, 4))
            torch.testing.assert_close(run(x), module(x))


def test_options(compiled):
    with torch.no_grad():
        with pytest.raises(Exception, match="unexpected keyword argument 'speed'"):
            compiled(Net().eval(), options={"speed": 1})(torch.randn(2, 3, 4, 5))
        torch._dynamo.reset()
        module, x = Net().eval(), torch.randn(2, 3, 4, 5)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=9)
        compiled(module)(x)
    (spec,) = Counted.made[-1].converted.interface.inputs
    assert (spec.min[0], spec.max[0]) == (2, 9)
    with pytest.raises(InputError, match="max-autotune"):
        compile_backend.backend(torch.fx.symbolic_trace(nn.ReLU()), [x], mode="max-autotune")
    for items in (["last"], [nn.Linear], module):
        with pytest.raises(InputError, match=r"(?s)keep_fp32: .*: the graphs of torch.compile know no modules"):
            compile_backend.backend(torch.fx.symbolic_trace(nn.ReLU()), [x], options={"keep_fp32": items})
