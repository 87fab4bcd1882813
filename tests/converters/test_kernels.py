import pytest
import torch
from harness import B, S, case, check_case, ints, parametrize

aten = torch.ops.aten
BY_SIZE = ([3, 2], None, [2, 1], [1, 0])  # the size of the kernel, no bias, stride and padding
LONG = torch.cat([torch.full((1, 8), 126), torch.full((1503, 8), 127)]).to(torch.int8)

CASES = [
    case(aten.mkldnn_convolution.default, [(B, 4, S, 5), (6, 2, 3, 2), (6,)], [1, 0], [2, 1], [1, 2], 2),
    case(lambda x, w: aten._slow_conv2d_forward(x, w, *BY_SIZE), [(B, 4, S, 5), (6, 4, 3, 2)], id="slow_conv2d"),
    case(aten.slow_conv_dilated2d.default, [(B, 4, S, 7), (6, 4, 3, 2)], *BY_SIZE, [1, 2]),
    case(aten.slow_conv_dilated3d.default, [(B, 2, 4, S, 5), (3, 2, 1, 3, 2)], [1, 3, 2]),
    case(aten.slow_conv_transpose2d.default, [(B, 4, S, 5), (4, 6, 3, 2)], *BY_SIZE, [1, 0], [1, 2]),
    case(aten.conv_tbc.default, [(S, B, 4), (3, 4, 6), (6,)], 1),
    case(aten._addmm_activation.default, [(3,), (B, 4), (4, 3)], beta=0.5, alpha=2, use_gelu=True),
    case(aten._addmm_activation.default, [(3,), (B, 4), (4, 3)]),
    case(
        lambda x: aten._int_mm(x, torch.arange(-16, 16, dtype=torch.int8, device=x.device).reshape(8, 4)),
        [ints(B, 8, dtype=torch.int8)],
        id="int_mm",
    ),
    case(aten._int_mm, [ints(B, S, dtype=torch.int8), ints(S, 8, dtype=torch.int8)], id="dynamic int_mm"),
    case(
        # beyond 2 ** 24 and odd, which no float32 is
        lambda x: aten._int_mm(x * 0 + 127, torch.cat([(x.mT * 0 + 127)[:1] - 1, (x.mT * 0 + 127)[1:]])),
        [ints(B, 1504, dtype=torch.int8)],
        id="long int_mm",
    ),
    case(
        lambda x: aten._int_mm(x * 0 + 127, LONG.to(x.device)),
        [ints(B, 1504, dtype=torch.int8)],
        id="long int_mm of a constant",
    ),
    case(aten._add_relu.Tensor, [(B, 5), (B, 5)], alpha=2),
    case(lambda x: aten._is_any_true(x > 1.5), [(B, 5)], id="any"),
    case(lambda x: aten._is_all_true(x > -1.5), [(B, 5)], id="all"),
    case(aten._aminmax.default, [(B, S)]),
    case(aten._aminmax.dim, [(B, S)], 1, True),
    case(lambda *xs: aten._stack(xs, 1), [(B, 3), (B, 3)], id="stack"),
    case(aten._logcumsumexp.default, [(B, S)], 1),
    case(
        lambda x, grid: aten._grid_sampler_2d_cpu_fallback(x, grid.tanh(), 0, 1, False),
        [(B, 2, 4, 5), (B, S, 3, 2)],
        id="grid_sampler",
    ),
]


ON_A_CPU = ("mkldnn", "grid_sampler", "int_mm")  # a GPU has no such kernel, or not for so few rows


@parametrize(CASES)
def test_kernels(row, mode, device):
    if device.type == "cuda" and any(name in row.id for name in ON_A_CPU):
        pytest.skip("a CPU's kernel")
    check_case(row, mode, device)
