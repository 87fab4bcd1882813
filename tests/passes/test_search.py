"""precision="auto": the fewest modules in float32 that keep a metric within a tolerance."""

import pytest
import torch
from harness import compare
from torch import nn

from torch2rt import InputError, plan, torch2rt
from torch2rt.passes.search import largest_distance


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
