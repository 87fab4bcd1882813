"""Decoders of transformers with a batch from 1 and without a mask: one engine, with causal attention."""

import pytest
import torch
from test_transformers import DECODER, GPT2

from torch2rt import torch2rt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DECODERS = {
    "GPT2Model": ("GPT2Config", GPT2),
    "LlamaModel": ("LlamaConfig", DECODER),
    "Qwen2Model": ("Qwen2Config", DECODER),
    "MistralModel": ("MistralConfig", dict(DECODER, sliding_window=5)),
    "PhiModel": ("PhiConfig", DECODER),
    "GemmaModel": ("GemmaConfig", dict(DECODER, head_dim=8)),
}
QUICK = "LlamaModel"


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-models")
        metafunc.parametrize("name", [name for name in DECODERS if name == QUICK or everything])


@pytest.mark.parametrize("length", ["static", "dynamic"])
def test_a_batch_from_one_without_a_mask_is_one_engine(name, length, device):
    config, options = DECODERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval().to(device)
    ids = lambda *shape: torch.randint(3, 99, shape, device=device)  # noqa: E731
    low, high = (7, 7) if length == "static" else (2, 16)
    ranges = {"min_shapes": [(1, low)], "max_shapes": [(4, high)]}
    model_trt = torch2rt(model, [ids(2, 7)], **ranges, verify=False)
    assert len(model_trt.built.each()) == 1
    assert "input_ids.shape[0] == 1" in str(model_trt.report)
    assert model_trt.interface.constraints == []
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for batch in (1, 2, 4):
        for size in {low, 7, high}:
            x = ids(batch, size)
            with torch.no_grad():
                ours, theirs = run(x).last_hidden_state, model(x).last_hidden_state
            allowed = 2e-2 if device.type == "cuda" else 1e-4
            torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)
