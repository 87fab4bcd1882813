import torch
import torch.nn.functional as F
from harness import B, Data, S, bools, case, check_case, half, ints, parametrize

from torch2rt import lower, trace
from torch2rt.backend.tensorrt import trt

aten = torch.ops.aten

CASES = [
    case(lambda x: F.pad(x, (0, 0, -1, 1)), [(B, 3)], id="crop-one"),
    # constant: any rank, any value, any dtype; negative amounts crop
    case(F.pad, [(B, 3, S)], (1, 2)),
    case(F.pad, [(B, 3, S)], (1, 2, 0, 3, 2, 1), value=-1.5),
    case(F.pad, [(S,)], [2, 0], "constant", float("-inf")),
    case(F.pad, [(B, 3, S, 5)], (-1, 2, 3, -2), mode="constant", value=0.5),
    case(F.pad, [(B, 3, S, 5)], (-1, -2)),
    case(F.pad, [(B, 3, S, 5)], (0, 0, 0, 0)),
    case(F.pad, [(B, 2, 3, 2, S, 2)], (1, 0, 0, 1, 2, 0, 0, 0, 1)[:8], value=2),
    case(F.pad, [half(B, 3, S)], (1, 2), value=0.1),
    case(F.pad, [Data((B, S), torch.bfloat16)], (1, 2), value=0.1),
    case(F.pad, [ints(B, S)], (1, 2), value=7),
    case(F.pad, [ints(B, S, dtype=torch.int32)], (-1, 2)),
    case(F.pad, [bools(B, S)], (1, 2), value=True),
    case(F.pad, [Data((B, S), torch.uint8, 0, 255)], (1, 2), value=3),
    case(F.pad, [Data((B, 2, S), torch.int8)], (1, 2), mode="reflect"),
    case(F.pad, [bools(B, S)], (1, 2, 1, 0)),
    case(lambda x: F.pad(x, (0, 16 - x.shape[1])), [(B, S)], id="up-to-16"),
    case(lambda x: F.pad(x, (0, 6 - x.shape[1]), value=3.0), [(B, S)], id="to-6"),
    case(lambda x, y: F.pad(x, (y.shape[0] - 1, 0, 1, 1 - y.shape[0])), [(3, S), (B,)], id="by-another-size"),
    case(torch.nn.ConstantPad2d((1, -2, 3, 1), 3.5), [(B, 3, S, 4)], id="ConstantPad2d"),
    case(torch.nn.ZeroPad2d((1, 0, 2, 0)), [(3, S, 4)], id="ZeroPad2d"),
    # beyond the edges
    *(
        case(F.pad, shapes, amounts, mode=mode)
        for mode in ("reflect", "replicate", "circular")
        for shapes, amounts in (
            ([(B, 3, S)], (2, 3)),
            ([(3, S)], (1, 0)),
            ([(B, 3, S, 5)], (1, 3, 2, 0)),
            ([(3, S, 5)], (1, 3, 2, 0)),
            ([(B, 3, S, 5)], (-1, 2, 2, -2)),
            ([(B, 2, 3, 4, S)], (1, 3, 2, 0, 1, 1)),
            ([ints(B, 3, S)], (2, 3)),
            ([half(B, 3, S)], (2, 3)),
        )
    ),
    case(F.pad, [(B, 3, S)], (4, 5), mode="replicate"),
    case(lambda x: F.pad(x, (x.shape[2] - 1, 0), mode="reflect"), [(B, 3, S)], id="reflect-all"),
    case(lambda x: F.pad(x, (1 - x.shape[0], x.shape[0]), mode="circular"), [(B, 3, S)], id="circular-by-a-size"),
    case(torch.nn.CircularPad2d((1, 2, 3, 0)), [(B, 3, S, 4)], id="CircularPad2d"),
    # ATen
    case(torch.constant_pad_nd, [(B, S)], (1, 2), 3.0),
    case(aten.constant_pad_nd, [(B, S)], pad=(1, -1)),
    case(aten.pad, [(B, 3, S)], (1, 2), "reflect"),
    case(aten.reflection_pad2d, [(B, 3, S, 5)], (1, 3, 2, 0)),
    case(torch._C._nn.replication_pad1d, [(B, 3, S)], (1, 3)),
    case(aten._pad_circular, [(B, 3, S)], (1, 3)),
]


@parametrize(CASES)
def test_padding(row, mode, device):
    check_case(row, mode, device)


def test_cropping_needs_no_fill():
    class Crop(torch.nn.Module):
        def forward(self, x):
            return F.pad(x, (-1, -2))

    layer = lower(trace(Crop(), [torch.randn(2, 8)])).definition.get_layer(0)
    layer.__class__ = trt.ISliceLayer
    assert layer.mode == trt.SampleMode.STRICT_BOUNDS
