"""Convert the networks inside of torchvision's detectors, and compare the boxes with those of eager torch.

    python examples/detector.py                       # fasterrcnn, retinanet and ssd, on small images
    python examples/detector.py --size 800 1066       # as on a GPU
    python examples/detector.py --weights             # with torchvision's weights, which are downloaded
    python examples/detector.py --whole fcos_resnet50_fpn

A detector's Python looks at values (which boxes to keep), so the whole is no graph. `convert_submodules` makes engines
of the backbone and the heads, which take most of the time, and leaves the rest as it is. With `--whole`, the whole is
converted with `fallback=True`: the calls whose results depend on values stay torch's, between engines. Functions that
loop over the boxes, of masks and of keypoints, are given to `graph_break` for that. Without `--weights` the weights are
drawn; without an NVIDIA GPU the networks are evaluated with torch.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torchvision.models import detection

from torch2rt import convert_submodules, graph_break, torch2rt

BOXES = {"max_batch_size": 1000}  # how many boxes the first stage proposes at most
TWO_STAGES = {"backbone": {}, "rpn.head": {}, "roi_heads.box_head": BOXES, "roi_heads.box_predictor": BOXES}
MASKS = {"roi_heads.mask_head": {"max_batch_size": 100}, "roi_heads.mask_predictor": {"max_batch_size": 100}}
KEYPOINTS = {
    "roi_heads.keypoint_head": {"max_batch_size": 100},
    "roi_heads.keypoint_predictor": {"max_batch_size": 100},
}
ONE_STAGE = {"backbone": {}, "head": {}}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": TWO_STAGES,
    "retinanet_resnet50_fpn": ONE_STAGE,
    "ssdlite320_mobilenet_v3_large": ONE_STAGE,
    "ssd300_vgg16": ONE_STAGE,
    "fasterrcnn_resnet50_fpn": TWO_STAGES,
    "fcos_resnet50_fpn": ONE_STAGE,
    "maskrcnn_resnet50_fpn": {**TWO_STAGES, **MASKS},
    "keypointrcnn_resnet50_fpn": {**TWO_STAGES, **KEYPOINTS},
}
LOOPS = ((detection.transform, "paste_masks_in_image"), (detection.roi_heads, "heatmaps_to_keypoints"))
LAST = (
    "cls_score",
    "bbox_pred",
    "cls_logits",
    "bbox_reg",
    "bbox_ctrness",
    "classification_head.module_list",
)  # layers that give scores and boxes


def detector(name: str, size: tuple[int, int], weights: bool) -> nn.Module:
    """A detector for images of one size; drawn weights keep the signal's size, so that scores differ."""
    if weights:
        return getattr(detection, name)(weights="DEFAULT", min_size=min(size), max_size=max(size)).eval()
    options = {} if name.startswith("ssd") else {"min_size": min(size), "max_size": max(size)}
    threshold = {"box_score_thresh" if "rcnn" in name else "score_thresh": 0.005}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **threshold, **options).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    for path, weight in model.named_parameters():
        if weight.dim() > 1 and any(part in path for part in LAST):
            weight.data.mul_(0.03)
    fit_statistics(model, [torch.rand(3, *size)])
    return model


@torch.no_grad()
def fit_statistics(model: nn.Module, images: list[torch.Tensor] | torch.Tensor) -> None:
    """Give batch norms the statistics of these images, so that signals keep their size from layer to layer."""

    def fit(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        over = [0, 2, 3]
        norm.running_mean.copy_(inputs[0].mean(over))
        norm.running_var.copy_(inputs[0].var(over, correction=0) + 1e-3)

    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    model(images)
    for hook in hooks:
        hook.remove()


class OneImage(nn.Module):
    """A detector as a module of one image, whose result is a dict of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model([image])[0]


def unmatched(found: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> int:
    """How many boxes have no box among others with the same label, score and corners but for roundings."""
    distance = (found["boxes"][:, None] - others["boxes"]).abs().amax(2) / 0.5
    distance = torch.maximum(distance, (found["scores"][:, None] - others["scores"]).abs() / 1e-3)
    distance[found["labels"][:, None] != others["labels"]] = torch.inf
    return int((distance.amin(1) > 1).sum()) if distance.numel() else len(found["boxes"])


def seconds(model: Callable, images: list[torch.Tensor], repeats: int) -> float:
    """The time of a call, the fastest of several."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        if images[0].is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def in_parts(model: nn.Module, parts: dict, images: list[torch.Tensor]) -> nn.Module:
    """The detector with engines in the place of some submodules."""
    converted = convert_submodules(model, parts, [images], unserved="torch")
    if not images[0].is_cuda:
        for path, part in converted.items():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, part.converted.reference())
    return model


@contextlib.contextmanager
def loops_in_torch() -> Iterator[None]:
    """While a detector is converted, let torch run the functions of torchvision that loop over boxes."""
    before = [getattr(module, name) for module, name in LOOPS]
    for (module, name), function in zip(LOOPS, before, strict=True):
        setattr(module, name, graph_break(function))
    try:
        yield
    finally:
        for (module, name), function in zip(LOOPS, before, strict=True):
            setattr(module, name, function)


def in_one(model: nn.Module, image: torch.Tensor) -> Callable[[list[torch.Tensor]], list[dict]]:
    """The whole detector for images of one size, as engines and torch calls."""
    with loops_in_torch():
        converted = torch2rt(OneImage(model).eval(), [image], fallback=True)
    print("\n".join(converted.report.segments))
    run = converted if image.is_cuda else converted.reference()
    return lambda images: [run(image) for image in images]


@torch.no_grad()
def main(
    names: list[str] = list(DETECTORS)[:3],
    size: tuple[int, int] = (96, 128),
    weights: bool = False,
    whole: bool = False,
) -> dict:
    """Convert detectors and print a line for each; returns what is printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for name in names:
        torch.manual_seed(0)
        model = detector(name, size, weights).to(device)
        images = [torch.rand(3, *size, device=device)]
        (expected,) = model(images)
        eager = seconds(model, images, 3)
        run = in_one(model, images[0]) if whole else in_parts(model, DETECTORS[name], images)
        (actual,) = run(images)
        results[name] = {
            "boxes": len(expected["boxes"]),
            "unmatched": unmatched(expected, actual) + unmatched(actual, expected),
            "eager": eager,
            "converted": seconds(run, images, 3) if device.type == "cuda" else None,
        }
        line = "{boxes} boxes, {unmatched} of them without a partner".format(**results[name])
        if device.type == "cuda":
            line += "; {:.1f} ms eager, {:.1f} ms converted".format(eager * 1e3, results[name]["converted"] * 1e3)
        print(f"{name:<40}{line}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(DETECTORS)[:3], choices=list(DETECTORS))
    parser.add_argument("--size", nargs=2, type=int, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    main(arguments.names, tuple(arguments.size), arguments.weights, arguments.whole)
