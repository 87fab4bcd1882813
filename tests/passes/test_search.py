"""precision="auto": the fewest modules in float32 that keep a metric within a tolerance."""

import pytest
import torch
from harness import compare
from torch import nn

from torch2rt import InputError, torch2rt
from torch2rt.passes.search import largest_distance
from torch2rt.precision_plan import plan_precision as plan


class Cancelling(nn.Module):
    """Loses what is small beside a large number that is added and taken away again."""

    def __init__(self, large):
        super().__init__()
        self.large = large

    def forward(self, x):
        return (x + self.large) - self.large


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), Cancelling(100.0), nn.Linear(8, 8), Cancelling(1500.0), nn.GELU(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).eval()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def modules_kept(options):
    rows = plan(model(), [X], precision="auto", **options).rows
    return {row.module for row in rows if row.reason == "precision='auto'"}


def test_the_fewest_modules_are_kept():
    assert modules_kept(dict(tolerance=1.0)) == set()
    assert modules_kept(dict(tolerance=0.1)) == {"3"}
    assert modules_kept(dict(tolerance=0.01)) == {"1", "3"}
    assert modules_kept(dict(tolerance=0.0)) >= {"0", "1", "2", "3", "5"}  # the other one follows float32 by itself


def test_a_conversion_with_its_report(device):
    converted, x = model().to(device), X.to(device)
    model_trt = torch2rt(converted, [x], precision="auto", tolerance=0.01)
    (text,) = [t for t in model_trt.report.assumptions if "auto" in t]
    assert text.startswith("precision='auto': 2 of 6 modules stay in float32: 3, 1. The metric is ")
    assert text.endswith("with 6 kept, the tolerance 0.01") and "with 0, " in text
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), converted(x), 0.02, 0.02)


def test_a_metric_of_ones_own():
    seen = []

    def metric(actual, expected):
        seen.append((len(actual), len(expected)))
        return float(sum((a - b).abs().max() for a, b in zip(actual, expected)))

    samples = [torch.randn(5, 6) for _ in range(2)]
    kept = modules_kept(dict(metric=metric, tolerance=0.05, samples=samples))
    assert set(seen) == {(3, 3)} and "3" in kept
    assert modules_kept(dict(tolerance=0.1, keep_fp32=["3"])) == set()


def test_distances():
    nan = torch.tensor([torch.nan, 1.0])
    assert largest_distance([nan, torch.ones(2)], [torch.ones(2), torch.ones(2)]) != 0
    assert largest_distance([torch.tensor([1, 2])], [torch.tensor([3, 4])]) == 0
    assert largest_distance([torch.zeros(2)], [torch.zeros(2)]) == 0


def test_refused():
    with pytest.raises(InputError, match=r"tolerance is for precision='auto'; precision='fp16' has none"):
        torch2rt(model(), [X], precision="fp16", tolerance=0.1)
    with pytest.raises(InputError, match=r"the metric is 1 with every module in float32, beyond the tolerance of 0.5"):
        torch2rt(model(), [X], precision="auto", tolerance=0.5, metric=lambda actual, expected: 1.0)


# From int8 ------------------------------------------------------------------------------------------------------------


class Sharp(nn.Module):
    """A layer whose input has a channel so large that int8 has few numbers for the others, beside two that are easy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.sharp, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.ones(16).index_fill(0, torch.tensor([3]), 100.0))
        self.sharp.weight.data /= self.scale

    def forward(self, x):
        return self.last(self.sharp(self.first(x).sigmoid() * self.scale))


def sharp_rows(**options):
    options = dict(precision="auto", calibration=[X], quantize_all=True, calibration_method="minmax", **options)
    return plan(Sharp().eval(), [X], **options)


def test_the_fewest_modules_are_kept_from_int8():
    found = {tolerance: sharp_rows(tolerance=tolerance) for tolerance in (1.0, 0.01, 0.002)}
    kept = {t: {r.module for r in p.rows if "precision='auto'" in r.reason} for t, p in found.items()}
    assert kept == {1.0: set(), 0.01: {"sharp"}, 0.002: {"sharp", "last"}}
    assert {r.dtype for r in found[0.01].rows if r.module == "last"} == {"int8"}
    assert all(search.modules == [] for search in (p.searches[0] for p in found.values()))  # none in float32
    assert found[0.01].searches[1].modules == ["sharp"] and found[0.01].searches[1].wide == "float16"
    both = sharp_rows(tolerance=1e-5).searches
    assert both[0].modules and set(both[1].modules) == {"first", "sharp", "last"}
    assert sharp_rows(tolerance=0.01, keep_float=["sharp"]).searches[1].modules == []


def test_a_conversion_from_int8(device, tmp_path):
    pytest.importorskip("matplotlib")
    model, x = Sharp().eval().to(device), X.to(device)
    options = dict(precision="auto", calibration=[x], quantize_all=True, calibration_method="minmax", tolerance=0.01)
    model_trt = torch2rt(model, [x], **options)
    first, second, *_ = model_trt.report.assumptions
    assert first.startswith("precision='auto': 0 of 4 modules stay in float32. The metric is ")
    assert second.startswith("precision='auto': 1 of 3 modules stay in float16: sharp. The metric is ")
    found = (model_trt if device.type == "cuda" else model_trt.reference())(x)
    assert (found - model(x)).norm() < 0.01 * model(x).norm()
    (_, search) = sharp_rows(tolerance=0.01).searches
    rows = search.table().splitlines()
    assert rows[0].split() == ["kept", "metric"] and rows[2].split()[0] == "1" and rows[2].endswith("taken")
    search.picture(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
