import pytest
import torch
from harness import B, Call, S, Size, bools, case, check_case, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

T = torch.Tensor
P = Size("P", 2, 3, 5)
index = lambda *shape, low=0, high=3, **kwargs: ints(*shape, low=low, high=high, **kwargs)  # noqa: E731
order = lambda x, dim: x.argsort(dim)  # distinct indices, computed  # noqa: E731

READ = [
    case(torch.take, [(B, 3), ints(4, 2, low=-3, high=3)]),
    case(torch.take_along_dim, [(B, 5), ints(B, 3, low=-5, high=5)], dim=1),
    case(lambda x: x.take_along_dim(indices=x.new_tensor([[-1], [0]]).long(), axis=0), [(2, B)], id="take-constant"),
    case(lambda x: torch.index_select(x, 1, torch.tensor([2, 0], device=x.device)), [(B, 3, S)], id="index_select"),
    case(lambda x, i: x.index_select(-1, i), [ints(B, S), index(3)], id="index_select-computed"),
    case(lambda x, i: x.index_select(dim=0, index=i), [(3, 4), index()], id="index_select-0d-index"),
    case(lambda x, i: x.index_select(0, i), [(), index(1, high=1)], id="index_select-0d"),
    case(lambda x, i: torch.gather(x, 1, i[: x.shape[0]]), [(B, 4, 3), index(4, 2, 3)], id="gather"),
    case(lambda x: x.gather(dim=-1, index=x[:, :2, :3].int().abs().long()), [half(B, 4, S)], id="gather-smaller"),
    case(lambda x, i: x.gather(1, i), [(2, S, 3), index(2, B, 2)], id="gather-part"),
    case(lambda x, i: x.gather(0, i, sparse_grad=True), [(3, 4), index(5, 4)], id="gather-longer"),
    case(lambda x: x.gather(1, torch.tensor([[0, 1], [2, 2]], device=x.device)), [bools(2, 3)], id="gather-constant"),
    case(lambda x, i: x.gather(0, i), [(), index(high=1)], id="gather-0d"),
    case(lambda x, i: torch.take_along_dim(x, i[: x.shape[0]], 1), [(B, 4, 3), index(4, 2, 1)], id="take_along_dim"),
    case(lambda x, i: x.take_along_dim(i, dim=-1), [(1, S), index(B, 2)], id="take_along_dim-broadcast"),
    case(lambda x, i: torch.take_along_dim(x, i), [(B, 3), index(4)], id="take_along_dim-flat"),
    case(lambda x: x.take_along_dim(x.argsort(-1), -1), [(B, 5)], id="take_along_dim-argsort"),
    case(lambda x: x.masked_select(x.new_tensor([1, 0, 1, 1]).bool()), [(3, 4)], id="masked_select"),
    case(lambda x: torch.masked_select(x, mask=x.new_tensor([[1, 0], [0, 1]]) > 0), [(2,)], id="masked_select-wide"),
]

WRITTEN = [
    case(lambda x, y: torch.scatter(x, 1, order(x, 1), y + x), [(B, 4), (4,)], id="scatter"),
    case(lambda x: x.scatter(-1, order(x, -1)[..., :2], x * 2), [half(B, 3, 5)], id="scatter-larger-source"),
    case(lambda x, i: x.scatter(dim=0, index=i, value=7), [ints(4, 3), index(1, 3, high=4)], id="scatter-value"),
    case(lambda x, i: x.scatter(1, i, 2.5), [(B, 3), index(B, 1)], id="scatter-value-position", modes=("static",)),
    case(lambda x, i: x.scatter(1, i[: x.shape[0]], True), [bools(B, 3), index(4, 1)], id="scatter-bool"),
    case(
        lambda x, y: x.scatter(0, torch.tensor([[2, 0]], device=x.device), y), [(3, 4), (1, 2)], id="scatter-constant"
    ),
    case(lambda x, y: x.scatter(0, torch.tensor(0, device=x.device), y), [(), ()], id="scatter-0d"),
    case(lambda x, y: (x * 2).scatter_(1, order(x, 1), x + y), [(B, 4), (4,)], id="scatter_"),
    case(
        lambda x, y: torch.index_copy(x, 1, torch.tensor([2, 0], device=x.device), y), [(B, 4), (B, 2)], id="index_copy"
    ),
    case(
        lambda x, y, i: x.index_copy(-1, i.argsort(), y), [half(2, 3, 4), half(2, 3, 4), (4,)], id="index_copy-computed"
    ),
    case(
        lambda x, y: x.index_copy(0, torch.tensor([1], device=x.device), y),
        [ints(3, S), ints(1, S)],
        id="index_copy-rows",
    ),
    case(lambda x: torch.index_fill(x, 1, torch.tensor([0, -1], device=x.device), 2.5), [(B, 4)], id="index_fill"),
    case(lambda x, i: x.index_fill(0, i, -1), [ints(S, 3), index(2, low=-3)], id="index_fill-computed"),
    case(
        lambda x, v: x.index_fill(1, torch.tensor([1], device=x.device), v),
        [half(B, 3, 2), half()],
        id="index_fill-tensor",
    ),
    case(lambda x: x.diagonal_scatter(x.new_tensor([1, 2, 3]), 1), [(3, 5)], id="diagonal_scatter"),
    case(lambda x, y: torch.diagonal_scatter(x, y, -1, 2, 0), [(4, B, 3), (B, 2)], id="diagonal_scatter-batched"),
    case(
        lambda x, y: x.diagonal_scatter(y, offset=0, dim1=1, dim2=2),
        [(B, S, S), (B, S)],
        id="diagonal_scatter-dynamic",
        modes=("static",),
    ),
    case(lambda x, y: torch.select_scatter(x, y, 1, -2), [(B, S, 3), (B, 3)], id="select_scatter"),
    case(lambda x, y: x.select_scatter(y, dim=0, index=0), [ints(3, S), ints(S)], id="select_scatter-first"),
    case(lambda x, y: torch.slice_scatter(x, y, 1, 1, 3), [(B, 5), (B, 2)], id="slice_scatter"),
    case(lambda x, y: x.slice_scatter(y, dim=1, start=-2), [(B, S, 2), (B, 2, 2)], id="slice_scatter-end"),
    case(lambda x, y: x.slice_scatter(y, 1, 1, None, 2), [half(B, 6), half(B, 3)], id="slice_scatter-step"),
    case(lambda x: x.slice_scatter(x[::2] * 2, 0, 0, 99, 2), [(S, 3)], id="slice_scatter-step-dynamic"),
    case(
        lambda x, y: torch.index_put(x, (torch.tensor([2, 0], device=x.device),), y), [(3, S), (2, S)], id="index_put"
    ),
    case(
        lambda x, y: x.index_put((x.new_tensor([[0], [1]]).long(), x.new_tensor([2, -1, 0]).long()), y),
        [(2, 4, S), (2, 3, S)],
        id="index_put-pair",
    ),
    case(lambda x: x.index_put((x > 0,), torch.tensor(0.5, device=x.device)), [(B, 3)], id="index_put-mask"),
    case(lambda x, y: x.index_put((y > 0,), x[0, :1], accumulate=True), [(B, 3), (B, 3)], id="index_put-mask-adding"),
]

ADDED = [
    case(lambda x, i, y: x.scatter_reduce(1, i, y, "amax"), [(B, 4), index(B, 5), (B, 5)], id="scatter_reduce-any"),
    case(lambda x, i, y: x.scatter(1, i, y, reduce="add"), [(B, 4), index(B, 5), (B, 5)], id="scatter-add-any"),
    case(lambda x, i, y: x.index_reduce(1, i, y, "mean"), [(B, 4), index(5), (B, 5)], id="index_reduce-any"),
    case(torch.put, [(B, 4), ints(2, low=0, high=4), (2,)], True),
    case(lambda x, i, y: torch.scatter_add(x, 1, i[: x.shape[0]], y), [(B, 3), index(4, 5), (4, 5)], id="scatter_add"),
    case(
        lambda x, i, y: x.scatter_add(dim=0, index=i, src=y),
        [half(3, 4), index(5, 4), half(6, 7)],
        id="scatter_add-larger",
    ),
    case(lambda x, i, y: x.scatter_add(-1, i, y), [ints(3, 4), index(2, 5), ints(2, 5)], id="scatter_add-fewer-rows"),
    case(
        lambda x, y: x.scatter_add(0, torch.tensor([[0, 1], [0, 1]], device=x.device), y),
        [(2, 2), (2, 2)],
        id="scatter_add-constant",
    ),
    case(lambda x, i, y: (x + 1).scatter_add_(0, i, y), [(3, 2), index(4, 2), (4, 2)], id="scatter_add_"),
    *[
        case(
            lambda x, i, y, r=r, s=s: x.scatter_reduce(1, i, y, r, include_self=s),
            [(3, 4), index(3, 5), (3, 5)],
            id=f"scatter_reduce-{r}-{s}",
        )
        for r in ("sum", "prod", "mean", "amax", "amin")
        for s in (True, False)
    ],
    *[
        case(
            lambda x, i, y, r=r: torch.scatter_reduce(x, 1, i, y, reduce=r),
            [ints(3, 4), index(3, 5), ints(3, 5)],
            id=f"scatter_reduce-int-{r}",
        )
        for r in ("sum", "prod", "mean", "amax", "amin")
    ],
    case(lambda x, i, y: x.scatter(0, i, y, reduce="add"), [(3, 2), index(4, 2), (4, 2)], id="scatter-add"),
    case(lambda x, i: x.scatter(0, i, 2.0, reduce="multiply"), [(3, 2), index(4, 2)], id="scatter-multiply"),
    case(lambda x, i, y: torch.index_add(x, 1, i, y), [(B, 3, 2), index(5), (B, 5, 2)], id="index_add"),
    case(
        lambda x, i, y: x.index_add(dim=0, index=i, source=y, alpha=2),
        [half(3, S), index(4), half(4, S)],
        id="index_add-alpha",
    ),
    case(
        lambda x, y: x.index_add(-1, torch.tensor([1, 1, 0], device=x.device), y),
        [ints(B, 2), ints(B, 3)],
        id="index_add-constant",
    ),
    case(lambda x, i, y: (x * 1).index_add_(0, i, y), [(3,), index(4), (4,)], id="index_add_"),
    *[
        case(
            lambda x, i, y, r=r: x.index_reduce(1, i, y, r, include_self=False),
            [(2, 4), index(5), (2, 5)],
            id=f"index_reduce-{r}",
        )
        for r in ("prod", "mean", "amax", "amin")
    ],
    case(
        lambda x, i, y: x.index_put((i, torch.tensor([0, -1, 0, 1], device=x.device)), y, accumulate=True),
        [(3, 4, S), index(4, low=-3), (4, S)],
        id="index_put-adding",
    ),
    case(lambda x, i, y: x.put(i, y, accumulate=True), [(2, 3), index(2, 2, low=-3), (2, 2)], id="put-adding"),
    case(lambda x, i, y: x.scatter_add(0, i, y.log()), [(3, 2), index(3, 2), (3, 2)], id="scatter_add-infinities"),
]


MASKED = [
    case(torch.masked_scatter, [(B, 3, S), bools(B, 3, S), (B, 3, S)]),
    case(torch.masked_scatter, [(B, 3, S), bools(3, 1), (B * 2, 3, S)]),
    case(torch.masked_scatter, [(3, 1), bools(B, 1, 4), (B, 12)]),
    case(T.masked_scatter, [ints(B, 3), bools(B, 3), ints(B, 3)]),
    case(lambda x, y: (x * 1).masked_scatter_(x > 0, y), [half(B, S), half(B, S)], id="masked_scatter_"),
    case(
        lambda x, i, y: x.masked_scatter((i == 0).unsqueeze(-1).expand_as(x), y),
        [(B, S, 4), index(B, S), (B, S, 4)],
        id="masked_scatter-rows",
    ),
    case(
        lambda x, i, y: x.masked_scatter((i == 0).unsqueeze(-1), y),
        [half(2, 5, 4), index(2, 5), half(5, 8)],
        id="masked_scatter-rows-of-other-sizes",
    ),
    case(
        lambda x, y: x.masked_scatter(torch.tensor([True, False, True], device=x.device), y),
        [(B, 3), (B * 2,)],
        id="masked_scatter-constant",
    ),
    case(lambda x, y: x.masked_scatter(x.isnan(), y), [(B, 3), (0,)], id="masked_scatter-nothing"),
    case(torch.put, [(2, 3), index(2, 2, low=-3), (2, 2)], accumulate=True),
]


@parametrize(MASKED)
def test_masked(row, mode, device):
    check_case(row, mode, device)


def test_rows_under_a_mask_are_gathered_whole():
    """A mask over (batch, sequence) counts as many elements, not as many for each channel."""
    function = lambda x, m, y: x.masked_scatter(m.unsqueeze(-1).expand_as(x), y)  # noqa: E731
    inputs = [torch.randn(2, 5, 64), torch.ones(2, 5).bool(), torch.randn(10, 64)]
    network = torch2rt(Call(function), inputs).network
    shapes = [tuple(network.get_layer(i).get_output(0).shape) for i in range(network.num_layers)]
    assert (10,) in shapes and (640,) not in shapes


@parametrize(READ)
def test_read(row, mode, device):
    check_case(row, mode, device)


@parametrize(WRITTEN)
def test_written(row, mode, device):
    check_case(row, mode, device)


@parametrize(ADDED)
def test_added(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.gather(1, torch.tensor([[5], [0], [0], [0]])), "index 5 is out of range"),
        (lambda x: x.index_select(1, torch.tensor([-1])), "index -1 is out of range"),
        (lambda x: x.scatter(1, torch.tensor([[9]]), 1.0), "index 9 is out of range"),
        (lambda x: x.index_add(1, torch.tensor([5]), x[:, :1]), "out of range"),
        (lambda x: x.masked_select(x > 0), "torch.where"),
        (lambda x: x.index_put((x > 0, x[0].long()), x.new_tensor([1, 2])), "computed mask"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 5)])
