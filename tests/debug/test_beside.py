"""A conversion beside its module: own errors are where they arise, total errors where they show."""

import copy

import pytest
import torch
from torch import nn

import torch2rt as package
from torch2rt import InputError, passes, torch2rt
from torch2rt.debug import compare, first_difference
from torch2rt.graph import check_graph


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x, *, scale):
        x = self.second(torch.tanh(self.first(x)))
        parts = x.split([2, 4], -1)
        return self.third(torch.cat(parts[::-1], -1) * scale), x.argmax(-1), (x > 0).any()


X, KWARGS = torch.randn(3, 5), {"scale": torch.tensor([2.0])}


def wrong(graph):
    """Scales what the second layer gives, which float32 does not."""
    graph = passes.copy_graph(graph)
    (second,) = [n for n in graph.graph.nodes if n.op == "call_function" and n.meta["module"] == "second"]
    bias = graph.get_parameter("second.bias").detach()
    new = passes.add_constant(graph, "other", bias + torch.tensor([0, 0, 0, 0.5, 0, 0]), before=second)
    second.args = (*second.args[:2], new)
    return passes.finish(graph)


def test_an_error_is_found_where_it_arises():
    model = Chain().eval()
    model_trt = torch2rt(model, [X], kwargs=KWARGS, passes=[*passes.default(), wrong], verify=False)
    found = compare(model_trt, [X], KWARGS)
    by_call = {(row.module, row.function): row for row in found.rows}
    second = by_call["second", "torch.nn.functional.linear"]
    assert second.own == pytest.approx(0.5, abs=1e-5) and second.error == second.own
    third = by_call["third", "torch.nn.functional.linear"]
    assert third.error > 0.1 and third.own < 1e-5
    assert found.modules()[0] == second
    assert first_difference(model_trt, [X], KWARGS) == second
    assert second.source.partition(":")[0].endswith(".py") and second.dtype == "float32"
    assert second.low == pytest.approx(float(by_call_value(model).min())) and second.lost == 0
    text = str(found)
    assert text.splitlines()[0] == "the reference beside the module" and text.splitlines()[2].startswith("second")


def by_call_value(model):
    with torch.no_grad():
        return model.second(torch.tanh(model.first(X)))


def test_a_right_conversion_has_no_difference():
    model_trt = torch2rt(Chain().eval(), [X], kwargs=KWARGS, verify=False)
    assert first_difference(model_trt, [X], KWARGS) is None
    assert first_difference(model_trt, [X], KWARGS, tolerance=-1.0) == compare(model_trt, [X], KWARGS).rows[0]


@pytest.mark.parametrize(
    "options", [dict(precision="fp16"), dict(precision="bf16"), dict(precision="fp16", io_precision="fp16")]
)
def test_in_low_precision(options):
    model_trt = torch2rt(Chain().eval(), [X], kwargs=KWARGS, **options)
    rows = compare(model_trt, [X], KWARGS).rows
    low = {"fp16": "float16", "bf16": "bfloat16"}[options["precision"]]
    assert {row.dtype for row in rows if row.function.endswith("linear")} == {low}
    assert all(row.own_relative < 0.01 for row in rows if row.dtype == low)
    assert first_difference(model_trt, [X], KWARGS) is None
    assert first_difference(model_trt, [X], KWARGS, tolerance=1e-6).module == "first"


def test_what_overflows_is_lost():
    class Large(nn.Module):
        def forward(self, x):
            return torch.relu(x @ x.mT) * 1.0

    model_trt = torch2rt(Large(), [X], precision="fp16", samples=[], verify=False)
    row = first_difference(model_trt, [X * 1000])
    assert row.function.endswith("matmul__") or "matmul" in row.function
    assert row.lost > 0 and row.high > 65504
    assert compare(model_trt, [X]).modules()[0].lost == 0


def test_the_module_may_go():
    model = Chain().eval()
    model_trt = torch2rt(model, [X], kwargs=KWARGS)
    check_graph(model_trt._networks[0].traced)
    before = compare(model_trt, [X], KWARGS).rows
    del model
    assert compare(model_trt, [X], KWARGS).rows == before


def test_refused():
    model_trt = torch2rt(Chain().eval(), [X], kwargs=KWARGS, keep_network=False)
    with pytest.raises(
        InputError, match=r"this module has no network. Convert it with torch2rt\(..., keep_network=True\)"
    ):
        compare(model_trt, [X], KWARGS)
    model_trt = torch2rt(Chain().eval(), [X], kwargs=KWARGS)
    with pytest.raises(InputError, match="does not have the form"):
        compare(model_trt, [X, X], KWARGS)
    with pytest.raises(InputError, match="by='gpu' is not one of 'reference', 'engine'"):
        compare(model_trt, [X], KWARGS, by="gpu")
    assert package.debug.compare is compare


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    compare(torch2rt(Chain().eval(), [X], kwargs=KWARGS), [X], KWARGS).picture(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


def test_by_the_engine(device):
    if device.type != "cuda":
        pytest.skip("engines run on a GPU")
    model, x, kwargs = copy.deepcopy(Chain()).eval().to(device), X.to(device), {"scale": KWARGS["scale"].to(device)}
    model_trt = torch2rt(model, [x], kwargs=kwargs, precision="fp16")
    assert first_difference(model_trt, [x], kwargs, by="engine") is None
    assert not any(p.is_cuda for p in model_trt._networks[0].traced.parameters())


class Segments(nn.Module):
    """Two layers, and a call between them that TensorRT has not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.first(x * 2).relu()
        return self.second(y + torch.linalg.svdvals(y).sum() / 9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_modules_in_segments(precision):
    """All engines' calls in one table; a torch call only passes errors on."""
    options = {"precision": "int8", "calibration": [X], "quantize_all": True} if precision == "int8" else {}
    model, sizes = Segments().eval(), {"max_batch_size": 4}
    model_trt = torch2rt(model, [X], fallback=True, min_segment_calls=1, **sizes, **options)
    for x in (X, X[:2]):
        rows = {(row.module, row.function.split(".")[-1]): row for row in compare(model_trt, [x]).rows}
        layers = [rows[name, "linear"] for name in ("first", "second")]
        low, high = (1e-3, 0.1) if precision == "int8" else (-1.0, 1e-5)
        assert all(low < row.own_relative < high and low < row.relative < high for row in layers)
        assert first_difference(model_trt, [x], tolerance=0.2) is None


class Branches(nn.Module):
    """A module of two paths, by its batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return (self.large if x.shape[0] > 2 else self.small)(x).cumsum(0)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.register_buffer("sum", torch.ones(3, 6))

    def forward(self, x):
        self.sum.add_(self.layer(x) * 10)
        return self.sum * 2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_engines_of_several_sizes_and_state(precision):
    x = torch.randn(3, 6)
    options = {"calibration": [x], "quantize_all": True} if precision == "int8" else {}
    data = {"calibration": [x, x[:1]], "quantize_all": True} if precision == "int8" else {}
    model_trt = torch2rt(Branches().eval(), [x], max_batch_size=4, precision=precision, **data)
    for part, path in ((x, "large"), (x[:2], "small")):
        rows = compare(model_trt, [part]).rows
        assert [row.module for row in rows] == [path, ""] and 0 < rows[0].relative < 0.05
    model_trt = torch2rt(Sums().eval(), [x], state="write", precision=precision, **options)
    assert "layer" in {row.module for row in compare(model_trt, [x]).rows}
    before = max(row.high for row in compare(model_trt, [x]).rows)
    model_trt.state["sum"].fill_(500.0)  # which the comparison begins with, and leaves as it is
    assert max(row.high for row in compare(model_trt, [x]).rows) > before + 500
    assert (model_trt.state["sum"] == 500).all()
    assert first_difference(model_trt, [x], tolerance=1e-7).module == "layer"
