"""torchvision's `batched_nms` in a trace: it asks whether any box is left, which only values say.

It then adds an offset to the boxes of each class, by the largest coordinate. With -inf among the coordinates there is a
largest one also of no boxes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torch2rt.sizes import expression, is_symbolic
from torch2rt.tracing.patches.process_switches import PerThread

_MODULE = "torchvision.ops.boxes"


def boxes_as_values() -> AbstractContextManager[None]:
    """A context in which this thread traces `batched_nms` of any number of boxes."""
    return _patch() if _MODULE in sys.modules else nullcontext()  # type: ignore[return-value]


def _patch() -> PerThread:
    if not _PATCHES:
        _PATCHES.append(PerThread(sys.modules[_MODULE], "_batched_nms_coordinate_trick", _stand_in))
    return _PATCHES[0]


_PATCHES: list[PerThread] = []


def _stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    def coordinate_trick(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
        size = boxes.shape[0]
        if not is_symbolic(size) or not any(str(symbol).startswith("u") for symbol in expression(size).free_symbols):
            return original(boxes, scores, idxs, iou_threshold)
        largest = torch.cat([boxes.flatten(), boxes.new_full((1,), -torch.inf)]).max()
        apart = boxes + (idxs.to(boxes) * (largest + 1))[:, None]
        return sys.modules[_MODULE].nms(apart, scores, iou_threshold)

    return coordinate_trick
