"""LoRA adapters of peft: merged and beside the weights, by refit, and restored exactly."""

import copy

import pytest
import torch
from torch import nn

from torch2rt import RefitError, torch2rt

peft = pytest.importorskip("peft")

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    return model.eval()


def converted(model, **options):
    return torch2rt(model, [X], verify=False, refittable=True, **options)


def error(model_trt, model):
    with torch.no_grad():
        return (model_trt.reference()(X) - model(X)).abs().max().item()


def test_beside_the_weights(model):
    model_trt = converted(model)
    assert error(model_trt, model) < 1e-6
    before, state = model_trt.reference()(X), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name and "default" in name:
                value.mul_(1.5)
    assert len(model_trt.refit()) == 4 and error(model_trt, model) < 1e-6
    model.load_state_dict(state)
    model_trt.refit()
    assert torch.equal(model_trt.reference()(X), before)


def test_merged(model):
    plain = copy.deepcopy({name: x for name, x in model.state_dict().items() if "base_layer" in name})
    model.merge_adapter()
    model_trt = converted(model)
    before = model_trt.reference()(X)
    model.unmerge_adapter()
    with pytest.raises(RefitError, match="merged_adapters"):  # the engine has no adapters beside its weights
        model_trt.refit()
    model.load_state_dict(plain, strict=False)  # what unmerging has rounded
    model.set_adapter("second")
    model.merge_adapter(["second"])
    model_trt.refit(strict=False)
    assert error(model_trt, model) < 1e-6 < (model_trt.reference()(X) - before).abs().max()
    model.unmerge_adapter()
    model.load_state_dict(plain, strict=False)
    model.set_adapter("default")
    model.merge_adapter(["default"])
    model_trt.refit(strict=False)
    assert torch.equal(model_trt.reference()(X), before)


def test_another_adapter_and_none(model):
    model_trt = converted(model)
    before = model_trt.reference()(X)
    model.set_adapter("second")
    with pytest.raises(RefitError, match="active_adapter"):
        model_trt.refit()
    model_trt.refit(strict=False)
    assert error(model_trt, model) < 1e-6
    model.set_adapter("default")
    model_trt.refit(strict=False)
    assert torch.equal(model_trt.reference()(X), before)
    with model.disable_adapter():
        model_trt.refit(strict=False)
        assert error(model_trt, model) < 1e-6
    model_trt.refit(strict=False)
    assert torch.equal(model_trt.reference()(X), before)


def test_followed_while_it_trains(model):
    model_trt = torch2rt(model, [X], verify=False, follow=True)
    reference = model_trt.reference()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert (reference(X) - model(X)).abs().max() < 1e-5
