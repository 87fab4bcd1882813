import pytest
import torch
import torch.nn.functional as F
from harness import B, Data, S, case, check_case, floats, half, parametrize

nn, aten = torch.nn, torch.ops.aten

SAMPLE = (
    [
        case(F.grid_sample, [(B, 3, S, 6), floats(B, 4, 5, 2, low=-1.3, high=1.3)], mode, padding_mode, align_corners)
        for mode in ("bilinear", "nearest", "bicubic")
        for padding_mode in ("zeros", "border", "reflection")
        for align_corners in (False, True)
    ]
    + [
        case(
            F.grid_sample,
            [(B, 3, S, 4, 6), floats(B, 2, 4, S, 3, low=-1.3, high=1.3)],
            mode=mode,
            padding_mode="border",
            align_corners=True,
        )
        for mode in ("bilinear", "nearest")
    ]
    + [
        case(F.grid_sample, [(B, 3, 5, 6), floats(B, S, 5, 2, low=-1.3, high=1.3)], align_corners=False),
        # on a CPU, torch computes the positions in half precision
        case(
            F.grid_sample,
            [half(B, 3, S, 6), floats(B, 4, 5, 2, low=-1, high=1, dtype=torch.float16)],
            align_corners=False,
            atol=0.05,
        ),
        case(
            F.grid_sample,
            [Data((B, 3, S, 6), torch.bfloat16), floats(B, 4, 5, 2, low=-1, high=1, dtype=torch.bfloat16)],
            align_corners=True,
            atol=0.2,
        ),
        case(
            lambda x: F.grid_sample(x, x.new_tensor([[[[0.1, -0.3], [0.7, 0.2]]]]), align_corners=False),
            [(1, 3, S, 6)],
            id="constant-grid",
        ),
        case(aten.grid_sampler_2d, [(B, 3, S, 6), floats(B, 4, 5, 2, low=-1, high=1)], 0, 1, False),
    ]
)

AFFINE = (
    [
        case(
            lambda t, a=a: F.affine_grid(t, (t.shape[0], 3, 4, 5), align_corners=a), [(B, 2, 3)], id=f"affine_grid-{a}"
        )
        for a in (False, True)
    ]
    + [
        case(
            lambda t, x, a=a: F.affine_grid(t, x.shape, align_corners=a),
            [(B, 2, 3), (B, 3, S, 6)],
            id=f"affine_grid-dynamic-{a}",
        )
        for a in (False, True)
    ]
    + [
        case(lambda t, x: F.affine_grid(t, list(x.shape), False), [(B, 3, 4), (B, 3, S, 6, 4)], id="affine_grid-3d"),
        case(lambda t: F.affine_grid(t, [t.size(0), 1, 1, 4], True), [(B, 2, 3)], id="affine_grid-unit-size"),
        case(
            lambda t: F.affine_grid(t, (t.shape[0], 3, 4, 5), align_corners=False),
            [half(B, 2, 3)],
            id="affine_grid-half",
        ),
        case(
            lambda x: F.grid_sample(
                x, F.affine_grid(x[:, 0, :2, :3], x.shape, align_corners=False), align_corners=False
            ),
            [(B, 3, S, 6)],
            id="spatial-transformer",
        ),
    ]
)


@parametrize(SAMPLE)
def test_grid_sample(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0")
@parametrize(AFFINE)
def test_affine_grid(row, mode, device):
    check_case(row, mode, device)
