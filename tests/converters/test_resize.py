import math

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, Size, case, check_case, half, parametrize

from torch2rt import UnsupportedError, lower, torch2rt, trace
from torch2rt.backend.tensorrt import trt

nn, aten = torch.nn, torch.ops.aten


def bf16(*shape):
    return Data(shape, torch.bfloat16)


def bytes_(*shape):
    return Data(shape, torch.uint8, 0, 255)


NEAREST = [
    case(F.interpolate, [(B, 3, *sizes)], mode=mode, **kwargs)
    for mode in ("nearest", "nearest-exact")
    for sizes, kwargs in (
        ((S,), {"scale_factor": 2}),
        ((S,), {"size": 10}),
        ((9,), {"scale_factor": 0.5}),
        ((S, 5), {"scale_factor": (2, 3)}),
        ((S, 5), {"size": (9, 13)}),
        ((7, 6), {"size": (3, 4)}),
        ((7, 10), {"scale_factor": 1.7}),
        ((7, 10), {"scale_factor": (1.7, 0.3), "recompute_scale_factor": True}),
        ((41, 82), {"size": (123, 41)}),
        ((S, 10), {"scale_factor": 0.5}),
        ((S, 10), {"scale_factor": 1.3}),
        ((2, S, 5), {"scale_factor": (1, 2, 3)}),
        ((2, S, 5), {"size": (3, 5, 4)}),
    )
] + [
    case(F.interpolate, [half(B, 3, S, 5)], None, 2),
    case(F.interpolate, [bf16(B, 3, S, 5)], (9, 4)),
    case(F.interpolate, [bytes_(B, 3, S, 5)], scale_factor=2),
    case(F.interpolate, [bytes_(B, 3, 7, 5)], scale_factor=0.6, mode="nearest-exact"),
    case(lambda x, y: F.interpolate(x, size=y.shape[-2:]), [(B, 3, 5, 6), (S, 11)], id="to-another-size"),
    case(lambda x: F.interpolate(x, (x.shape[2] * 2, x.shape[3] * 3)), [(B, 3, S, 6)], id="to-twice-the-size"),
    case(nn.UpsamplingNearest2d(scale_factor=2), [(B, 3, S, 6)], id="UpsamplingNearest2d"),
    case(aten.upsample_nearest2d.vec, [(B, 3, S, 6)], None, [2.0, 1.0]),
    case(aten.upsample_nearest2d, [(B, 3, S, 6)], [9, 8]),
]

LINEAR = [
    case(F.interpolate, [(B, 3, *sizes)], mode=mode, **kwargs, **corners)
    for corners in ({}, {"align_corners": True})
    for mode, sizes, kwargs in (
        ("linear", (S,), {"scale_factor": 2}),
        ("linear", (9,), {"size": 4}),
        ("linear", (9,), {"size": 1}),
        ("bilinear", (S, 5), {"scale_factor": (2, 3)}),
        ("bilinear", (S, 5), {"size": (9, 13)}),
        ("bilinear", (S, 5), {"size": (1, 7)}),
        ("bilinear", (7, 9), {"scale_factor": 0.5}),
        ("bilinear", (7, 9), {"scale_factor": (1.3, 0.7)}),
        ("bilinear", (7, 9), {"scale_factor": (1.3, 0.7), "recompute_scale_factor": True}),
        ("bilinear", (6, 5), {"scale_factor": (1.1, 1.0)}),
        ("bilinear", (S, 9), {"scale_factor": 0.5}),
        ("bilinear", (S, 9), {"scale_factor": (1.3, 0.5)}),
        ("trilinear", (2, S, 5), {"scale_factor": (1, 2, 3)}),
        ("trilinear", (4, 6, 5), {"scale_factor": (0.6, 1.5, 1.3)}),
        ("bicubic", (S, 5), {"scale_factor": (2, 3)}),
        ("bicubic", (S, 5), {"size": (9, 13)}),
        ("bicubic", (7, 9), {"scale_factor": (1.3, 0.7)}),
        ("bicubic", (7, 9), {"size": (1, 4)}),
    )
] + [
    case(F.interpolate, [half(B, 3, S, 5)], (9, 4), mode="bilinear"),
    case(F.interpolate, [half(B, 3, 7, 9)], scale_factor=0.7, mode="bicubic"),
    case(F.interpolate, [bf16(B, 3, S, 5)], None, 2, "bilinear", True),
    case(
        lambda x, y: F.interpolate(x, size=y.shape[-2:], mode="bilinear"), [(B, 3, 5, 6), (S, 11)], id="to-another-size"
    ),
    case(
        lambda x, y: F.interpolate(x, y.shape[-2:], mode="bilinear", align_corners=True),
        [(B, 3, 5, 6), (S, 11)],
        id="to-another-size-aligned",
    ),
    case(
        lambda x, y: F.interpolate(x, y.shape[0], mode="linear", align_corners=True),
        [(3, 2, S), (B,)],
        id="to-maybe-one-aligned",
    ),
    case(nn.Upsample(scale_factor=2, mode="bilinear"), [(B, 3, S, 6)], id="Upsample"),
    case(nn.UpsamplingBilinear2d(scale_factor=2), [(B, 3, S, 6)], id="UpsamplingBilinear2d"),
    case(F.upsample, [(B, 3, S, 6)], None, 3, "bicubic"),
    case(aten.upsample_bilinear2d.vec, [(B, 3, S, 6)], [9, 8], False, None),
]

ANTIALIAS = [
    case(F.interpolate, [(B, 3, 12, 9)], mode=mode, antialias=True, **kwargs)
    for mode in ("bilinear", "bicubic")
    for kwargs in (
        {"size": (5, 4)},
        {"size": (15, 4), "align_corners": True},
        {"scale_factor": (0.3, 1.5)},
        {"scale_factor": 0.4, "recompute_scale_factor": True},
    )
]
ANTIALIAS += [
    *[
        case(f, [(B, 3, 9, 12)], output_size=[4, 5], align_corners=False, scales_h=0.5, id=f"aten-{i}-{f}")
        for i, f in enumerate((aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa.default))
    ],
    case(aten._upsample_bilinear2d_aa, [(B, 3, 9, 12)], [4, 5], False, 0.5, 0.45, id="aten-positions"),
    case(aten._upsample_bilinear2d_aa.vec, [(B, 3, 9, 12)], None, False, [0.5, 0.4], id="aten-vec"),
    case(aten.upsample_nearest2d.default, [(B, 3, 9, 12)], [4, 5], scales_w=0.45, id="aten-nearest2d"),
    case(aten.upsample_linear1d.default, [(B, 3, 9)], [4], False, scales=0.45, id="aten-linear1d"),
    case(aten.upsample_nearest3d.default, [(B, 3, 4, 5, 6)], [6, 5, 7], 1.6, id="aten-nearest3d"),
]


FROM_FLOATS = [
    case(F.interpolate, [(B, 3, S, 5)], scale_factor=1.3, recompute_scale_factor=True),
    case(F.interpolate, [(B, 3, S, 5)], scale_factor=0.5, mode="area"),
    case(F.interpolate, [(B, 3, S, 5)], scale_factor=1.3, recompute_scale_factor=True, mode="bilinear"),
    case(lambda x: F.interpolate(x, (math.floor(x.shape[2] * 1.5), 4), mode="bicubic"), [(B, 3, S, 5)], id="floor"),
    case(lambda x: F.interpolate(x, (math.ceil(x.shape[2] / 3), 4)), [(B, 3, S, 5)], id="ceil"),
]


@parametrize(NEAREST + FROM_FLOATS)
def test_nearest(row, mode, device):
    check_case(row, mode, device)


@parametrize(LINEAR)
def test_interpolated(row, mode, device):
    check_case(row, mode, device)


@parametrize(ANTIALIAS)
def test_antialiased(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.skipif(not hasattr(torch._C._nn, "_upsample_lanczos2d_aa"), reason="came with torch 2.15")
def test_lanczos():
    row = case(F.interpolate, [(B, 3, 12, 9)], (5, 4), mode="lanczos", antialias=True)
    check_case(row, "dynamic", torch.device("cpu"))  # torch has it for a CPU only


H, W = Size("H", 4, 7, 12), Size("W", 5, 8, 11)
TABLE = torch.randn(1, 3, 6, 5)


def table(**options):
    """A constant, such as an embedding of positions, in the size of an image."""

    def call(x):
        return x + F.interpolate(TABLE.to(x.device), x.shape[2:], **options)

    return case(call, [(B, 3, H, W)], id="-".join(["table", *map(str, options.values())]), modes=("dynamic",))


def factors(eps=0.1, **options):
    """The same by factors, as vision transformers compute them."""

    def call(x):
        by = ((x.shape[2] + eps) / 6, (x.shape[3] + eps) / 5)
        return x + F.interpolate(TABLE.to(x.device), scale_factor=by, **options)

    name = "-".join(["factors", *map(str, options.values()), str(eps)])
    return case(call, [(B, 3, H, W)], id=name, modes=("dynamic",))


DYNAMIC = [
    *[table(mode=mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")],
    *[table(mode=mode, align_corners=True) for mode in ("bilinear", "bicubic")],
    *[table(mode=mode, antialias=True) for mode in ("bilinear", "bicubic")],
    *[table(mode=mode, antialias=True, align_corners=True) for mode in ("bilinear", "bicubic")],
    *[factors(mode=mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")],
    *[factors(mode=mode, antialias=True) for mode in ("bilinear", "bicubic")],
    factors(0.0, mode="bicubic"),
    *[
        case(F.interpolate, [(B, 3, H, W, S)[: 2 + n]], mode="nearest", scale_factor=scale, id=f"nearest-{n}-{scale}")
        for n in (1, 2, 3)
        for scale in (1.02, 2.05)  # sizes stay, or double
    ],
    factors(mode="bilinear", recompute_scale_factor=True),
    *[
        case(F.interpolate, [(B, 3, H, W)], mode=mode, modes=("dynamic",), **options)
        for mode in ("bilinear", "bicubic")
        for options in (
            dict(size=(9, 3), antialias=True),
            dict(size=(9, 1), align_corners=True),
            dict(scale_factor=0.7),
            dict(scale_factor=(0.7, 1.5), antialias=True),
        )
    ],
    case(
        lambda x, y: F.interpolate(x, y.shape[2:], mode="bicubic", antialias=True),
        [(B, 3, H, 9), (1, 1, S, 4)],
        id="antialias-to-another",
        modes=("dynamic",),
    ),
    case(nn.Upsample(scale_factor=1.5, mode="bicubic"), [(B, 3, H, W)], id="Upsample-bicubic", modes=("dynamic",)),
    case(lambda x: F.interpolate(x, scale_factor=5 / x.shape[2], mode="linear"), [(B, 3, S)], id="to-5"),
]


@parametrize(DYNAMIC)
def test_dynamic(row, mode, device):
    check_case(row, mode, device)


ROUNDED = {
    "up to a part": lambda n: torch.sym_int(n / 49 * 49),
    "smaller": lambda n: torch.sym_int(n * 0.7),
    "falling": lambda n: 4000 - torch.sym_int(n * 0.37),
    "with an offset": lambda n: torch.sym_int((n + 1) / 3 * 2) + 1,
    "square": lambda n: torch.sym_int(n * n / 7.3) // 900 + 1,
    "root": lambda n: torch.sym_int(torch.sym_sqrt(n)),
}


@pytest.mark.parametrize("last", [64, 65, 2000])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_size_rounded_from_a_float(name, last, device):
    """Python's float, not TensorRT's, and without tensors that are too large for TensorRT to compute sizes with."""
    size = ROUNDED[name]
    module = Call(lambda x: x.new_ones(size(x.shape[0])))
    model_trt = torch2rt(module, [torch.ones(7, device=device)], min_shapes=[(2,)], max_shapes=[(last,)])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for given in {*range(2, 70), *range(2, last, 97), *range(last - 66, last + 1)}:
        if 2 <= given <= last:
            assert run(torch.ones(given, device=device)).shape == (size(given),), given
    layers = map(model_trt.network.get_layer, range(model_trt.network.num_layers))
    constants = [layer.get_output(0).shape for layer in layers if layer.type is trt.LayerType.CONSTANT]
    assert all(math.prod(shape) <= 64 for shape in constants)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_a_factor_of_two_sizes(mode, device):
    """14 rows to 8: row 4 is row 7, as 4 * (1 / (8 / 14)) is in float64, and in float32 less than 7."""
    module = Call(lambda x: F.interpolate(x, scale_factor=(x.shape[3] / x.shape[2], 2.0), mode=mode))
    x = torch.randn(1, 2, 9, 6, device=device)
    model_trt = torch2rt(module, [x], min_shapes=[(1, 2, 4, 5)], max_shapes=[(1, 2, 19, 8)], verify=False)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    graph = trace(module, [x], min_shapes=[(1, 2, 4, 5)], max_shapes=[(1, 2, 19, 8)])
    for rows, columns in [(14, 8), (7, 5), (19, 7), (4, 8), (10, 6)]:
        x = torch.randn(1, 2, rows, columns, device=device)
        for ours in (run(x), graph(x)[0]):
            torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-5)


def test_a_constant_is_torchs(device):
    """torch's decomposition of a bilinear resize differs from its kernel where a size stays but for a factor."""
    module = Call(lambda x: x + F.interpolate(TABLE.to(x.device), scale_factor=(1.2, 1.02), mode="bilinear"))
    x = torch.randn(2, 3, 7, 5, device=device)
    graph = trace(module, [x])
    torch.testing.assert_close(graph(x)[0] if isinstance(graph(x), (tuple, list)) else graph(x), module(x))


ONE_LAYER = [("nearest", None), ("bilinear", False), ("bilinear", True), ("bicubic", False)]


@pytest.mark.parametrize(("mode", "align_corners"), ONE_LAYER)
def test_twice_as_large_is_one_layer(mode, align_corners):
    module = Call(lambda x: F.interpolate(x, scale_factor=2, mode=mode, align_corners=align_corners))
    graph = trace(module, [torch.randn(2, 3, 8, 8)], min_shapes=[(1, 3, 4, 4)], max_shapes=[(4, 3, 16, 16)])
    network = lower(graph).definition
    assert [network.get_layer(i).type for i in range(network.num_layers)] == [trt.LayerType.RESIZE]


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda x: F.interpolate(x.to(torch.uint8), (5, 5), mode="bilinear"), "only by 'nearest'")],
)
def test_refused(function, message):
    with pytest.raises(UnsupportedError, match=message):
        torch2rt(Call(function), [torch.randn(2, 3, 8, 8)], min_shapes=[(2, 3, 4, 8)], max_shapes=[(2, 3, 12, 8)])
