import copy

import pytest
import torch
from harness import B, Call, Data, S, bools, case, check_case, floats, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

T = torch.Tensor
uint8 = lambda *shape: ints(*shape, low=0, high=256, dtype=torch.uint8)  # noqa: E731

CASES = [
    case(lambda x: copy.deepcopy(x * 2) + 1, [(B, 3)], id="deepcopy"),
    case(T.to, [(B, 3)], torch.float16),
    case(T.to, [floats(B, 3, low=-9, high=9)], torch.int64),
    case(T.to, [floats(B, 3, low=-9, high=9)], dtype=torch.int32, copy=True, non_blocking=True),
    case(T.to, [half(B, S)], torch.float32, memory_format=torch.contiguous_format),
    case(lambda x: x.to(x.device), [(B, 3)], id="to-device"),
    case(lambda x: x.to(x.device, torch.bfloat16), [(B, 3)], id="to-device-dtype"),
    case(lambda x: x.to(device=x.device, dtype=torch.bool), [ints(B, 3, low=-1, high=2)], id="to-bool"),
    case(lambda x, y: x.to(y) + y, [ints(B, 3), half(B, 3)], id="to-other"),
    case(T.type, [(B, 3)], torch.float16),
    case(T.type, [bools(B, 3)], dtype=torch.int64),
    case(lambda x: x.type(torch.int32 if x.type().endswith("FloatTensor") else torch.int64), [(B, 3)], id="type-name"),
    case(lambda x, y: x.type_as(y), [(B, 3), ints(2, dtype=torch.int32)], id="type_as"),
    *[
        case(lambda x, m=m: getattr(x, m)(), [floats(B, 3, S, low=-9, high=9)], id=m)
        for m in ("float", "half", "bfloat16", "int", "long", "bool")
    ],
    case(T.char, [ints(B, 3)]),
    case(T.float, [bools(B, 3)]),
    case(T.float, [uint8(B, 3, 5)]),
    case(lambda x: x / 255, [uint8(B, 3, 5)], id="uint8-divided"),
    case(lambda x: x.permute(0, 3, 1, 2).float() / 255, [uint8(B, 4, 5, 3)], id="uint8-image"),
    case(lambda x: (x.clamp(0, 1) * 255).byte(), [(B, 3, 5)], id="byte"),
    case(lambda x: x[:, ::2].flip(1).permute(0, 2, 1), [uint8(B, 4, 3)], id="uint8-moved"),
    case(
        lambda x, y: torch.cat([x, y.expand(x.shape[0], 2)], 1).float(), [uint8(B, 3), uint8(1, 2)], id="uint8-joined"
    ),
    case(lambda x: x.gather(1, x.long() // 128), [uint8(B, 3)], id="uint8-gather"),
    case(lambda x: (x, x.reshape(-1, 3)), [uint8(B, 3, 2)], id="uint8-through"),
    case(lambda x: (x.byte(), x.byte().int(), x.byte() + 0.5), [ints(B, 3, low=-300, high=600)], id="byte-wraps"),
    case(
        lambda x: x[:, torch.tensor([0, 2], dtype=torch.int32, device=x.device)].int() + 300,
        [uint8(B, 3)],
        id="uint8-gathered",
    ),
    case(lambda x: torch.where(x > 100, x, torch.zeros_like(x)), [uint8(B, 3)], id="uint8-chosen"),
    case(lambda x: x.float() + torch.arange(3, dtype=torch.uint8, device=x.device), [half(B, 3)], id="uint8-constant"),
    case(T.long, [ints(B, 3, dtype=torch.int32)]),
    case(T.int, [half(B, 3)]),
    case(T.bool, [half(B, 3)]),
    case(torch.clone, [(B, 3)], memory_format=torch.preserve_format),
    case(T.clone, [bools(B, 3)]),
    case(torch.detach, [(B, 3)]),
    case(lambda x: x.detach().clone() + x.data, [(B, 3)], id="detach-data"),
    case(
        lambda x: x.mT.contiguous() + x.mT.contiguous(memory_format=torch.contiguous_format),
        [(B, 3, 4)],
        id="contiguous",
    ),
    case(lambda x: (x + 1).requires_grad_(False), [(B, 3)], id="requires_grad_"),
    case(lambda x: torch.as_tensor(x, dtype=torch.float16), [(B, 3)], id="as_tensor"),
    case(lambda x: torch.asarray(x, dtype=torch.float16), [(B, 3)], id="asarray"),
    case(
        lambda x: x.to(torch.float16).to(torch.float32), [Data((B, 3), torch.float32, -1e4, 1e4)], id="there-and-back"
    ),
]


@parametrize(CASES)
def test_casting(row, mode, device):
    check_case(row, mode, device)


def test_no_layer_for_nothing():
    function = lambda x: x.float().contiguous().detach().to(x).relu()  # noqa: E731
    assert torch2rt(Call(function), [torch.randn(2, 3)]).network.num_layers == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.double() + 1, "float64"),
        (lambda x: x.short() + 1, "int16"),
        (lambda x: x.to("meta"), "device"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(2, 3)])
