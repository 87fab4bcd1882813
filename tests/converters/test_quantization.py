import pytest
import torch
from harness import B, Call, S, case, check_case, compare, half, parametrize

from torch2rt import TraceError, UnsupportedError, lower, torch2rt, trace
from torch2rt.passes.quantization.quantized import scaled

SCALES, ZEROS = torch.tensor([0.1, 0.03, 0.7]), torch.tensor([3, -2, 0], dtype=torch.int32)


def per_channel(x):
    return torch.fake_quantize_per_channel_affine(x, SCALES.to(x.device), ZEROS.to(x.device), 1, -20, 30)


CASES = [
    case(torch.fake_quantize_per_tensor_affine, [(B, 3, S)], 0.07, 5, -10, 20),
    case(torch.fake_quantize_per_tensor_affine, [(B, 5)], 0.3, 7, 0, 255),
    case(torch.fake_quantize_per_tensor_affine, [half(B, 5)], 0.1, 2, -128, 127),
    case(
        lambda x: torch.fake_quantize_per_tensor_affine(
            x, torch.tensor(0.07, device=x.device), torch.tensor(5, dtype=torch.int32, device=x.device), -10, 20
        ),
        [(B, 3, S)],
        id="scale-tensor",
    ),
    case(torch.ops.aten.fake_quantize_per_tensor_affine.default, [(B, 3)], 0.07, 5, -10, 20),
    case(per_channel, [(B, 3, S)], id="per-channel"),
    case(torch.fake_quantize_per_tensor_affine, [(B, 3, S)], 0.013, 0, -128, 127),
    case(torch.fake_quantize_per_tensor_affine, [(B, 3)], 0.3, 0, -7, 4),
    case(torch.fake_quantize_per_tensor_affine, [half(B, 5)], 0.01, 0, -127, 127),
    case(lambda x: torch.fake_quantize_per_tensor_affine(x.bfloat16(), 0.3, 0, -128, 127), [(B, 3)], id="bfloat16"),
    case(
        lambda x: torch.fake_quantize_per_tensor_affine(
            x, torch.tensor(0.07, device=x.device), torch.tensor(0, dtype=torch.int32, device=x.device), -128, 127
        ),
        [(B, 3, S)],
        id="int8-scale-tensor",
    ),
    case(lambda x: scaled(x, SCALES.to(x.device)), [(B, S, 3)], id="scaled"),
    case(lambda x: scaled(x, SCALES.to(x.device), -SCALES.half().to(x.device)), [half(B, 3)], id="scaled-with-bias"),
]


@parametrize(CASES)
def test_quantization(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize(
    ("call", "layers"), [((0.1, 0, -128, 127), 1), ((0.1, 0, -20, 30), 1), ((0.1, 3, 0, 127), 1), ((0.1, 3, 0, 255), 0)]
)
def test_int8_is_said_in_tensorrts_own_layers(call, layers):
    kinds = [
        name
        for _, name in lower(trace(Call(torch.fake_quantize_per_tensor_affine, call), [torch.ones(2, 3)])).facts()[
            "layers"
        ]
    ]
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == layers


def test_what_is_not_finite(device):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.05, -0.05, 0.15], device=device)
    call = Call(torch.fake_quantize_per_tensor_affine, (0.1, 1, -7, 200))  # not said in int8
    model_trt = torch2rt(call, [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), call(x), 1e-6, 0.0)


def test_refused():
    with pytest.raises((TraceError, UnsupportedError), match=r"quant_min=5 is above quant_max=3|quant_min"):
        torch2rt(Call(torch.fake_quantize_per_tensor_affine, (0.1, 1, 5, 3)), [torch.ones(2, 3)])
