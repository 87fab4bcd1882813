import torch
from harness import B, Data, S, case, check_case, half, ints, parametrize

sums = torch.einsum


def einsum(equation, *inputs, **options):
    name = options.pop("id", equation)
    return case(lambda *operands: sums(equation, *operands), inputs, id=name, **options)


CASES = [
    einsum("aad,", (1, 1, 4), ()),
    einsum("ab,->", (1, 4), ()),
    einsum("ebb,e->", (B, 1, 1), (B,)),
    einsum("ij,jk->ik", (B, 4), (4, S)),
    einsum("ij,jk", (B, 4), (4, S)),
    einsum("ij,kj->ik", (B, S), (5, S)),
    einsum("ij,ik->kj", (4, B), (4, 5)),
    einsum("ij,jk->ki", (B, 4), (4, 5)),
    einsum("bij,bjk->bik", (B, 3, S), (B, S, 5)),
    einsum("bhid,bhjd->bhij", (B, 2, S, 4), (B, 2, 5, 4)),
    einsum("bhij,bhjd->bhid", (B, 2, 3, S), (B, 2, S, 4)),
    einsum("bihd,bjhd->bhij", (B, S, 2, 4), (B, 5, 2, 4)),
    einsum("bhij,bjhd->bihd", (B, 2, 3, S), (B, S, 2, 4)),
    einsum("nctv,vw->nctw", (B, 3, S, 4), (4, 5)),
    einsum("ncthw,co->nothw", (B, 3, 2, S, 4), (3, 5)),
    einsum("bijk,jklm->bilm", (B, 2, 3, 4), (3, 4, 2, 5)),
    einsum("bkji,jlk->bil", (B, 4, 3, S), (3, 5, 4)),
    einsum("i,j->ij", (B,), (S,)),
    einsum("i,i->", (S,), (S,)),
    einsum("i,i->i", (S,), (S,)),
    einsum("bi,bi->b", (B, S), (B, S)),
    einsum("bhi,bhi->bh", (B, 2, S), (B, 2, S), id="batched-dot"),
    einsum("bi,j->bij", (B, 3), (S,)),
    einsum("ij->ji", (B, S)),
    einsum("ij->", (B, S)),
    einsum("ij->j", (B, S)),
    einsum("ba", (B, S)),
    einsum("bA", (B, S)),
    einsum("ii->i", (5, 5)),
    einsum("ii", (5, 5)),
    einsum("bii->bi", (B, 5, 5)),
    einsum("iij->ji", (5, 5, S)),
    einsum("ibi->b", (5, B, 5)),
    einsum("iii->i", (4, 4, 4)),
    einsum("bii,i->b", (B, 4, 4), (4,)),
    einsum("...ij,jk->...ik", (B, 2, 3, 4), (4, S)),
    einsum("...ij,...jk->...ik", (2, B, 3, 4), (B, 4, 5)),
    einsum("i...,...i->...", (3, B, S), (B, S, 3)),
    einsum("i...j->...", (3, B, 4)),
    einsum("...i->i", (2, B, 4)),
    einsum("...ij,...jk", (B, 3, 4), (B, 4, 5)),
    einsum("b...,b->b...", (B, 3, S), (B,)),
    einsum("ij,...->...i", (B, 3), ()),
    einsum("bij,bjk->bik", (1, 3, 4), (B, 4, 5), id="batch-of-1"),
    einsum("ij,jk->ik", (B, 1), (5, 3), id="inner-1-left"),
    einsum("ij,jk->ik", (B, 5), (1, 3), id="inner-1-right"),
    einsum("ij,jk->ik", (B, 1), (1, 3), id="inner-1"),
    einsum("ij,jk,kl->il", (B, 3), (3, 4), (4, 5)),
    einsum("bi,bj,bk->bijk", (B, 2), (B, 3), (B, S)),
    einsum("bn,anm,bm->ba", (B, 3), (5, 3, 4), (B, 4)),
    einsum("i,i,i->", (5,), (5,), (5,)),
    einsum("ij,k->i", (B, 3), (4,), id="summed-alone"),
    einsum("ij,jk->ik", half(B, 64), half(64, 5), id="half"),
    einsum("ij->i", half(B, 300), id="half-sum"),
    einsum("bij,bjk->bik", Data((B, 3, 4), torch.bfloat16), Data((B, 4, 5), torch.bfloat16), id="bfloat16"),
    einsum("bij,bjk->bik", ints(B, 3, 4), ints(B, 4, 5), id="int64"),
    einsum("ij,j->i", ints(B, S, dtype=torch.int32), ints(S, dtype=torch.int32), id="int32"),
    case(lambda a, b: sums(a, [0, 1], b, [1, 30], [30, 0]), [(B, 4), (4, S)], id="sublists"),
    case(lambda a, b: sums(a, [..., 27, 1], b, [..., 1, 2]), [(B, 3, 4), (B, 4, 5)], id="sublists-implicit"),
    case(lambda a, b: sums("ij,jk", [a, b]), [(B, 4), (4, S)], id="a-list"),
    case(lambda a: sums("bij,jk->bik", a, a.new_ones(4, 3).cumsum(0)), [(B, S, 4)], id="constant"),
    case(lambda a: sums("jk,bij->bik", torch.eye(4, 3, device=a.device) + 2, a), [(B, S, 4)], id="constant-first"),
    case(torch.tensordot, [(B, 3, 4), (3, 4, S)]),
    case(torch.tensordot, [(B, 3, 4), (4, S)], dims=1),
    case(torch.tensordot, [(B, 3), (4, S)], dims=0),
    case(torch.tensordot, [(4, B, 3), (3, S, 4)], dims=([0, 2], [2, 0])),
    case(torch.tensordot, [(4, B, 3), (3, S, 4)], ([-1], [0])),
    case(torch.tensordot, [(4, B, 1), (3, 5, 4)], dims=([0, 2], [2, 0]), id="tensordot-1"),
    case(torch.tensordot, [ints(B, 3, 4), ints(4, 5)], dims=1),
    case(torch.tensordot, [(3, 4), (3, 4)], dims=2),
]


@parametrize(CASES)
def test_einsum(row, mode, device):
    check_case(row, mode, device)
