import re

import pytest
import torch
import torchvision
import torchvision.ops as ops
from harness import B, Call, Data, S, Size, case, check_case, compare, floats, half, ints, parametrize

from torch2rt import ConversionError, TraceError, UnsupportedError, torch2rt

K = Size("K", 1, 5, 9)
N = Size("N", 2, 3, 6)


def on_rois(function):
    """Of an image and uniform numbers: boxes of which some are degenerate, or reach out of the image on any side."""

    def call(images, uniform, *args, **kwargs):
        image = (uniform[:, :1] * images.shape[0]).floor()
        return function(images, torch.cat([image, uniform[:, 1:] * 18 - 3], 1), *args, **kwargs)

    call.__name__ = function.__name__
    return call


def uniform(*shape, dtype=torch.float32):
    return floats(*shape, low=0.0, high=0.999, dtype=dtype)


def of_sizes(function):
    """Boxes of whole sizes, whose bins have edges where rounding tells whether a pixel is in or out."""

    def call(images, sizes):
        sizes = sizes.to(images.dtype)
        return function(images, torch.cat([sizes[:, :1] * 0, sizes * 0 + 3, sizes + 3], 1), 7)

    return call


CORNERS = [[0, 1.0, 1, 6, 7], [1, 0, 0, 5.5, 5], [1, 3, 3, 3, 4], [0, 5, 6, 2, 2], [0, -3, -4, 22, 30], [1, 2, 2, 2, 2]]
PROPER = [CORNERS[0], CORNERS[1], CORNERS[4]]

BILINEAR = [
    case(on_rois(ops.roi_align), [(B, 3, 9, S), uniform(K, 5)], 2, 1.0, 2),
    case(on_rois(ops.roi_align), [(B, 3, S, 10), uniform(K, 5)], (3, 2), 0.7, 3, True),
    case(
        on_rois(ops.roi_align),
        [(2, 5, 9, 10), uniform(7, 5)],
        output_size=[2, 4],
        spatial_scale=0.5,
        sampling_ratio=1,
        aligned=False,
    ),
    case(on_rois(ops.roi_align), [(B, 3, 1, S), uniform(K, 5)], 2, 0.8, 2, id="roi_align-one-row"),
    case(on_rois(ops.RoIAlign((3, 2), 0.6, 2, aligned=True).forward), [(B, 3, 7, S), uniform(K, 5)], id="RoIAlign"),
    case(
        lambda x, a, b: ops.roi_align(x, [a, b * 4], (1, 3), 0.9, 2),
        [(2, 3, S, 7), (K, 4), (3, 4)],
        id="roi_align-list",
    ),
    case(
        lambda x, b: torch.ops.torchvision.roi_align.default(x, b * 5, 1.0, 2, 3, 2, True),
        [(1, 3, 7, S), floats(K, 5, low=0.0, high=0.19)],
        id="roi_align-default",
    ),
    *[
        case(
            lambda x, *rest: ops.roi_align(x, x.new_tensor(CORNERS), *rest),
            [(2, 3, S, 9)],
            (3, 2),
            0.7,
            ratio,
            aligned,
            id=f"roi_align-constant-{ratio}-{aligned}",
        )
        for ratio in (-1, 0, 2)
        for aligned in (False, True)
    ],
    case(
        lambda x: ops.roi_align(x, [x.new_tensor([[0.0, 1, 5, 6]]), x.new_zeros(0, 4)], 2),
        [(2, 3, S, 9)],
        id="roi_align-constant-list",
    ),
    case(on_rois(ops.ps_roi_align), [(B, 12, S, 9), uniform(K, 5)], (3, 2), 0.7, 2),
    case(on_rois(ops.ps_roi_align), [(2, 8, 7, 9), uniform(6, 5)], output_size=2, spatial_scale=0.5, sampling_ratio=3),
    case(on_rois(ops.PSRoIAlign((2, 3), 0.6, 1).forward), [(B, 6, 7, S), uniform(K, 5)], id="PSRoIAlign"),
    case(lambda x: ops.ps_roi_align(x, x.new_tensor(PROPER), (3, 2)), [(2, 6, S, 9)], id="ps_roi_align-constant"),
    case(
        lambda x, b: torch.ops.torchvision.ps_roi_align(x, b * 5, 1.0, 2, 3, 2),
        [(1, 12, 7, S), floats(K, 5, low=0.0, high=0.19)],
        id="ps_roi_align-both-results",
    ),
]

# torchvision computes positions in half precision where it is given half precision
HALF = [
    case(on_rois(ops.roi_align), [half(B, 3, 9, S), uniform(K, 5, dtype=torch.float16)], 2, 0.5, 2, atol=0.03),
    case(on_rois(ops.ps_roi_align), [half(B, 8, 9, S), uniform(K, 5, dtype=torch.float16)], 2, 0.5, 2, atol=0.03),
]

WINDOWS = [
    case(on_rois(ops.roi_pool), [(B, 3, 8, 13), uniform(K, 5)], (3, 4), 0.7),
    case(on_rois(ops.roi_pool), [(B, 3, 1, 2), uniform(K, 5)], (2, 7), spatial_scale=0.7),
    case(on_rois(ops.RoIPool((7, 2), spatial_scale=0.5).forward), [(2, 3, 10, 9), uniform(6, 5)], id="RoIPool"),
    case(lambda x: ops.roi_pool(x, x.new_tensor(CORNERS), (3, 2), 0.5), [(2, 3, 8, 9)], id="roi_pool-constant"),
    case(on_rois(ops.ps_roi_pool), [(B, 8, 9, S), uniform(K, 5)], 2),
    case(on_rois(ops.ps_roi_pool), [(B, 12, S, 10), uniform(K, 5)], (3, 4), 0.7),
    case(on_rois(ops.PSRoIPool((3, 2), 0.5).forward), [(2, 6, 10, 9), uniform(6, 5)], id="PSRoIPool"),
    *[
        case(of_sizes(f), [(1, 49, 66, 70), ints(40, 2, low=1, high=66)], modes=("static",), id=f"{f.__name__}-edges")
        for f in (ops.roi_pool, ops.ps_roi_pool)
    ],
    case(lambda x: ops.ps_roi_pool(x, x.new_tensor(CORNERS), (3, 2), 0.5), [(2, 6, S, 9)], id="ps_roi_pool-constant"),
]


def deform(input, offset, weight, mask=None, **kwargs):
    return ops.deform_conv2d(input, offset * 3, weight, mask=mask, **kwargs)


class Modulated(torch.nn.Module):
    """A deformable convolution as in networks: a convolution makes the offsets and the mask."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.where = torch.nn.Conv2d(4, groups * 3 * 6, (2, 3), (2, 1), (1, 0), (1, 2))
        self.conv = ops.DeformConv2d(4, 6, (2, 3), (2, 1), (1, 0), (1, 2), groups=2)

    def forward(self, x):
        y, x_, mask = self.where(x).chunk(3, 1)
        return self.conv(x, torch.cat([y, x_], 1), mask.sigmoid())


DEFORM = [
    case(deform, [(B, 4, 9, 10), (B, 12, 8, 8), (6, 4, 2, 3)]),
    case(deform, [(B, 4, S, 10), (B, 12, S, 8), (6, 4, 3, 2), (B, 6, S, 8)], padding=(1, 0), dilation=(1, 2)),
    case(deform, [(B, 4, 9, 10), (B, 24, 5, 10), (6, 2, 2, 3), (B, 12, 5, 10)], stride=(2, 1), padding=1),
    case(deform, [(B, 4, 9, 12), (B, 48, 8, 4), (6, 4, 2, 3)], stride=(1, 3), id="deform-channel-offsets"),
    case(deform, [(B, 6, 9, 10), (B, 36, 9, 10), (4, 3, 1, 3)], padding=(0, 1), id="deform-groups-apart"),
    case(
        lambda x, o, w, b: deform(x, o, w, bias=b), [(B, 4, 9, 10), (B, 12, 8, 8), (6, 4, 2, 3), (6,)], id="deform-bias"
    ),
    case(Modulated(1), [(B, 4, 9, Size("W", 5, 7, 12))]),
    case(Modulated(2), [(B, 4, S, 11)]),
    case(ops.DeformConv2d(4, 5, 1, bias=False), [(B, 4, 3, S), (B, 2, 3, S)], id="DeformConv2d"),
]


def box(*shape):
    return floats(*shape, low=1.0, high=9.0)


def corners(boxes):
    """Boxes whose second corner lies behind the first."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def pairwise(function):
    return lambda a, b, **kwargs: function(corners(a), corners(b), **kwargs)


IOUS = [ops.box_iou, ops.generalized_box_iou, ops.complete_box_iou, ops.distance_box_iou]
FORMATS = ["xyxy", "xywh", "cxcywh"]
ROTATED = {"xywhr": 5, "cxcywhr": 5, "xyxyxyxy": 8}
BOXES = [
    *[case(pairwise(f), [box(N, 4), box(K, 4)], id=f.__name__) for f in IOUS],
    *[case(pairwise(f), [box(4, 4)] * 2, modes=("static",), id=f"{f.__name__}-static") for f in IOUS],
    *[case(ops.box_iou, [box(N, 4), box(3, 4)], fmt=fmt) for fmt in FORMATS[1:]],
    case(pairwise(ops.box_iou), [ints(N, 4, low=1, high=9), ints(3, 4, low=1, high=9)], id="box_iou-int"),
    case(pairwise(ops.box_iou), [floats(N, 4, low=1, high=9, dtype=torch.float16)] * 2, id="box_iou-half"),
    *[case(ops.box_area, [box(K, 4)], fmt=fmt) for fmt in FORMATS],
    case(ops.box_area, [half(K, 4)]),
    *[case(ops.box_convert, [box(K, 4)], a, b) for a in FORMATS for b in FORMATS],
    *[
        case(ops.box_convert, [box(K, ROTATED[a])], a, b)
        for a, b in (("xywhr", "cxcywhr"), ("cxcywhr", "xywhr"), ("cxcywhr", "xyxyxyxy"), ("xyxyxyxy", "xywhr"))
    ],
    case(ops.clip_boxes_to_image, [floats(K, 4, low=-5, high=20)], (7, 11)),
    case(lambda b, x: ops.clip_boxes_to_image(b, x.shape[-2:]), [floats(B, K, 4, low=-5, high=20), (S, 6)], id="clip"),
    case(lambda x: ops.masks_to_boxes(x > 0.9), [(N, 5, 9)], id="masks_to_boxes"),
    case(ops.masks_to_boxes, [floats(4, 7, S, low=-1, high=0.1)], id="masks_to_boxes-float", modes=("static",)),
    *[
        case(ops.sigmoid_focal_loss, [(B, S), floats(B, S, low=0, high=1)], alpha, gamma, reduction)
        for alpha, gamma, reduction in ((0.25, 2, "none"), (-1, 1.5, "mean"), (0.7, 3, "sum"))
    ],
]


def randomized(module):
    """Weights and statistics that are not those of a fresh module."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.9)
    return module


def pyramid(**kwargs):
    fpn = ops.FeaturePyramidNetwork([3, 4, 5], 6, **kwargs)
    return lambda a, b, c: fpn.to(a.device)({"a": a, "b": b, "c": c})


MAPS = [(B, 3, 16, 12), (B, 4, 8, 6), (B, 5, 4, 3)]
MODULES = [
    case(ops.StochasticDepth(0.5, "row"), [(B, 3)]),
    case(ops.stochastic_depth, [(B, 3)], 0.5, "batch", training=False),
    case(ops.DropBlock2d(0.5, 3), [(B, 3, 5, 5)]),
    case(ops.DropBlock3d(0.5, 3), [(B, 3, 5, 5, 4)]),
    case(randomized(ops.FrozenBatchNorm2d(3, eps=1e-2)), [(B, 3, 4, S)]),
    case(randomized(ops.FrozenBatchNorm2d(3)).half(), [half(B, 3, 4, 5)], id="FrozenBatchNorm2d-half"),
    case(ops.SqueezeExcitation(6, 2, torch.nn.SiLU, torch.nn.Hardsigmoid), [(B, 6, S, 5)]),
    case(ops.Conv2dNormActivation(3, 4, 3, 2, activation_layer=torch.nn.Hardswish, dilation=2), [(B, 3, S, 9)]),
    case(ops.Conv3dNormActivation(3, 4, 3, norm_layer=None), [(B, 3, 4, S, 5)]),
    case(ops.MLP(4, [6, 5], torch.nn.LayerNorm, torch.nn.GELU, dropout=0.5), [(B, S, 4)]),
    case(ops.Permute([0, 2, 3, 1]), [(B, 3, S, 5)]),
    case(pyramid(), MAPS, id="FeaturePyramidNetwork"),
    case(pyramid(extra_blocks=ops.feature_pyramid_network.LastLevelMaxPool()), MAPS, id="FPN-LastLevelMaxPool"),
    case(pyramid(extra_blocks=ops.feature_pyramid_network.LastLevelP6P7(6, 6)), MAPS, id="FPN-LastLevelP6P7"),
    case(
        lambda x, b: ops.MultiScaleRoIAlign(["x"], 3, 2)({"x": x}, [b * 8, b * 3], [(64, 48), (60, 48)]),
        [(2, 3, 16, 12), uniform(K, 4)],
        id="MultiScaleRoIAlign",
    ),
]


@parametrize([*BILINEAR, *HALF, *WINDOWS])
def test_pooling(row, mode, device):
    check_case(row, mode, device)


@parametrize(DEFORM)
def test_deform_conv2d(row, mode, device):
    check_case(row, mode, device)


@parametrize(BOXES)
def test_boxes(row, mode, device):
    check_case(row, mode, device)


@parametrize(MODULES)
def test_modules(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, b: ops.roi_align(x, b * 9, 3, 0.7, 2, True), [(1, 3, 8, 9), (5, 5)]),
        (lambda x, b: ops.ps_roi_align(x, b * 9, (2, 1), 0.7, 3), [(1, 6, 8, 9), (5, 5)]),
        (lambda x, o, w: ops.deform_conv2d(x, o * 9, w * 4), [(2, 4, 8, 9), (2, 12, 7, 7), (3, 4, 2, 3)]),
    ],
    ids=["roi_align", "ps_roi_align", "deform_conv2d"],
)
def test_positions_of_half_precision_images_are_exact(function, shapes, device):
    """What is sampled in half precision is what float32 samples, where torchvision itself is off by far more."""
    inputs = [Data(shape, torch.float16, 0.0, 0.11).make("opt").to(device) for shape in shapes]
    model_trt = torch2rt(Call(function), inputs)
    result = (model_trt if device.type == "cuda" else model_trt.reference())(*inputs)
    compare(result.float(), function(*[x.float() for x in inputs]), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("deformable", [False, True])
def test_autocast(deformable, device):
    if deformable and device.type == "cpu":
        pytest.skip("torchvision has no autocast of deform_conv2d on the CPU")
    module = Modulated(1).eval().to(device)

    def call(x):
        with torch.autocast(device.type, torch.bfloat16):
            x = module(x) if deformable else module.where(x)
            return ops.roi_align(x, x.new_tensor([[0, 1.0, 2, 5, 6]]), 2, 1.0, 2)

    check_case(case(call, [(2, 4, 9, 10)], rtol=0.05, atol=0.05), "static", device)


COUNTED = "keep all and use torch.where|Where its use allows it, keep all elements and mask"
NMS = "call torchvision.ops.nms or batched_nms on what the engine returns"
ERRORS = [
    (lambda x, b: ops.roi_align(x, b, 2), "Give the samples of a bin, such as sampling_ratio=2"),
    (lambda x, b: ops.ps_roi_align(x, b, 2), "Give the samples of a bin, such as sampling_ratio=2"),
    (lambda x, b: ops.ps_roi_align(x, x.new_tensor(CORNERS), 2, 1.0, 0), "makes NaN of boxes"),
    (lambda x, b: ops.nms(b[:, 1:], b[:, 0], 0.5), NMS),
    (lambda x, b: ops.batched_nms(b[:, 1:], b[:, 0], b[:, 0].int(), 0.5), NMS),
    (lambda x, b: b[ops.remove_small_boxes(b[:, 1:], 1.0)], COUNTED),
    (lambda x, b: torch.ops.torchvision.roi_pool(x, b, 1.0, 2, 2)[1], "roi_pool.*there is no converter"),
    (
        lambda x, b: ops.MultiScaleRoIAlign(["x", "y"], 2, 2)({"x": x, "y": x[..., ::2, ::2]}, [b[:, 1:]], [(32, 36)]),
        COUNTED,
    ),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_refused(function, message, dynamic, device):
    inputs = [torch.randn(1, 4, 8, 9, device=device), torch.rand(3, 5, device=device)]
    shapes = {"max_shapes": [(1, 4, 8, 9), (9, 5)]} if dynamic else {}
    with pytest.raises((TraceError, UnsupportedError), match=re.compile(message, re.DOTALL)):
        torch2rt(Call(function), inputs, **shapes)


def test_roi_pool_needs_the_image_sizes(device):
    inputs = [torch.randn(1, 4, 8, 9, device=device), torch.rand(3, 5, device=device)]
    with pytest.raises(ConversionError, match="images of a dynamic height or width"):
        torch2rt(Call(ops.roi_pool, (2,)), inputs, max_shapes=[(1, 4, 12, 9), (3, 5)])


@pytest.mark.skipif(not hasattr(torch.ops.torchvision, "box_iou_rotated"), reason="this torchvision has none")
def test_rotated_boxes_are_refused(device):
    boxes = torch.rand(3, 5, device=device)
    with pytest.raises(ConversionError, match="polygon"):
        torch2rt(Call(lambda b: ops.box_iou(b, b, fmt="cxcywhr")), [boxes])


def test_a_whole_detector_is_refused_at_a_line(device):
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(TraceError, match=r"torchvision.*\.py:\d+"):
        torch2rt(Call(lambda x: detector.to(x.device).eval()(list(x))), [torch.rand(2, 3, 64, 64, device=device)])
