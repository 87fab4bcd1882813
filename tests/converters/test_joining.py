import pytest
import torch
from harness import B, Call, S, Size, bools, case, check_case, compare, half, ints, parametrize

from torch2rt import ConversionError, torch2rt, trace

T = torch.Tensor
P = Size("P", 2, 3, 5)

JOINED = [
    case(lambda x, y: torch.cat([x, y]), [(B, 3), (2, 3)], id="cat"),
    case(lambda x, y: torch.cat((x, y), dim=-1), [(B, 3, S), (B, 3, 2)], id="cat-last"),
    case(lambda x, y: torch.cat([x, y], 1), [(B, 3), ints(B, 2)], id="cat-mixed"),
    case(lambda x, y: torch.cat([y, x], axis=1), [half(B, 3), bools(B, 2)], id="cat-half-bool"),
    case(lambda x, y: torch.cat([x, y, x]), [ints(S, dtype=torch.int32), ints(3)], id="cat-ints"),
    case(lambda x: torch.cat([x.new_empty(0), x], 1), [(B, 3)], id="cat-legacy-empty"),
    case(
        lambda x: torch.cat([x, torch.ones(2, 3, dtype=torch.float64, device=x.device).float()]),
        [(S, 3)],
        id="cat-constant",
    ),
    case(lambda x: torch.cat([x]), [(B, 3)], id="cat-one"),
    case(lambda x: torch.cat([x, x[:0]]), [(B, 3)], id="cat-empty"),
    case(lambda x, y: torch.concat([x, y], 1), [(B, 3), (B, 2)], id="concat"),
    case(lambda x, y: torch.concatenate([x, y], dim=0), [(B, 3), (B, 3)], id="concatenate"),
    case(lambda x, y: torch.stack([x, y, x]), [(B, 3), (B, 3)], id="stack"),
    case(lambda x, y: torch.stack((x, y), dim=-1), [(B, S), ints(B, S)], id="stack-last-mixed"),
    case(lambda x, y: torch.stack([x, y], 1), [bools(B, 3), bools(B, 3)], id="stack-bool"),
    case(lambda x, y: torch.stack([x, y]), [(), ()], id="stack-0d"),
    case(lambda x, y: torch.hstack([x, y]), [(B, 3), (B, 2)], id="hstack"),
    case(lambda x, y: torch.hstack([x, y]), [(S,), ints(3)], id="hstack-1d"),
    case(lambda x, y: torch.vstack([x, y]), [(3,), (B, 3)], id="vstack"),
    case(lambda x, y: torch.row_stack([x, y]), [(3,), (3,)], id="row_stack"),
    case(lambda x, y: torch.dstack([x, y]), [(B, 3), (B, 3)], id="dstack"),
    case(lambda x, y: torch.column_stack([x, y]), [(B,), (B, 3)], id="column_stack"),
]

PARTED = [
    case(torch.tensor_split, [(B, 7)], 3, 1),
    case(torch.split, [(B, 5, 2)], 2, 1),
    case(torch.split, [(B, 6)], split_size_or_sections=[1, 2, 3], dim=-1),
    case(T.split, [ints(B, 5)], (1, 4), 1),
    case(T.split, [half(5, S)], split_size=3),
    case(lambda x: x.split(2 * x.shape[0] // 2, 1), [(P, 4, 6)], id="split-symbolic", modes=("static",)),
    case(lambda x: torch.cat([x, x]).split(x.shape[0]), [(P, 3)], id="split-dynamic-dim"),
    case(lambda x: torch.cat([x, x, x]).split([x.shape[0], 2 * x.shape[0]]), [(B, 3)], id="split-dynamic-sections"),
    case(torch.split_with_sizes, [(B, 5)], [2, 3], 1),
    case(T.split_with_sizes, [(5, B)], split_sizes=[2, 3], dim=0),
    case(torch.chunk, [(B, 5, 2)], 2, 1),
    case(T.chunk, [half(B, 6)], chunks=3, dim=-1),
    case(lambda x: torch.cat([x, x]).chunk(2), [(B, 3)], id="chunk-dynamic-dim"),
    case(torch.tensor_split, [(B, 7)], 3, 1),
    case(torch.tensor_split, [(B, 7)], (2, 5), dim=1),
    case(T.tensor_split, [(B, 7)], indices=(-3,), dim=-1),
    case(lambda x: torch.tensor_split(x, torch.tensor([1, 4]), 1), [(B, 7)], id="tensor_split-constant-tensor"),
    case(lambda x: x.tensor_split(torch.tensor(3), dim=-1), [(B, 7)], id="tensor_split-constant-number"),
    case(torch.hsplit, [(B, 6)], 2),
    case(T.vsplit, [(6, S)], [1, 4]),
    case(torch.dsplit, [(B, 3, 4)], 2),
    case(torch.unsafe_split, [(B, 4)], 2, 1),
    case(torch.unsafe_chunk, [(B, 4)], 2, 1),
    case(torch.unbind, [(B, 3, S)], 1),
    case(T.unbind, [bools(2, 3)], dim=-1),
    case(lambda x: [row * 2 for row in x[0]], [(B, 3, 2)], id="iterate"),
    case(lambda x: (lambda a, b, c: a + b * c)(*x.unbind(-1)), [(B, 4, 3)], id="unpack"),
]


def at(*shape, low=0, high=3, dtype=torch.int64):
    return ints(*shape, low=low, high=high, dtype=dtype)


NARROWED = [
    case(lambda x, i: torch.narrow(x, 1, i, 2), [(B, 4, S), at()], id="narrow"),
    case(lambda x, i: x.narrow(-1, i, length=x.shape[0]), [(B, 8), at()], id="narrow-symbolic"),
    case(lambda x, i: x.narrow(dim=0, start=i, length=2), [ints(4, S), at(low=-4, high=-1)], id="narrow-negative"),
    case(lambda x, i: x.narrow(1, i, 1), [half(B, 3), at(dtype=torch.int32)], id="narrow-half"),
    case(lambda x, i: x.narrow(1, i.sum(), 3).exp(), [(B, 9, 2), at(2)], id="narrow-computed"),
    case(lambda x: x.narrow(1, torch.tensor(2), 3), [(B, 5)], id="narrow-constant-tensor"),
]


@parametrize(NARROWED)
def test_narrowed(row, mode, device):
    check_case(row, mode, device)


@parametrize(JOINED)
def test_joined(row, mode, device):
    check_case(row, mode, device)


@parametrize(PARTED)
def test_parted(row, mode, device):
    check_case(row, mode, device)


def test_the_number_of_parts_of_one_graph_is_fixed():
    split = Call(lambda x: x.split(2))
    with pytest.raises(ConversionError, match="the module only does the same for every size"):
        trace(split, [torch.randn(4, 3)], max_batch_size=6)
    by_number = torch2rt(split, [torch.randn(4, 3)], max_batch_size=6).reference()
    for batch in range(1, 7):
        x = torch.randn(batch, 3)
        compare(by_number(x), split(x))


def test_float64_is_refused():
    with pytest.raises(ConversionError, match="float64"):
        torch2rt(Call(lambda x: torch.cat([x, x.double()])), [torch.randn(4, 3)])


def written(x, i):
    x = x.clone()
    x.narrow(0, i, 2).zero_()
    return x


def written_beneath(x, i):
    x = x.clone()
    part = x.narrow(0, i, 2)
    x.zero_()
    return part


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, i: x.tensor_split(i.reshape(1)), "how large the parts are depends on a computed tensor"),
        (lambda x, i: torch.tensor_split(x, tensor_indices_or_sections=i, dim=1), "depends on a computed tensor"),
        (lambda x, i: x.narrow(0, i.reshape(1), 2), "an integer without dimensions"),
        (written, "writing through a .* view is not supported"),
    ],
)
def test_computed_places_are_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 3), torch.tensor(1)])


def test_a_view_at_a_computed_place_sees_what_is_written_beneath_it():
    x = torch.randn(4, 3)
    model_trt = torch2rt(Call(written_beneath), [x, torch.tensor(1)])
    compare(model_trt.reference()(x, torch.tensor(2)), written_beneath(x, torch.tensor(2)))
