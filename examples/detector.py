"""Convert the networks inside of torchvision's detectors, and compare the boxes with those of eager torch.

    python examples/detector.py                       # fasterrcnn, retinanet and ssd, on small images
    python examples/detector.py --size 800 1066       # as on a GPU
    python examples/detector.py --weights             # with torchvision's weights, which are downloaded

A detector's Python looks at values (which boxes to keep), so the whole is no graph. `convert_submodules` makes engines
of the backbone and the heads, which take most of the time, and leaves the rest as it is. Without `--weights` the
weights are drawn; without an NVIDIA GPU the networks are evaluated with torch.
"""

import argparse
import time

import torch
from torch import nn
from torchvision.models import detection

from torch2rt import convert_submodules

BOXES = {"max_batch_size": 1000}  # how many boxes the first stage proposes at most
TWO_STAGES = {"backbone": {}, "rpn.head": {}, "roi_heads.box_head": BOXES, "roi_heads.box_predictor": BOXES}
MASKS = {"roi_heads.mask_head": {"max_batch_size": 100}, "roi_heads.mask_predictor": {"max_batch_size": 100}}
ONE_STAGE = {"backbone": {}, "head": {}}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": TWO_STAGES,
    "retinanet_resnet50_fpn": ONE_STAGE,
    "ssdlite320_mobilenet_v3_large": ONE_STAGE,
    "fcos_resnet50_fpn": ONE_STAGE,
    "maskrcnn_resnet50_fpn": {**TWO_STAGES, **MASKS},
}
LAST = ("cls_score", "bbox_pred", "cls_logits", "bbox_reg", "bbox_ctrness")  # layers that give scores and boxes


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
    return model


def unmatched(found: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> int:
    """How many boxes have no box among others with the same label, score and corners but for roundings."""
    distance = (found["boxes"][:, None] - others["boxes"]).abs().amax(2) / 0.5
    distance = torch.maximum(distance, (found["scores"][:, None] - others["scores"]).abs() / 1e-3)
    distance[found["labels"][:, None] != others["labels"]] = torch.inf
    return int((distance.amin(1) > 1).sum()) if distance.numel() else len(found["boxes"])


def seconds(model: nn.Module, images: list[torch.Tensor], repeats: int) -> float:
    """The time of a call, the fastest of several."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        if images[0].is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def main(names: list[str] = list(DETECTORS)[:3], size: tuple[int, int] = (96, 128), weights: bool = False) -> dict:
    """Convert detectors and print a line for each; returns what is printed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for name in names:
        torch.manual_seed(0)
        model = detector(name, size, weights).to(device)
        images = [torch.rand(3, *size, device=device)]
        (expected,) = model(images)
        eager = seconds(model, images, 3)
        converted = convert_submodules(model, DETECTORS[name], [images], unserved="torch")
        if device.type == "cpu":
            for path, part in converted.items():
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, part.converted.reference())
        (actual,) = model(images)
        results[name] = {
            "boxes": len(expected["boxes"]),
            "unmatched": unmatched(expected, actual) + unmatched(actual, expected),
            "eager": eager,
            "converted": seconds(model, images, 3) if device.type == "cuda" else None,
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
    arguments = parser.parse_args()
    main(arguments.names, tuple(arguments.size), arguments.weights)
