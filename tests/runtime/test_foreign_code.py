"""Modules with code that torch cannot look into: operators without fake kernels, numpy, generators, looks at values."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import graph_break, torch2rt
from torch2rt.errors import EngineError, InputError, Torch2RTError, TraceError
from torch2rt.runtime.partitioned.segments import PartitionedModule


@torch.library.custom_op("torch2rt_tests::running", mutates_args=())
def running(x: torch.Tensor, factor: int) -> torch.Tensor:
    return torch.from_numpy(np.cumsum(x.numpy() * factor, axis=0))


@torch.library.custom_op("torch2rt_tests::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0] > 0].clone()


@torch.library.custom_op("torch2rt_tests::first_rows", mutates_args=())
def first_rows(x: torch.Tensor) -> torch.Tensor:
    return x[: 3 if x.sum() < 1000 else 2].clone()  # two rows of large numbers, which no drawn value shows


@torch.library.custom_op("torch2rt_tests::double_in_place", mutates_args={"x"})
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        return torch.from_numpy(np.tanh(x.detach().numpy() * factor)), x * 2

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


class Between(nn.Module):
    """A layer, a function, another layer."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 6), nn.Linear(6, 5), function
        self.generators = {"of": [torch.Generator().manual_seed(7)]}

    def forward(self, x):
        return self.function(self, torch.tanh(self.first(x)) * 2)


def no_fake_kernel(self, y):
    return self.last(running(y, 3)).relu() * 2


def sizes_unknown(self, y):
    return self.last(positive(y)).exp() + 1, positive(y * -1)


def in_place(self, y):
    left, rows = y[:, :3], y[1:]
    double_in_place(left)
    double_in_place(rows)
    return self.last(y), left * 2


def numpy(self, y):
    a, b = Numpy.apply(self.last(y), 0.5)
    return a.exp() * 2, b


def looks_at_values(self, y):
    return F.gaussian_nll_loss(y, y * 2, y.abs() + 0.1, reduction="none") * 2, F.one_hot(y.abs().long()).sum(0)


def own_generator(self, y):
    (generator,) = self.generators["of"]
    return self.last(y) + torch.randn(5, generator=generator), torch.rand(y.shape, generator=generator)


def new_generator(self, y):
    generator = torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)
    return self.last(y) + torch.randn(5, generator=generator) * torch.rand(5)


def seeds(self, y):
    a = torch.rand(2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        noise = torch.randn_like(y)
    return self.last(y + noise), torch.rand(3), a


def seeds_for_good(self, y):
    torch.manual_seed(5)
    return self.last(y) * torch.rand(5)


def boxes(self, y):
    batched_nms = pytest.importorskip("torchvision").ops.batched_nms
    y = y.repeat(300, 1) + torch.arange(300 * y.shape[0])[:, None] / 200
    y = y[y[:, 4] > 3.0 + y[0, 0].sign()]
    corners = torch.cat([y[:, :2], y[:, :2] + y[:, 2:4].abs()], 1)
    kept = batched_nms(corners, y[:, 4], (y[:, 5] > 4).long(), 0.3)
    return corners[kept], y[kept, 4] * 2


CASES = [
    no_fake_kernel,
    sizes_unknown,
    in_place,
    numpy,
    looks_at_values,
    own_generator,
    new_generator,
    seeds,
    seeds_for_good,
    boxes,
]


def same(module, run, *inputs):
    results = []
    for call in (module, run):
        torch.manual_seed(2)
        for (generator,) in [getattr(module, "generators", {"of": [torch.Generator()]})["of"]]:
            generator.manual_seed(4)
        first = call(*[x.clone() for x in inputs])
        results.append((first, call(*[x.clone() for x in inputs]), torch.rand(2)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_equals_eager(function):
    module = Between(function).eval()
    model_trt = torch2rt(module, [torch.randn(4, 6)], max_batch_size=9, fallback=True, min_segment_calls=1)
    assert model_trt.engines and model_trt.torch_segments
    for size in (4, 1, 9):
        same(module, model_trt.reference(), torch.randn(size, 6))


def test_no_boxes_are_left():
    module = Between(lambda self, y: boxes(self, y - 99)).eval()
    model_trt = torch2rt(module, [torch.randn(4, 6)], fallback=True, min_segment_calls=1)
    assert model_trt.reference()(torch.ones(4, 6))[0].shape == (0, 4)


def test_a_size_that_runs_on_drawn_values_did_not_show_is_refused():
    module = Between(lambda self, y: self.last(first_rows(y * 1e3)) * 2).eval()
    module.first.bias.data.fill_(-9.0)
    same(module, torch2rt(module, [torch.ones(4, 6)], fallback=True, min_segment_calls=1).reference(), torch.ones(4, 6))
    module.first.bias.data.fill_(9.0)
    model_trt = torch2rt(module, [torch.ones(4, 6)], fallback=True, min_segment_calls=1, verify=False)
    with pytest.raises((InputError, RuntimeError)):
        model_trt.reference()(torch.ones(4, 6))


def test_a_generator_of_nobody_is_refused():
    generator = torch.Generator().manual_seed(1)
    module = Between(lambda self, y: self.last(y) + torch.rand(5, generator=generator)).eval()
    before = generator.get_state()
    with pytest.raises(TraceError, match="generator in an attribute of the module"):
        torch2rt(module, [torch.randn(4, 6)], fallback=True)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("function", [seeds, own_generator], ids=lambda f: f.__name__)
def test_generators_are_not_saved(function):
    module = Between(function).eval()
    model_trt = torch2rt(module, [torch.randn(4, 6)], fallback=True, min_segment_calls=99)
    same(module, model_trt, torch.randn(4, 6))
    with pytest.raises(EngineError, match="has a generator, sets the seed"):
        model_trt.state_dict()


class Types(nn.Module):
    """Inputs of types that TensorRT has not."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(300, 6), nn.Linear(6, 5)

    def forward(self, wave, wide, small):
        rotated = wave * torch.polar(torch.ones(6), torch.arange(6.0))
        counts = self.table(small.long()).sum(1)
        return self.last(rotated.abs() + counts).relu() * 2, rotated.conj(), wide.cumsum(0) / 3, small + 1


def test_inputs_of_other_types():
    make = lambda n: (  # noqa: E731
        torch.randn(n, 6, dtype=torch.complex64),
        torch.randn(n, 6, dtype=torch.float64),
        torch.randint(300, (n, 4), dtype=torch.int16),
    )
    module = Types().eval()
    with pytest.raises(InputError, match="TensorRT has no complex numbers"):
        torch2rt(module, make(4))
    model_trt = torch2rt(module, make(4), max_batch_size=9, fallback=True, min_segment_calls=1)
    assert model_trt.engines
    for size in (4, 2, 9):
        same(module, model_trt.reference(), *make(size))
    again = PartitionedModule()
    again.load_state_dict(model_trt.state_dict())
    assert again.interface == model_trt.interface


class Chooses(nn.Module):
    """Python that looks at values and counts calls."""

    def __init__(self):
        super().__init__()
        self.last, self.calls = nn.Linear(6, 3), 0

    def forward(self, y, *, limit):
        self.calls += 1
        rows = [row * 2 if row.sum() > limit["at"] else row - 1 for row in y if row[0] < 0.5]
        rows = torch.stack(rows) if rows else y.new_zeros(0, 6)
        return {"rows": self.last(rows), "count": torch.tensor(len(rows)), "none": None}


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), Chooses(), nn.Linear(3, 5)

    def forward(self, x):
        found = self.middle(torch.tanh(self.first(x)) * 2, limit={"at": 0.3})
        return self.last(found["rows"]).softmax(-1) + 1, found["count"] * 2


def test_graph_break():
    module, x = Broken().eval(), torch.randn(8, 6)
    with pytest.raises(TraceError, match="depends on the value of a tensor"):
        torch2rt(module, [x], max_batch_size=9, fallback=True)
    assert graph_break(module.middle) is module.middle
    model_trt = torch2rt(module, [x], max_batch_size=9, fallback=True, min_segment_calls=1)
    assert len(model_trt.engines) == 2 and len(model_trt.torch_segments) == 1
    before = module.middle.calls
    for size in (8, 1, 9):
        same(module, model_trt.reference(), torch.randn(size, 6))
    assert module.middle.calls == before + 12  # it is the module itself that runs, also within the converted one
    with pytest.raises(EngineError, match="Python that cannot be traced"):
        model_trt.state_dict()
    with pytest.raises(InputError, match="or a function, not a int"):
        graph_break(3)


@graph_break
def each_row_by_its_own_number(rows, *, most):
    return [torch.stack([row[: int(row[0].clamp(1, most))].sum() for row in rows]), rows.flip(0)]


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = torch.tanh(self.first(x)) * 4
        sums, flipped = each_row_by_its_own_number(y[y[:, 1] > 0], most=5)
        return self.last(flipped).softmax(-1) * 2 + sums[:, None], sums


def test_graph_break_of_a_function():
    module, x = Loops().eval(), torch.randn(8, 6)
    assert each_row_by_its_own_number.__name__ == "each_row_by_its_own_number"
    model_trt = torch2rt(module, [x], max_batch_size=9, fallback=True, min_segment_calls=1)
    assert "each_row_by_its_own_number at" in str(model_trt.report) and len(model_trt.engines) >= 2
    for size in (8, 3, 9):
        same(module, model_trt.reference(), torch.randn(size, 6))
    with pytest.raises(Torch2RTError):
        torch2rt(module, [x])


def test_graph_break_of_what_returns_views():
    module = nn.Sequential(nn.Linear(6, 4), graph_break(nn.Flatten()), nn.ReLU()).eval()
    with pytest.raises(TraceError, match=r"Flatten returns is not known: on drawn values .* views"):
        torch2rt(module, [torch.randn(2, 6)], fallback=True)
