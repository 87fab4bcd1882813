"""torch.compile with torch2rt as its backend; the networks are evaluated by the reference."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize("change", ["in place", "replaced", "fused"])
def test_changed_weights(compiled, change, caplog):
    module, x = Net().eval(), torch.randn(2, 3, 4, 5)
    run = compiled(module)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "torch2rt"):
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
        (made,) = Counted.made
        if change == "in place":
            module.last.weight.mul_(-2)
        elif change == "replaced":
            module.last.weight = nn.Parameter(module.last.weight * -2)
        else:
            module.last.weight.grad = torch.ones_like(module.last.weight)
            torch.optim.SGD([module.last.weight], lr=0.7, fused=True).step()
        for _ in range(5):
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)
    assert compile_backend.STABLE - 1 <= made.torch <= compile_backend.STABLE + 1  # the last ones in the conversion
    assert made.engine == 6 and made.converted is not None
    assert caplog.text.count("weights have changed") == 1


def test_gradients_and_refusals_run_in_torch(compiled, caplog):
    module, x = Net().eval(), torch.randn(2, 3, 4, 5)
    with caplog.at_level(logging.WARNING, "torch2rt"):
        compiled(module)(x).sum().backward()
    assert module.last.weight.grad is not None and "needs gradients" in caplog.text

    def between(y):
        y.add_(1)
        return y

    class Writes(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x * 2

    with torch.no_grad(), caplog.at_level(logging.WARNING, "torch2rt"):
        ours, theirs = x.clone(), x.clone()
        torch.testing.assert_close(compiled(Writes(), options={"strict": False})(ours), Writes()(theirs))
        torch.testing.assert_close(ours, theirs)
    assert "a graph runs in torch: The module writes to its input" in caplog.text
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="writes to its input"):
        compiled(Writes())(x)


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
