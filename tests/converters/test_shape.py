import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, Size, bools, case, check_case, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

T = torch.Tensor
P = Size("P", 2, 3, 5)  # never 1
bf16 = lambda *shape: Data(shape, torch.bfloat16)  # noqa: E731

SAME_ELEMENTS = [
    case(torch.flatten, [(B, 3, S)], 1),
    case(T.flatten, [(B, 3, S, 2)], start_dim=1, end_dim=-2),
    case(torch.flatten, [(B, 3, S)], id="flatten-all"),
    case(torch.flatten, [()], id="flatten-0d"),
    case(T.ravel, [half(B, 3)]),
    case(torch.reshape, [(B, 6, S)], (-1, 2, 3)),
    case(T.reshape, [ints(4, 6)], 3, -1),
    case(T.reshape, [(B, 3, 4)], shape=(-1, 4)),
    case(lambda x: x.reshape(x.shape[0], x.shape[2], -1), [(B, 3, S)], id="reshape-symbolic"),
    case(lambda x: x.view(-1, x.size(1) // 2, 2), [(B, 4, 3)], id="view-computed"),
    case(lambda x: x.view(size=(-1, 3)), [(B, 3, 4)], id="view-keyword"),
    case(lambda x: x.view(torch.float32), [(B, 3)], id="view-same-dtype"),
    case(lambda x, y: x.view_as(y), [(B, 6), (B, 2, 3)], id="view_as"),
    case(lambda x, y: x.reshape_as(y), [(B, 6), (B, 2, 3)], id="reshape_as"),
    case(T.unflatten, [(B, 6, 2)], 1, (3, -1)),
    case(torch.unflatten, [(B, 6, 2)], dim=-2, sizes=(2, 3)),
    case(torch.unsqueeze, [(B, 3)], 1),
    case(T.unsqueeze, [(B, S)], dim=-1),
    case(T.unsqueeze, [bools()], 0),
    case(torch.squeeze, [(P, 1, 3, 1)]),
    case(torch.squeeze, [(B, 1, 3, 1)], 1),
    case(T.squeeze, [(B, 1, 3, 1)], (1, -1)),
    case(T.squeeze, [(B, 2, 1)], dim=-2),
    case(T.squeeze, [()], id="squeeze-0d"),
    case(T.squeeze, [(P, 3)], 0),
    case(torch.atleast_1d, [()]),
    case(torch.atleast_2d, [(S,)]),
    case(torch.atleast_3d, [(B, 3)]),
    case(lambda x, y: torch.atleast_2d(x, y), [(S,), ()], id="atleast_2d-two"),
]

ORDER = [
    case(torch.permute, [(B, 3, S)], (2, 0, 1)),
    case(T.permute, [ints(B, 3, 4)], 0, -1, 1),
    case(T.permute, [(B, 3, 4)], dims=(1, 0, 2)),
    case(torch.transpose, [(B, 3, S)], 1, -1),
    case(T.transpose, [bools(B, 3, 4)], dim0=0, dim1=1),
    case(torch.transpose, [()], 0, -1),
    case(torch.swapaxes, [(B, 3, 4)], axis0=1, axis1=2),
    case(T.swapdims, [(B, 3, 4)], 0, 2),
    case(torch.movedim, [(B, 3, S, 2)], 1, -1),
    case(T.moveaxis, [(B, 3, 4, 2)], (0, 1), (-1, 0)),
    case(torch.t, [(B, 3)]),
    case(T.t, [(S,)]),
    *[case(lambda x, a=a: getattr(x, a), [(B, 3)], id=a) for a in ("T", "mT", "H", "mH")],
    case(lambda x: x.mT, [half(B, 3, S)], id="mT-3d"),
    case(torch.adjoint, [(B, 3, 4)]),
    case(F.pixel_shuffle, [(B, 12, 3, 5)], 2),
    case(F.pixel_shuffle, [(18, 2, S)], upscale_factor=3),
    case(F.pixel_unshuffle, [(B, 3, 4, 6)], 2),
    case(F.pixel_unshuffle, [half(2, 3, 6, 9)], downscale_factor=3),
    case(F.channel_shuffle, [(B, 6, 4, S)], 3),
    case(torch.channel_shuffle, [(B, 6, 4, 5)], groups=2),
    case(torch.nn.ChannelShuffle(2), [(B, 6, 4, 5)], id="ChannelShuffle"),
]

AGAIN = [
    case(T.expand, [(B, 1, 3)], -1, 4, 3),
    case(T.expand, [half(3)], (2, 4, 3)),
    case(T.expand, [(1, S, 1)], 2, -1, 5),
    case(lambda x, y: x.expand_as(y), [(1, 3), (B, 3)], id="expand_as"),
    case(lambda x: x.expand(x.shape[0], x.shape[0], 3), [(B, 1, 3)], id="expand-symbolic"),
    case(torch.broadcast_to, [ints(3, 1)], (2, 3, 4)),
    case(lambda x, y: torch.broadcast_tensors(x, y), [(B, 1, 3), (4, 1)], id="broadcast_tensors"),
    case(T.repeat, [(B, 3)], 2, 1, 3),
    case(T.repeat, [bools(2, 3)], (3, 2)),
    case(T.repeat, [ints(S)], 2),
    case(lambda x: x.repeat(1, x.shape[0]), [(B, 3)], id="repeat-symbolic"),
    case(torch.tile, [(B, 3)], (2,)),
    case(T.tile, [half(2, 3)], dims=(2, 1, 2)),
    case(torch.repeat_interleave, [(B, 3, 4)], 2, 1),
    case(T.repeat_interleave, [(B, 3)], 3, dim=-1),
    case(T.repeat_interleave, [ints(2, 3)], repeats=2),
    case(torch.roll, [(B, 3, S)], 1, -1),
    case(torch.roll, [(B, 4, 5)], (1, -2), (2, 1)),
    case(torch.roll, [(B, S, 2)], shifts=(-3, 2, 1), dims=(1, 0, 1)),
    case(T.roll, [ints(3, 4)], 5),
    case(T.roll, [bf16(B, 3)], 2),
    case(lambda x: x.roll(x.shape[1] // 2, 1), [(2, S)], id="roll-symbolic"),
    case(torch.roll, [(0, B)], (2, 1), (0, 1)),
    case(torch.roll, [(B, 0)], 3),
    case(torch.flip, [(B, 3, S)], (0, -1)),
    case(T.flip, [ints(2, 3)], 1),
    case(T.flip, [bools(2, 3)], dims=[0]),
    case(torch.fliplr, [(B, S)]),
    case(torch.flip, [(B, 0, 1, S)], (1, 2, 3)),
    case(torch.flip, [(0, 3)], (0, 1)),
    case(torch.flipud, [(B, 3)]),
    case(torch.rot90, [(B, 3, 4)], 1, (1, 2)),
    case(T.rot90, [(B, 3, 4)], k=-1, dims=(0, 2)),
    case(torch.rot90, [half(3, 4)], 2),
    case(T.unfold, [(B, 7, 2)], 1, 3, 2),
    case(T.unfold, [(2, S)], dimension=-1, size=2, step=3),
    case(T.unfold, [()], 0, 1, 1),
    case(lambda x, y: torch.meshgrid(x, y, indexing="ij"), [(S,), (3,)], id="meshgrid-ij"),
    case(lambda x, y: torch.meshgrid(x, y, indexing="xy"), [half(S), half(3)], id="meshgrid-xy"),
    case(lambda x, y: torch.cartesian_prod(x, y), [(4,), (3,)], id="cartesian_prod"),
    case(lambda x, y: torch.block_diag(x, y), [(2, 3), (4, 1)], id="block_diag"),
    case(lambda x: x.as_strided((2, 3), (1, 2)), [(3, 4)], id="as_strided"),
    case(lambda x: torch.as_strided(x * 2, (4, 3), (3, 1), 1), [ints(3, 5)], id="as_strided-offset"),
    case(torch.as_strided, [(3, 4)], (3, 2, 4), (0, 1, 2), 1),
    case(T.as_strided, [half(3, 4)], size=(), stride=(), storage_offset=7),
    case(torch.as_strided, [(3, 4)], (2, 0), (1, 1)),
    case(torch.as_strided_copy, [bools(3, 4)], (2, 3), (5, 2)),
    case(lambda x: x.as_strided((x.shape[0], 3), (x.shape[1], 1), 1), [(B, S)], id="as_strided-dynamic"),
    case(lambda x: x.exp().as_strided((x.shape[0] * 2 - 1, 6), (3, 1)), [(B, 6)], id="as_strided-windows"),
    case(torch.as_strided_scatter, [(3, 4), (2, 3)], (2, 3), (5, 1), 2),
    case(
        lambda x, y: x.as_strided_scatter(y, (x.shape[0], 2), (x.shape[1], 1), 1),
        [ints(B, S), ints(B, 2)],
        id="as_strided_scatter-dynamic",
    ),
    case(lambda x: torch.atleast_3d(x)[..., 0].numel() + x.stride(0) + x.dim() + x, [(3, 4)], id="metadata"),
]

DIAGONALS = [
    case(lambda x: (x * 2).fill_diagonal_(3.0), [(B, 3)], id="fill_diagonal_"),
    case(torch.diagonal, [(3, 4)]),
    case(torch.diagonal, [(B, 3, 4)], 1, 1, 2),
    case(T.diagonal, [(3, B, 4)], offset=-1, dim1=-1, dim2=0),
    case(T.diagonal, [ints(S, S)], 2),
    case(torch.diagonal, [(4, S)], -2),
    case(torch.diag, [(4,)]),
    case(torch.diag, [half(4)], -2),
    case(T.diag, [(3, 4)], 1),
    case(torch.diag_embed, [(B, 3)]),
    case(torch.diag_embed, [ints(B, S)], 1),
    case(T.diag_embed, [(B, 4, 3)], offset=-2, dim1=0, dim2=2),
    case(torch.tril, [(B, 3, 4)]),
    case(torch.tril, [(2, S, S)], 1),
    case(T.tril, [ints(S, 3)], diagonal=-1),
    case(torch.triu, [(B, 4, 3)], -1),
    case(T.triu, [bools(3, 4)], diagonal=1),
    case(T.triu, [half(B, S, 5)]),
    case(lambda x: x.tril(x.shape[1] - 3), [(3, S)], id="tril-symbolic"),
]

WINDOWS = [
    case(F.unfold, [(B, 3, 5, 6)], 2),
    case(F.unfold, [(B, 3, 7, 9)], (3, 2), dilation=(2, 1), padding=(1, 2), stride=(2, 3)),
    case(F.unfold, [half(3, 5, 6)], 3, 1, 1, 2),
    case(F.fold, [(B, 12, 20)], (5, 6), 2),
    case(F.fold, [(B, 18, 9)], output_size=(7, 9), kernel_size=(3, 2), dilation=(2, 1), padding=(1, 2), stride=(2, 4)),
    case(F.fold, [half(4, 12)], (4, 5), (2, 2), 1, 0, 1),
    case(torch.nn.Fold((5, 5), 3, padding=1, stride=2), [bf16(2, 18, 9)], id="Fold"),
    case(torch.nn.Unfold(3, padding=1), [(B, 2, 4, 5)], id="Unfold"),
]

aten, prims = torch.ops.aten, torch.ops.prims

OPERATORS = [  # what torch's own decompositions are made of
    case(lambda x: aten._unsafe_view.default(x, [-1, 6]), [(B, 3, 2)], id="aten._unsafe_view"),
    case(lambda x: aten.view.default(x, [x.shape[0], 6]), [(B, 3, 2)], id="aten.view"),
    case(lambda x: aten.expand.default(x, [x.shape[0], 2, 3], implicit=True), [(B, 1, 3)], id="aten.expand"),
    case(lambda x: aten.t.default(x), [(B, 3)], id="aten.t"),
    case(lambda x: aten.squeeze.dims(x, [1, 2]), [(B, 1, 1)], id="aten.squeeze.dims"),
    case(lambda x: prims.broadcast_in_dim(x, [2, x.shape[0], 4, 3], [1, 3]), [(B, 3)], id="prims.broadcast_in_dim"),
    case(lambda x: prims.transpose(x, [1, 0, 2]), [(B, 3, 2)], id="prims.transpose"),
    case(lambda x: prims.collapse_view(x, 1, 2), [(B, 3, 2)], id="prims.collapse_view"),
    case(lambda x: prims.split_dim(x, 1, 2), [(B, 6)], id="prims.split_dim"),
    case(lambda x: prims.squeeze(x, [1]), [(B, 1, 2)], id="prims.squeeze"),
    case(lambda x: prims.rev(x, [1]), [(B, 3)], id="prims.rev"),
    case(lambda x: prims.cat([x, x], 1), [(B, 3)], id="prims.cat"),
    case(lambda x: prims.clone(prims.view_of(x)), [(B, 3)], id="prims.clone"),
    case(lambda x: prims.convert_element_type(x, torch.float16), [(B, 3)], id="prims.convert_element_type"),
]


@parametrize(OPERATORS)
def test_operators(row, mode, device):
    check_case(row, mode, device)


@parametrize(SAME_ELEMENTS)
def test_same_elements(row, mode, device):
    check_case(row, mode, device)


@parametrize(ORDER)
def test_order(row, mode, device):
    check_case(row, mode, device)


@parametrize(AGAIN)
def test_repeated(row, mode, device):
    check_case(row, mode, device)


@parametrize(DIAGONALS)
def test_diagonals(row, mode, device):
    check_case(row, mode, device)


H, W = Size("H", 4, 7, 12), Size("W", 5, 8, 11)
UNEVEN = dict(kernel_size=(2, 3), dilation=(2, 1), padding=(1, 0), stride=(2, 1))
DYNAMIC_WINDOWS = [
    case(F.unfold, [(B, 3, H, W)], 3, padding=1, modes=("dynamic",)),
    case(F.unfold, [(3, H, W)], **UNEVEN, modes=("dynamic",), id="unfold-uneven"),
    *[
        case(
            lambda x, options=options: F.fold(F.unfold(x, **options), x.shape[-2:], **options),
            [shape],
            modes=("dynamic",),
            id=f"fold-{name}",
        )
        for name, shape, options in (
            ("even", (B, 3, H, W), dict(kernel_size=3, padding=1)),
            ("uneven", (B, 3, H, W), UNEVEN),
            ("wide", (3, H, W), dict(kernel_size=(1, 2), stride=(2, 3))),
        )
    ],
    case(
        lambda x, y: torch.cat([x, y], 1).as_strided(
            (x.shape[0], 2, x.shape[1] + y.shape[1] - 1), (x.shape[1] + y.shape[1], 1, 1)
        ),
        [(B, H), (B, Size("P", 1, 2, 3))],
        modes=("dynamic",),
        id="as_strided-sum",
    ),
]


@parametrize(DYNAMIC_WINDOWS)
def test_dynamic_windows(row, mode, device):
    check_case(row, mode, device)


def test_an_image_smaller_than_the_window_is_refused():
    with pytest.raises(ConversionError, match="only does the same for every size"):
        torch2rt(Call(F.unfold, (3,)), [torch.randn(1, 2, 5, 5)], min_shapes=[(1, 2, 2, 5)], max_shapes=[(1, 2, 7, 5)])


@parametrize(WINDOWS)
def test_windows(row, mode, device):
    check_case(row, mode, device)


def test_one_shuffle_per_view():
    """A reshape to one unknown size needs no shape arithmetic, and one to the same sizes needs nothing."""
    function = lambda x: x.flatten(1).view(x.shape[0], -1)  # noqa: E731
    network = torch2rt(Call(function), [torch.randn(2, 3, 4)], max_batch_size=8).network
    assert network.num_layers == 1


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (lambda x: x.squeeze(), (4, 3, 1), "torch drops dimension 0 where its size is 1"),
        (lambda x: x.squeeze(0), (4, 3), "torch drops dimension 0"),
        (lambda x: x.as_strided((2, 2), (1, 2)), (4, 3), r"beyond the tensor's memory, for input_0.shape\[0\] = 1"),
        (lambda x: x.t().as_strided((2, 2), (1, 2)), (4, 3), "as_strided reads memory"),
        (lambda x: x[:, 1:].as_strided((2, 2), (1, 2)), (4, 3), "as_strided reads memory"),
        (lambda x: torch.as_strided_copy(x.expand(2, *x.shape), (2,), (1,)), (4, 3), "as_strided reads memory"),
        (lambda x: x.t().as_strided_scatter(x[0, :2], (2,), (1,)), (4, 3), "it writes to memory"),
        (lambda x: torch.ops.aten.as_strided.default(x, (2, 2), (1, 2)), (4, 3), "reads beyond the tensor's memory"),
        (lambda x: x.view(torch.int32), (4, 3), "memory cannot be read as another type"),
    ],
)
def test_refused(function, shape, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(shape)], max_batch_size=8)
