import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Size, bools, case, check_case, parametrize

from torch2rt import TraceError, torch2rt

aten = torch.ops.aten
R = Size("R", 5, 8, 13)
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second group is empty


def rows(a, b, mask, grouped=F.grouped_mm, **kwargs):
    """Five rows in groups of traced sizes; torch leaves undefined what lies beyond the last group."""
    ends = torch.cumsum(mask.int(), 0, dtype=torch.int32).clamp(max=5)
    ends = torch.cat([ends[:-1], torch.full((1,), 5, dtype=torch.int32, device=ends.device)])
    return grouped(a, b, offs=ends, **kwargs)[:5]


CASES = [
    case(F.grouped_mm, [(5, 8), (3, 8, 4)], offs=ENDS, id="rows"),
    case(lambda a, b: F.grouped_mm(a, b, offs=ENDS.to(a.device))[:5], [(R, 8), (3, 8, 4)], id="any rows"),
    case(lambda a, b: torch._grouped_mm(a, b, ENDS.to(a.device))[:5], [(R, 8), (3, 8, 4)], id="torch._grouped_mm"),
    case(lambda a, b: aten._grouped_mm(a, b, ENDS.to(a.device))[:5], [(R, 8), (3, 8, 4)], id="aten"),
    case(
        lambda a, b: F.grouped_mm(a, b.transpose(1, 2), offs=ENDS.to(a.device))[:5],
        [(R, 8), (3, 12, 8)],
        id="transposed",
    ),
    case(F.grouped_mm, [(B, 6, 8), (B, 8, 4)], id="a batch"),
    case(F.grouped_mm, [(3, R, 8), (8, 4)], offs=torch.tensor([1, 1, 4], dtype=torch.int32), id="columns"),
    case(F.grouped_mm, [(R, 8), (8, 4)], offs=torch.tensor([3, 3, 7], dtype=torch.int32), id="inner"),
    case(rows, [(R, 8), (6, 8, 4), bools(6)], id="traced ends"),
    case(lambda a, b: rows(a.half(), b.half(), b[:, 0, 0] > 0), [(R, 8), (6, 8, 8)], id="half"),
    case(lambda a, b: rows(a.bfloat16(), b.bfloat16(), b[:, 0, 0] > 0), [(R, 8), (6, 8, 8)], id="bfloat16"),
]


@parametrize(CASES)
def test_grouped(row, mode, device):
    check_case(row, mode, device)


def test_a_row_that_is_not_finite_stays_in_its_group(device):
    a, b = torch.randn(5, 8), torch.randn(3, 8, 4)
    a[1, 3], b[1] = float("nan"), float("nan")
    if device.type == "cpu":
        b[2, 0, 0] = float("inf")  # of which float32 products on GPUs make a NaN, as they split numbers into parts
    model_trt = torch2rt(Call(F.grouped_mm, (), {"offs": ENDS.to(device)}).eval(), [a.to(device), b.to(device)])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    torch.testing.assert_close(
        run(a.to(device), b.to(device)).cpu(), F.grouped_mm(a, b, offs=ENDS), equal_nan=True, rtol=1e-4, atol=1e-5
    )


REFUSED = [
    ([(5, 8), (3, 8, 4)], {"offs": ENDS.long()}, "offs is not a vector of int32"),
    ([(5, 8), (3, 8, 4)], {"offs": ENDS, "bias": torch.zeros(4)}, "does not support a bias"),
    ([(5, 8), (3, 8, 4)], {"offs": ENDS, "out_dtype": torch.float16}, "out_dtype=torch.float16 is not the dtype"),
    ([(5, 8), (3, 8, 4)], {}, "offs must be given where"),
    ([(3, 5, 8), (3, 8, 4)], {"offs": ENDS}, "offs must be given where"),
    ([(5, 6), (3, 6, 4)], {"offs": ENDS}, "multiples of 16 bytes"),
]


@pytest.mark.parametrize(("shapes", "kwargs", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_torch_refuses(shapes, kwargs, message):
    inputs = [torch.randn(*shape) for shape in shapes]
    with pytest.raises((RuntimeError, ValueError)):
        F.grouped_mm(*inputs, **kwargs)
    with pytest.raises(TraceError, match=message):
        torch2rt(Call(F.grouped_mm, (), kwargs).eval(), inputs)
