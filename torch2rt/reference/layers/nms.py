"""Non-maximum suppression of boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch2rt.reference.layers.common import Run, Stored, floats, same_type, torch_type


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of one box with many, as (low, high) corners."""
    low, high = torch.maximum(a[:2], b[:, :2]), torch.minimum(a[2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    union = (a[2:] - a[:2]).prod() + (b[:, 2:] - b[:, :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def nms(layer: Any, stored: Stored) -> Run:
    centred, limit = layer.bounding_box_format.name == "CENTER_SIZES", layer.topk_box_limit
    index_type, count_type = (torch_type(layer.get_output(i).dtype) for i in range(2))

    def corners(boxes: Tensor) -> Tensor:
        a, b = floats(boxes).chunk(2, -1)
        a, b = (a - b / 2, a + b / 2) if centred else (a, b)
        return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)

    def run(
        boxes: Tensor, scores: Tensor, most: Tensor, overlap: Tensor | None = None, threshold: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        same_type(boxes, scores)
        highest = 0.0 if overlap is None else float(overlap)
        lowest = 0.0 if threshold is None else float(threshold)
        boxes = corners(boxes if boxes.ndim == 4 else boxes.unsqueeze(2).expand(-1, -1, scores.shape[2], -1))
        chosen: list[tuple[int, int, int]] = []
        for image in range(scores.shape[0]):
            flat = floats(scores[image]).reshape(-1)
            kept: dict[int, list[Tensor]] = {}
            for at in flat.argsort(descending=True, stable=True)[:limit].tolist():
                box, kind = divmod(at, scores.shape[2])
                mine = kept.setdefault(kind, [])
                if flat[at] <= lowest or len(mine) >= int(most):
                    continue
                candidate = boxes[image, box, kind]
                if not mine or bool((_overlap(candidate, torch.stack(mine)) <= highest).all()):
                    mine.append(candidate)
                    chosen.append((image, kind, box))
        found = torch.tensor(chosen, dtype=index_type).reshape(-1, 3)
        return found, torch.tensor(len(chosen), dtype=count_type)

    return run
