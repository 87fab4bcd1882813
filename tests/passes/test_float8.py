"""Casts to fp8 and products of it, as torchao computes them: they become TensorRT's own."""

import pytest
import torch
from harness import Call, compare
from harness.layers import kernels

from torch2rt import UnsupportedError, torch2rt
from torch2rt.backend.tensorrt import IS_RTX


def fp8_product(x, weight, bias, by_row=True):
    """As torchao computes one of a module in fp8, with ranges of each call."""
    low = torch.float8_e4m3fn
    largest = x.abs().amax(-1, keepdim=True) if by_row else x.abs().amax()
    scale = (largest.float() / 448).clamp(min=1e-9).reshape(-1, 1)
    scales = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()).float() / 448
    steps = x.float() / scale.reshape(*(x.shape[:-1] if by_row else ()), 1)
    rows = steps.clamp(-448.0, 448.0).to(low).reshape(-1, x.shape[-1])
    columns = (weight.float() / scales).clamp(-448.0, 448.0).to(low).t()
    scales = scales.reshape(1, -1)
    y = torch.ops.aten._scaled_mm(rows, columns, scale, scales, bias, None, torch.bfloat16, use_fast_accum=True)
    return y.reshape(*x.shape[:-1], -1)


@pytest.mark.skipif(not IS_RTX, reason="other TensorRTs build on a GPU only")
@pytest.mark.parametrize("by_row", [False, True])
def test_products_of_fp8(by_row):
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 64, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    model, x = Call(lambda x: fp8_product(x * 2, weight, bias, by_row)), torch.randn(3, 5, 64, dtype=torch.bfloat16)
    try:
        model(x)
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")
    model_trt = torch2rt(model, [x], max_batch_size=5)
    (product,) = [k for k in kernels(model_trt._networks[0]) if k.type == "gemm"]
    assert (product.inputs[0], product.constants[0]) == ("FP8", "FP8")
    for part in (x, x[:1] * 1000, x[:2] * 0):
        compare(model_trt.reference()(part), model(part), 0.01, 0.01)


def test_casts_to_fp8_that_may_overflow():
    """torch makes NaN of what is beyond fp8, TensorRT its largest number."""
    with pytest.raises(UnsupportedError, match=r"TensorRT has no torch\.float8_e4m3fn"):
        torch2rt(Call(lambda x: x.to(torch.float8_e4m3fn).float()), [torch.randn(2, 3)])
    x = torch.tensor([[0.26, -9.5, 448.0], [1e-4, -500.0, 3.3]])
    model = Call(lambda x: (x.clamp(-448, 448).to(torch.float8_e4m3fn).mT.float() * 2, x + 1))
    compare(torch2rt(model, [x]).reference()(x)[0], model(x)[0], 0, 0)
