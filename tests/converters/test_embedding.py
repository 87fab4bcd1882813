import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, bools, case, check_case, floats, half, ints, parametrize

from torch2rt import TraceError, UnsupportedError, torch2rt

bag, aten = F.embedding_bag, torch.ops.aten


def index(*shape, dtype=torch.int64):
    return ints(*shape, low=0, high=6, dtype=dtype)


def with_offsets(offsets, dtype=torch.int64, **kwargs):
    """A bag whose offsets are constant."""

    def call(input, weight, per_sample_weights=None):
        at = torch.tensor(offsets, dtype=dtype, device=input.device)
        return bag(input, weight, at, per_sample_weights=per_sample_weights, **kwargs)

    return call


def first_of(function, offsets, *args, **kwargs):
    """The bags of a call that says more about them."""
    return lambda weight, input: function(weight, input, input.new_tensor(offsets), *args, **kwargs)[0]


ONES = Data((B, 2), torch.int64, 1, 2)
ZEROS = Data((B,), torch.int64, 0, 1)

CASES = [
    case(F.embedding, [index(B, S), (6, 3)]),
    case(F.embedding, [index(B, S, dtype=torch.int32), half(6, 3)]),
    case(F.embedding, [index(), (6, 3)]),
    case(F.embedding, [index(2, B, 3), ints(6, 3)]),
    case(F.embedding, [index(B), bools(6, 3)]),
    case(F.embedding, [index(B, 0), (6, 3)]),
    case(F.embedding, [index(B), (S, 3)], modes=("static",)),
    case(F.embedding, [index(B, 4), (6, 3)], 2, None, 1.0, True, True),
    case(torch.embedding, [(6, 3), index(B, 4)], 1, True),
    case(torch.ops.aten.embedding, [(6, 3), index(B, 4)], 1, False, True, id="aten.embedding"),
    case(torch.nn.Embedding(6, 3, padding_idx=1), [index(B, S)], id="Embedding"),
    case(torch.nn.Embedding(6, 3).half(), [index(B, 4, dtype=torch.int32)], id="Embedding-half"),
    case(torch.nn.Embedding(6, 3).bfloat16(), [index(B)], id="Embedding-bfloat16"),
    case(with_offsets([0, 2], mode="sum"), [index(S), (6, 3), (S,)], id="offsets-weights"),
    case(lambda i, w: bag(i, w / 0.0, i.new_tensor([0, 2]), mode="sum"), [index(S), floats(6, 3)], id="infinite"),
    case(lambda i, w, s: bag(i, w, mode="sum", per_sample_weights=s), [index(B, S), (6, 3), (B, S)], id="weights"),
    case(
        lambda i, w, s: bag(i, w, mode="sum", per_sample_weights=s, padding_idx=2),
        [index(B, 5), half(6, 3), half(B, 5)],
        id="weights-half",
    ),
]

MODES = ("sum", "mean", "max")
for mode in MODES:
    constant = with_offsets([0, 1, 1, 7], torch.int32, mode=mode, include_last_offset=True, padding_idx=1)
    CASES += [
        case(bag, [index(B, S), (6, 3)], mode=mode),
        case(bag, [index(B, S), (6, 3)], mode=mode, padding_idx=-2),
        case(bag, [index(4, S, dtype=torch.int32), half(6, 3)], mode=mode, padding_idx=0),
        case(bag, [ONES, (6, 3)], mode=mode, padding_idx=1, id=f"only-padding-{mode}"),
        case(with_offsets([0, 2, 2, 4], mode=mode), [index(S), (6, 3)], id=f"offsets-{mode}"),
        case(constant, [index(7, dtype=torch.int32), half(6, 3)], id=f"last-offset-{mode}"),
        case(torch.nn.EmbeddingBag(6, 3, mode=mode), [index(B, S)], id=f"EmbeddingBag-{mode}"),
        case(torch.nn.EmbeddingBag(6, 3, mode=mode), [index(9), ZEROS], id=f"EmbeddingBag-first-empty-{mode}"),
        case(
            first_of(torch.embedding_bag, [0, 2, 2, 4], mode=MODES.index(mode)), [(6, 3), index(S)], id=f"torch-{mode}"
        ),
        case(
            first_of(aten.embedding_bag.padding_idx, [0, 2, 2], False, MODES.index(mode), False, None, False, -2),
            [(6, 3), index(S)],
            id=f"aten-{mode}",
        ),
        case(
            first_of(aten._embedding_bag.default, [0, 2, 2, 4], False, MODES.index(mode), include_last_offset=True),
            [half(6, 3), index(4)],
            id=f"aten-last-{mode}",
        ),
        case(
            first_of(aten._embedding_bag_forward_only.default, [0, 1], False, MODES.index(mode), padding_idx=2),
            [(6, 3), index(S)],
            id=f"aten-forward-{mode}",
        ),
    ]


@parametrize(CASES)
def test_embedding(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("module", [torch.nn.Embedding(6, 3, max_norm=1.0), torch.nn.EmbeddingBag(6, 3, max_norm=1.0)])
def test_renormalising_is_refused(module):
    before = module.weight.clone()
    with pytest.raises((TraceError, UnsupportedError), match=r"max_norm=1\.0 writes to the weight"):
        torch2rt(module, [torch.zeros(2, 3, dtype=torch.int64)])
    assert torch.equal(module.weight, before)


def test_renormalising_an_input_is_refused():
    with pytest.raises(TraceError, match=r"max_norm=2\.0 writes to the weight"):
        torch2rt(Call(lambda i, w: F.embedding(i, w, None, 2.0)), [torch.zeros(2).long(), torch.randn(4, 3)])


def test_dynamic_offsets(device):
    """Bags of any lengths, empty ones too."""
    model = torch.nn.EmbeddingBag(6, 3, mode="max").to(device)
    offsets = torch.tensor([0, 2, 2, 5], device=device)
    words = torch.tensor([1, 5, 0, 2, 3, 4, 4], device=device)
    model_trt = torch2rt(model, [words, offsets], min_shapes=[(1,), (1,)], max_shapes=[(9,), (5,)])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for o in ([0, 2, 2, 5], [0, 0, 7], [0]):
        o = torch.tensor(o, device=device)
        torch.testing.assert_close(run(words, o), model(words, o))
