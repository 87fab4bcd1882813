"""Submodules converted in place, for the tensors that they see."""

import pytest
import torch
from torch import nn

from torch2rt import TRTModule, convert_submodules
from torch2rt.errors import InputError, UnsupportedError


class Chooser(nn.Module):
    """A module whose Python looks at values."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "unused": nn.Linear(2, 2)})
        self.head = Head()
        self.svd = Svd()

    def forward(self, x, scale=1.0):
        y = self.encoder["body"](x).mean((2, 3))
        y = y[y[:, 0] > y[:, 0].median() - 0.1]
        return self.svd(self.head({"features": y, "scale": scale}, bias=y[0])["z"])


class Head(nn.Module):
    def forward(self, inputs, *, bias):
        return {"z": torch.tanh(inputs["features"] * inputs["scale"] - bias)}


class Svd(nn.Module):
    def forward(self, z):
        return z * torch.linalg.svdvals(z.T @ z)


def replaced(module, converted):
    for path, part in converted.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, getattr(part, "converted", part).reference())


def test_values_and_ranges():
    module, x, others = (
        Chooser().eval(),
        torch.randn(4, 3, 8, 9),
        [[torch.randn(7, 3, 8, 12)], [torch.randn(2, 3, 9, 9)]],
    )
    calls = [x, others[0][0], torch.randn(3, 3, 8, 10)]
    expected = [module(call, scale=0.5) for call in calls]
    with pytest.raises(InputError, match="'head' is called in several forms"):
        convert_submodules(module, ["head"], [x], kwargs={"scale": 0.5}, others=others)
    others = [[*other, 0.5] for other in others]
    converted = convert_submodules(
        module, {"encoder.body": {}, "head": {"max_batch_size": None}}, [x], kwargs={"scale": 0.5}, others=others
    )
    assert module.head is converted["head"] and type(module.encoder["body"]) is TRTModule
    (spec,) = converted["encoder.body"].interface.inputs
    assert (spec.min, spec.opt, spec.max) == ((2, 3, 8, 9), (4, 3, 8, 9), (7, 3, 9, 12))
    assert [spec.min[0] < spec.max[0] for spec in converted["head"].interface.inputs] == [True, False]
    replaced(module, converted)
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(module(call, scale=0.5), value)


def test_what_is_not_served_runs_in_torch():
    module, x = Chooser().eval(), torch.randn(4, 3, 8, 9)
    larger = torch.randn(4, 3, 19, 9)
    expected = module(larger)
    convert_submodules(module, ["encoder.body"], [x], unserved="torch")
    torch.testing.assert_close(module(larger), expected)


def test_options_are_passed_on_and_nothing_is_replaced_on_failure():
    module, x = Chooser().eval(), torch.randn(4, 3, 8, 9)
    body = module.encoder["body"]
    with pytest.raises(UnsupportedError) as caught:
        convert_submodules(module, ["encoder.body", "svd"], [x])
    assert str(caught.value).startswith("The submodule 'svd' is not converted: torch2rt cannot convert one call")
    assert module.encoder["body"] is body
    converted = convert_submodules(module, {"svd": {"fallback": True}, "encoder.body": {}}, [x], keep_network=False)
    assert converted["svd"].torch_segments and converted["encoder.body"].network is None


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["encoder.trunk"], "no submodule 'encoder.trunk'. Its children are 'encoder', 'head', 'svd'"),
        ([""], "no submodule ''"),
        (["encoder.unused"], "does not call its submodule 'encoder.unused'"),
        (["encoder.body.0", "encoder.body"], "'encoder.body.0' is a part of 'encoder.body'"),
    ],
)
def test_wrong_paths(paths, message):
    with pytest.raises(InputError, match=message):
        convert_submodules(Chooser().eval(), paths, [torch.randn(4, 3, 8, 9)])


def test_wrong_unserved():
    with pytest.raises(InputError, match="unserved='eager' is not one of 'refuse', 'torch'"):
        convert_submodules(Chooser().eval(), ["head"], [torch.randn(4, 3, 8, 9)], unserved="eager")
