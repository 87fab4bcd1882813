"""Models known to overflow in float16, with weights so large that they do: those layers stay in float32.

What stays there because of its values is named; Gemma's norms and what they are added to are in float32 anyhow.
"""

import copy

import pytest
import torch

from torch2rt import torch2rt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
GEMMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_key_value_heads=2)


def t5():
    config = transformers.T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, vocab_size=99)
    model = transformers.T5EncoderModel(config)
    scale(model, ("wi", "wo"), 2000)
    return model, IDS, lambda output: output.last_hidden_state


def gemma2():
    """Its embeddings are multiplied, and its norms have very large weights."""
    config = transformers.Gemma2Config(head_dim=8, sliding_window=4, vocab_size=99, use_cache=False, **GEMMA)
    model = transformers.Gemma2Model(config)
    for layer in model.layers:
        layer.post_feedforward_layernorm.weight.data += 3e4
    return model, IDS, lambda output: output.last_hidden_state


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, num_queries=7, num_labels=5, d_model=32)
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, **layers, **heads
    )
    model = transformers.DetrForObjectDetection(config)
    scale(model, ("fc1", "fc2"), 3000)
    return model, IMAGES, lambda output: (output.logits, output.pred_boxes)


def scale(model, names, factor):
    for name, module in model.named_modules():
        if name.endswith(names):
            module.weight.data *= factor


class Outputs(torch.nn.Module):
    def __init__(self, model, outputs):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, x):
        return self.outputs(self.model(x))


MODELS = {"T5": (t5, "DenseReluDense.wo"), "Gemma 2": (gemma2, None), "DETR": (detr, "mlp.fc2")}


ROWS = {name: (name, "fp16", 0.02) for name in MODELS} | {f"T5 {way}": ("T5", way, 0.15) for way in ("int8", "fp8")}


@pytest.mark.parametrize("row", ROWS)
def test_overflowing_layers_stay_in_float32(row, device):
    name, precision, error = ROWS[row]
    make, layer = MODELS[name]
    torch.manual_seed(0)
    model, x, outputs = make()
    model, x = Outputs(model, outputs).eval().to(device), x.to(device)
    options = {} if precision == "fp16" else {"calibration": [x], "quantize_all": True}
    model_trt = torch2rt(model, [x], precision=precision, **options)
    kept = [text for text in model_trt.report.assumptions if "overflows float16" in text]
    assert layer is None or any(layer in text and "of up to" in text for text in kept), model_trt.report
    assert model_trt.report.verified
    with torch.no_grad():
        found, expected = (model_trt if device.type == "cuda" else model_trt.reference())(x), model(x)
        half = copy.deepcopy(model).half()(x.half() if x.is_floating_point() else x)
    assert layer is not None or not half.isfinite().all()  # others bound their values where they are in float16
    pairs = zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]
    for ours, theirs in pairs:
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=error * theirs.abs().max().item())
