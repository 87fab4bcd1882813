import pytest
import torch
from torch import nn

from torch2rt import TraceError, torch2rt

if not {"qnnpack", "fbgemm"} <= {*torch.backends.quantized.supported_engines}:
    pytest.skip("this torch has no quantised kernels", allow_module_level=True)


@pytest.mark.parametrize("kind", ["fbgemm", "qnnpack", "fp16", "table"])
def test_quantize_dynamic(kind):
    """Modules with weights in int8, whose inputs are quantised at each call by what they range over."""
    ao, layers = torch.ao.quantization, nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 4, bias=False)).eval()
    x, before = torch.randn(3, 2, 7), torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = kind if kind in ("fbgemm", "qnnpack") else before
        if kind == "table":
            layers, x = nn.Sequential(nn.Embedding(9, 6)), torch.arange(8).reshape(4, 2)
            layers[0].qconfig = ao.float_qparams_weight_only_qconfig
            model = ao.convert(ao.prepare(layers.eval()))
        else:
            dtype = torch.float16 if kind == "fp16" else torch.qint8
            model = ao.quantize_dynamic(layers, {nn.Linear}, dtype)
        model_trt = torch2rt(model, [x], max_batch_size=5)
        for part in (x, x[:1], x * 0, -x.abs() if kind != "table" else x, x * 1000 if kind != "table" else x):
            torch.testing.assert_close(
                model_trt.reference()(part), model(part), rtol=1e-5, atol=1e-5 * model(part).abs().max().item()
            )
        products = ["QUANTIZE"] * 2 if kind == "fbgemm" else []
        assert [k for _, k in model_trt._networks[0].facts()["layers"] if k == "QUANTIZE"] == products
    finally:
        torch.backends.quantized.engine = before


def test_trained_for_quantisation():
    """As `torch.ao` prepares and trains modules for kernels of x86: their integers are int8's without a zero point."""
    ao = torch.ao.quantization
    torch.manual_seed(0)
    model = nn.Sequential(ao.QuantStub(), nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 18)).train()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    model = ao.prepare_qat(model)
    for shift in (0.2, 0.5):
        model(torch.randn(30, 7) + shift)
    x = torch.randn(3, 7) * 2
    with pytest.raises(TraceError, match="disable_observer"):
        torch2rt(model.eval(), [x])
    model.apply(ao.disable_observer)
    model_trt = torch2rt(model, [x], max_batch_size=5)
    for part in (x, x[:1] * 1000):
        torch.testing.assert_close(model_trt.reference()(part), model(part), rtol=1e-5, atol=1e-5)
    kinds = [kind for _, kind in model_trt._networks[0].facts()["layers"]]
    assert (kinds.count("QUANTIZE"), kinds.count("DEQUANTIZE")) == (3, 5)
    model.apply(ao.disable_fake_quant)
    torch.testing.assert_close(torch2rt(model, [x]).reference()(x), model(x))
