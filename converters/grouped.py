"""Products of groups of rows or columns with a matrix of their own, as layers of experts compute them."""

import torch.nn.functional as F

from torch2rt.vocabulary import check, composite, torch


@composite(torch._grouped_mm, torch.ops.aten._grouped_mm, torch.ops.aten._grouped_mm.default)
def grouped_mm(input, mat2, offs=None, bias=None, out_dtype=None):
    """A product with each group's matrix, of which each row or column keeps its own group's.

    `offs` are the ends of the groups along the dimension that one operand has and the other has not. torch leaves
    undefined what lies beyond the last group; here it is 0.
    """
    check(bias is None, "torch does not support a bias yet")
    check(out_dtype in (None, input.dtype), f"{out_dtype=} is not the dtype of the operands, {input.dtype}")
    known = (torch.float32, torch.float16, torch.bfloat16)
    check(input.dtype in known and mat2.dtype == input.dtype, f"its operands are {input.dtype} and {mat2.dtype}")
    ranks = input.dim(), mat2.dim()
    check(set(ranks) <= {2, 3}, f"its operands have {ranks[0]} and {ranks[1]} dimensions, not 2 or 3")
    check((offs is None) == (ranks == (3, 3)), "offs must be given where an operand has 2 dimensions, and only there")
    check(offs is None or offs.dtype is torch.int32 and offs.dim() == 1, "offs is not a vector of int32")
    for x in (input, mat2):
        _check_aligned(x)
    if ranks == (3, 3):
        return torch.bmm(input, mat2)
    length = {(2, 3): input.shape[0], (3, 2): mat2.shape[1], (2, 2): input.shape[1]}[ranks]
    inside = _inside(offs, length)  # by group and place
    if ranks == (2, 2):
        zero = torch.zeros((), dtype=input.dtype, device=input.device)
        return torch.where(inside[:, None, :], input, zero) @ torch.where(inside[:, :, None], mat2, zero)
    products = input @ mat2
    mask = inside[:, :, None] if ranks == (2, 3) else inside[:, None, :]
    return products.masked_fill(~mask, 0.0).sum(0)


def _inside(offs, length):
    """Whether each group has each place."""
    places = torch.arange(length, device=offs.device)
    begins = F.pad(offs[:-1], (1, 0))
    return (places >= begins[:, None]) & (places < offs[:, None])


def _check_aligned(x):
    """torch refuses rows, or columns, that do not begin at multiples of 16 bytes."""
    rows, columns = x.stride()[-2:]
    step = rows if columns == 1 else columns
    aligned = step % (16 // x.element_size()) == 0
    check(aligned, f"its operands' strides {tuple(x.stride())} are no multiples of 16 bytes")
