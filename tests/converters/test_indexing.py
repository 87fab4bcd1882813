import numpy as np
import pytest
import torch
from harness import B, Call, S, Size, bools, case, check_case, compare, half, ints, parametrize

from torch2rt import ConversionError, InputError, torch2rt

T, aten = torch.Tensor, torch.ops.aten
P = Size("P", 2, 3, 5)
at = lambda index, *shapes, id, **kwargs: case(lambda x: x[index], shapes, id=id, **kwargs)  # noqa: E731
index = lambda *shape, low=-3, high=3, **kwargs: ints(*shape, low=low, high=high, **kwargs)  # noqa: E731


def written(x, index):
    """The first two columns, written to as rows."""
    x = x[0, :2].clone()
    x[index] = 2
    return x


BASIC = [
    at(0, (3, S), id="int"),
    at(-1, (3, S), id="negative"),
    at((slice(None), 1), (B, 3, S), id="middle"),
    at((slice(None), -2), (2, S), id="negative-of-dynamic"),
    at((0, 1, 2), (3, 3, 3), id="to-0d"),
    at(slice(1, None), (S, 3), id="tail"),
    at((slice(None), slice(-3, None)), (B, S), id="last-three"),
    at((slice(None), slice(1, -1)), (B, S, 2), id="inner"),
    at((slice(None), slice(None, -2)), (B, S), id="all-but-two"),
    at((Ellipsis, slice(None, None, 2)), (B, S), id="every-second"),
    at((slice(None), slice(1, None, 3)), (B, S), id="every-third"),
    at((slice(None), slice(1, 5, 2), slice(None, None, 3)), (B, 6, 7), id="two-steps"),
    at((slice(None), slice(-100, 100)), (B, 5), id="clamped"),
    at((slice(None), slice(3, 1)), (B, 5), id="empty"),
    at((slice(None), slice(7, 9)), (B, 5), id="beyond"),
    at((None, Ellipsis, None), half(B, 3), id="new-axes"),
    at((0, None, slice(1, 3), Ellipsis, -1), (2, 4, S, 3), id="everything"),
    at(Ellipsis, bools(B, 3), id="ellipsis"),
    at(None, (), id="none-of-0d"),
    at((), (B, 3), id="empty-tuple"),
    at(True, (B, 3), id="true"),
    at((slice(None), np.int64(1), slice(np.int32(0), np.int64(2))), (B, 3, 4), id="numpy-ints"),
    at((slice(None), torch.tensor(1)), (B, 3, 4), id="constant-0d-tensor"),
    case(lambda x: x[:, : x.shape[0]], [(4, S)], id="symbolic-length"),
    case(lambda x: x[x.shape[0] // 2 :], [(B, 3)], id="second-half"),
    case(lambda x: x[: -(x.shape[0] // 2)], [(P, 3)], id="symbolic-negative-end"),
    case(lambda x: x[:, -x.shape[1] // 2 :], [(2, S)], id="symbolic-negative-start"),
    case(lambda x: x[:, x.shape[1] - 1], [(2, S)], id="symbolic-int"),
    case(lambda x: x[:, x.shape[1] - 2], [(2, P)], id="symbolic-int-both-signs"),
    case(lambda x, y: x[:, : y.shape[1]], [(B, 12), (B, S)], id="other-size"),
    case(lambda x: x[torch.arange(1, device=x.device).item() :], [(B, 3)], id="item-of-constant"),
    case(torch.select, [(B, 3, S)], 1, -1),
    case(T.select, [ints(3, S)], dim=-1, index=2),
    case(torch.narrow, [(B, 5, 2)], 1, 2, 3),
    case(T.narrow, [(S, 3)], dim=0, start=-3, length=2),
    case(lambda x: x.narrow(0, 1, x.shape[0] - 1), [(P, 3)], id="narrow-symbolic"),
    case(torch.narrow_copy, [(B, 5)], 1, 1, 2),
    case(lambda x: torch.ops.aten.slice.Tensor(x, 1, 1, 9223372036854775807, 2), [(B, 5)], id="aten-slice"),
    case(lambda x: sum(x[..., i::2, j::2] for i in range(2) for j in range(2)), [(B, 3, 4, 6)], id="focus"),
]

FANCY = [
    case(lambda x: aten.index.Tensor(x, [None, x.new_tensor([1, 0, 1]).bool()]), [(B, 3, S)], id="aten-mask"),
    case(lambda x: aten._unsafe_index.Tensor(x, [None, torch.tensor([2, 0])]), [(B, 3, S)], id="aten-unsafe"),
    case(lambda x: aten.index.Tensor_hacked_twin(x, [torch.tensor([2, 0])]), [(3, S)], id="aten-script"),
    case(lambda x, i: x.index_put((i,), x[:1]), [ints(4, B, low=0, dtype=torch.uint8), ints(2, low=-4, high=4)]),
    at(torch.tensor([2, 0, -1, 0]), (3, S), id="front"),
    at((slice(None), [0, 2]), (B, 3), id="list"),
    at((slice(None), range(2)), (B, 3), id="range"),
    at((Ellipsis, torch.tensor([[0, -1], [1, 1]])), half(B, S, 3), id="matrix-last"),
    at((slice(None), torch.tensor([0, -2])), (B, S), id="negative-of-dynamic"),
    at(([0, 1], [2, -1]), (3, 4, S), id="pair"),
    at((slice(None), [[0], [1]], [0, 3, 1]), (B, 3, 4, 2), id="pair-broadcast"),
    at(([0, 1], slice(None), [2, 0]), (3, S, 4), id="apart"),
    at((slice(None), [0, 1], slice(None), [2, 0]), (B, 3, S, 4), id="apart-after-batch"),
    at(([0, 1], None, [2, 0]), (3, 4, S), id="apart-by-none"),
    at((slice(None), [1, 0], 1, [0, 2]), (B, 3, 4, 5), id="around-an-int"),
    at((0, slice(None), [1, 0]), (3, S, 4), id="after-an-int"),
    at(([1, 0], slice(1, 3), None, Ellipsis, 0), (3, 4, S, 2), id="mixed"),
    at(torch.tensor([[True, False, True], [False, False, True]]), (2, 3, S), id="mask"),
    at((slice(None), [True, False, True]), (B, 3), id="mask-list"),
    at((slice(None), torch.tensor([True, False, True]), [0, 1]), (B, 3, 4), id="mask-and-list"),
    at((slice(None), np.array([0, 2])), bools(B, 3), id="numpy"),
    at(torch.tensor([], dtype=torch.int64), (3, 4), id="nothing"),
    case(lambda x, i: torch.ops.aten.index.Tensor(x, [None, i]), [(B, 3), index(2, 2)], id="aten.index"),
    case(lambda x, i: x[i], [(3, S), index(B, 2)], id="computed"),
    case(lambda x, i: x[:, i], [(B, S), index(4)], id="computed-of-dynamic"),
    case(
        lambda x, i, j: x[i, j],
        [(3, 4, S), index(B, dtype=torch.int32), index(B, dtype=torch.int32)],
        id="computed-pair",
    ),
    case(lambda x, i: x[i, :, [0, 1]], [(3, S, 4), index(2)], id="computed-and-list-apart"),
    case(lambda x, i: x[torch.arange(x.shape[0], device=x.device), i], [(B, 4, 2), index(B)], id="one-per-row"),
    case(lambda x, i: x[..., i.argmax(-1), :], [(2, 5, 3), (S, 4)], id="argmax"),
    case(lambda x: x[torch.zeros(x.shape[0], 2, dtype=torch.long, device=x.device)], [(B, 3)], id="traced-zeros"),
]

PICKED = [
    case(torch.select_scatter, [(B, 3), (B,)], 1, -1),
    case(torch.slice_scatter, [(4, B), (2, B)], 0, 1, 4, 2),
    case(torch.diagonal_scatter, [(B, 4, 3), (B, 3)], -1, 1, 2),
    case(lambda x, y: x.index_copy(1, torch.tensor([2, 0], device=x.device), y), [(B, 3), (B, 2)], id="index_copy"),
    case(lambda x, i: torch.take(x, i), [(B, 3), index(2, 2)], id="take"),
    case(lambda x: x.take(torch.tensor([[0, -1], [5, 2]], device=x.device)), [(2, 3)], id="take-constant"),
    case(lambda x, i, y: x.put(i, y), [(2, 3), index(1), (1,)], id="put"),
]


@parametrize(BASIC)
def test_basic(row, mode, device):
    check_case(row, mode, device)


def chosen(x, *pattern):
    """A mask with as many true elements as a pattern has, computed from a tensor."""
    return torch.tensor(pattern, device=x.device) & ~x.isnan()


def put(x, mask, values, dim=0):
    x = x * 1
    x[(slice(None),) * dim + (mask,)] = values
    return x


UNDER_MASK = [
    case(lambda x, v: put(x, chosen(x, True, False, True), v), [(B, 3), (B * 2,)], id="values"),
    case(lambda x, v: put(x, chosen(x[..., 0], True, False, True), v), [(B, 3, S), (B * 2, S)], id="rows"),
    case(lambda x, v: put(x, chosen(x[..., 0], True, False, True), v), [half(B, 3, 4), half(B * 2, 1)], id="numbers"),
    case(lambda x, v: put(x, chosen(x[..., 0], True, False, True), v), [(B, 3, S), (1, S)], id="one-row"),
    case(lambda x, v: put(x, chosen(x[..., 0], True, False, True), v), [(B, 3, S), (S,)], id="the-same-row"),
    case(lambda x, v: put(x, chosen(x[0, :, 0], True, False, True), v, 1), [(B, 3, S), (2, S)], id="inner"),
    case(lambda x, v: put(x, chosen(x[0, :, 0], True, False, True), v, 1), [(B, 3, S), (B, 2, S)], id="inner-rows"),
    case(lambda x, v: put(x, chosen(x[0, 0], True, False, True), v, 2), [ints(B, S, 3), ints(S, 2)], id="last"),
    case(lambda x, v: x.index_put((chosen(x, True, False),), v), [(B, 2), (B,)], id="index_put"),
    case(lambda x, v: x.index_put((chosen(x, True, False),), v, accumulate=True), [(B, 2), (B,)], id="index_put-add"),
    case(
        lambda x, v: torch.ops.aten.index_put(x, [None, chosen(x[0], False, True, True)], v),
        [(B, 3), (B, 2)],
        id="aten.index_put",
    ),
]


@parametrize(UNDER_MASK)
def test_under_a_mask(row, mode, device):
    check_case(row, mode, device)


def test_one_value_or_one_for_each(device):
    """How many values there are may only be known when the engine runs."""
    x, mask = torch.randn(2, 3, device=device), torch.tensor([[True, False, True]] * 2, device=device)
    values = torch.randn(4, device=device)
    shapes = {"min_shapes": [(2, 3), (2, 3), (1,)], "max_shapes": [(2, 3), (2, 3), (6,)]}
    model_trt = torch2rt(Call(put), [x, mask, values], **shapes)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for v in (values, values[:1]):
        torch.testing.assert_close(run(x, mask, v), put(x, mask, v))


def with_twos(x, index):
    x = x.clone()
    x[index] = 2
    return x


NUMBER = ints(low=-3, high=3)
PLACES = ints(B, low=-4, high=4)
COMPUTED_NUMBERS = [
    *[
        case(lambda x, i, read=read: read(x, i), [shape, NUMBER], id=f"computed-number-{name}")
        for name, shape, read in (
            ("row", (4, S), lambda x, i: x[i]),
            ("column", (B, 5, S), lambda x, i: x[:, i]),
            ("last", (B, S, 5), lambda x, i: x[..., i]),
            ("slice", (B, 5, S), lambda x, i: x[:, i, 1:3]),
            ("plain", (3, 5, B), lambda x, i: x[-1, i, None]),
            ("two", (4, 4, B), lambda x, i: x[i, i + 1]),
            ("places", (4, 5, B), lambda x, i: x[i, torch.tensor([0, 2, 4], device=x.device)]),
            ("argmax", (5, B), lambda x, i: x[x[:, 0].argmax()]),
            ("constant", (B,), lambda x, i: x + torch.arange(4.0, device=x.device)[i]),
            ("written-row", (4, B), lambda x, i: with_twos(x, i)),
            ("written-slice", (4, 5, B), lambda x, i: with_twos(x, (i, slice(1, 3)))),
            ("written-plain", (4, 5, B), lambda x, i: with_twos(x, (1, i))),
            ("written-last", (B, 5), lambda x, i: with_twos(x, (..., i))),
        )
    ],
    case(lambda x, i, k: x[i, k] + x[k, i], [(4, 4, B), NUMBER, PLACES], id="computed-number-and-places"),
    case(lambda x, i, k: x[k, :, i], [(4, 5, 4), NUMBER, PLACES], id="computed-number-apart-from-places"),
]


class Experts(torch.nn.Module):
    """Each row goes through the layers of one expert, which a computed number names."""

    def __init__(self):
        super().__init__()
        norm, linear = torch.nn.LayerNorm, torch.nn.Linear
        layers = [torch.nn.Sequential(norm(4), linear(4, 8), torch.nn.GELU(), linear(8, 4)) for _ in range(2)]
        self.experts = torch.nn.ModuleList(layers)

    def forward(self, x, which):
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = which == i
            y[mask] = expert(x[mask])
        return y


def doubled(d, e):
    mask = e > 0
    others = ~mask
    d[mask] *= 2
    d[others] = e[others] - 1


def added(d, e):
    mask = e[:, 0] > 0
    d[mask] += e[mask].softmax(-1) if isinstance(e[mask], torch.Tensor) else 0


def columns(d, e):
    mask = e[0] > 0
    d[:, mask] = torch.exp(e[:, mask]) + d[:, mask]


def by_places(d, e):
    places = torch.where(e > 0)
    d[places] = e[places].half().float()
    d[(e < -1).nonzero(as_tuple=True)] = 0.5


def selecting(write):
    def call(d, e):
        d = d.clone()
        write(d, e)
        return d

    return case(call, [(B, S), (B, S)], id=f"selected-{write.__name__}")


SELECTED = [
    *map(selecting, (doubled, added, columns, by_places)),
    case(
        lambda x: [x[x > 0].sum(), ((x[x > -9] - 1) ** 2).mean(), x[x[:, 0] > -9].mean(0)], [(B, S)], id="selected-all"
    ),
    case(lambda x: x[x > -9].mean(), [half(B, S)], id="selected-mean-half"),
    case(Experts(), [(B, S, 4), ints(B, S, low=0, high=3)], id="selected-experts"),
]


@parametrize(SELECTED)
def test_selected(row, mode, device):
    check_case(row, mode, device)


def changed_mask(x):
    mask = x > 0
    chosen = x[mask]
    mask.fill_(True)
    return chosen.sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[x > 0], "how many elements"),
        (lambda x: [x, [x[x > 0]]], "how many elements"),
        (lambda x: x * x[x > 0].shape[0], "how many elements"),
        (lambda x: x * len(x[x > 0]), "how many elements"),
        (lambda x: torch.cat([x[x > 0], x[0]]), "how many elements"),
        (lambda x: x[x > 0].max(), "how many elements"),
        (lambda x: x[x[:, 0] > 0].softmax(0).sum(), "how many elements"),
        (lambda x: (x[x > 0] * x[0]).sum(), "how many elements"),
        (lambda x: (x[x > 0] + x[x > 1]).sum(), "different masks"),
        (lambda x: torch.where(x > 0)[0], "how many elements"),
        (lambda x: torch.where(x > 0)[0] + 1, "how many elements"),
        (lambda x: x[torch.where(x > 0)[0]].sum(), "how many elements"),
        (changed_mask, "the mask was written to"),
    ],
)
def test_selections_do_not_leave(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 5)], max_batch_size=8)


@parametrize(COMPUTED_NUMBERS)
def test_computed_numbers(row, mode, device):
    check_case(row, mode, device)


@parametrize(FANCY)
def test_fancy(row, mode, device):
    check_case(row, mode, device)


@parametrize(PICKED)
def test_picked(row, mode, device):
    check_case(row, mode, device)


def test_one_slice_and_one_reshape():
    network = torch2rt(Call(lambda x: x[0, 1:3, None, ..., ::2]), [torch.randn(2, 4, 5, 6)]).network
    assert network.num_layers == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[x > 0], "a computed mask selects depends on data"),
        (lambda x: x[:, x[0] > 0], "keep all"),
        (lambda x: x.masked_select(x > 0), "torch.where"),
        (lambda x: with_twos(x, (x[0].argmax(), torch.tensor([0]), None)), "without dimensions"),
        (lambda x: x[: x.argmax()], "depends on the value"),
        (lambda x: x[:, torch.tensor([0, 5])], "index 5 is out of range for size 5"),
        (lambda x: x.index_select(1, torch.tensor([-1])), "index -1 is out of range"),
        (lambda x: x[1], r"index 1 is out of range, for input_0.shape\[0\] = 1"),
        (lambda x: x[-2], r"index -2 is out of range, for input_0.shape\[0\] = 1"),
        (lambda x: x[False], "leaves nothing"),
        (lambda x: x[True, :, True], "True beside another True"),
        (lambda x: x[:, True, torch.tensor([0])], "True beside another True or an index tensor"),
        (lambda x: x[[[0]]], "write a tuple or a tensor"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 5)], max_batch_size=8)


@pytest.mark.parametrize("index", [torch.tensor([0, 3]), torch.tensor([[2], [-3]])], ids=["front", "back"])
@pytest.mark.parametrize(
    "take", [lambda x, i: x[i], lambda x, i: x.index_select(0, i.flatten().abs())], ids=["[]", "select"]
)
def test_places_that_small_sizes_do_not_have_are_refused_at_calls(take, index):
    made = Call(lambda x: take(x, index) * 2)
    run = torch2rt(made, [torch.randn(5, 3)], max_batch_size=8).reference()
    for size in range(1, 9):
        x = torch.randn(size, 3)
        try:
            expected = made(x)
        except IndexError:
            with pytest.raises(InputError, match=r"needs input_0.shape\[0\] (>|>=) \d"):
                run(x)
        else:
            compare(run(x), expected)


def written_rows(x, index):
    x = x.clone()
    x[index] = 2
    return x


SLICES = [
    lambda x: x[:3] * 2,
    lambda x: x[2:] * 2,
    lambda x: x[-2:] * 2,
    lambda x: x[:-3] * 2,
    lambda x: x[2:5] * 2,
    lambda x: x[-6:-1:2] * 2,
    lambda x: x[1:7:3, None, ..., :2] * 2,
    lambda x: x[x.shape[0] - 3 : x.shape[0] + 2] * 2,
    lambda x: x[:, torch.tensor([0, 2])][:4],
    lambda x: written_rows(x, slice(2, 5)),
    lambda x: written_rows(x, slice(-3, None)),
    lambda x: written_rows(x, slice(-min(x.shape[0], 4), -1)),
    lambda x: x.new_ones(4).cumsum(0)[-2 * x.shape[0] :],  # torch takes a size for at least 2, and so for all four
    lambda x: x[:, :1].T[:, : x.shape[0] - 2 + min(-x.shape[0] % 4, 2)] * 2,
    lambda x: x[0, : abs(x.shape[0] - 4)] * 2,
]


@pytest.mark.parametrize("function", SLICES, ids=range(len(SLICES)))
def test_slices_may_end_beyond_the_last_element(function):
    made = Call(function)
    run = torch2rt(made, [torch.randn(5, 3)], max_batch_size=8, verify=False).reference()
    for size in range(1, 9):
        x = torch.randn(size, 3)
        compare(run(x), made(x))


def test_out_of_range_is_torchs_error():
    with pytest.raises(IndexError):
        torch2rt(Call(lambda x: x[:, 5]), [torch.randn(4, 5)], max_batch_size=8)
