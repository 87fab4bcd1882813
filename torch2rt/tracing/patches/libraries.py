"""Functions of torchvision and transformers in a trace that ask what traced tensors hold, to choose between ways.

torchvision's `batched_nms` asks whether any box is left. It then adds an offset to the boxes of each class, by the
largest coordinate: with -inf among the coordinates there is a largest one also of no boxes.

transformers asks whether a mask is the causal one, and so may be left out, by the padding and by the position in a
static cache. A mask that is not left out says the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from torch2rt.sizes import expression, is_symbolic
from torch2rt.tracing.patches.process_switches import PerThread


@contextmanager
def libraries_as_values() -> Iterator[None]:
    """A context in which this thread traces these functions, of the libraries that are imported."""
    with ExitStack() as stack:
        for key, stand_in in _STAND_INS.items():
            module, name = key
            if hasattr(sys.modules.get(module), name):
                if key not in _PATCHES:
                    _PATCHES[key] = PerThread(sys.modules[module], name, stand_in)
                stack.enter_context(_PATCHES[key])  # type: ignore[arg-type]
        yield


def _coordinate_trick(original: Callable[..., Any]) -> Callable[..., Any]:
    def coordinate_trick(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
        size = boxes.shape[0]
        if not is_symbolic(size) or not any(str(symbol).startswith("u") for symbol in expression(size).free_symbols):
            return original(boxes, scores, idxs, iou_threshold)
        largest = torch.cat([boxes.flatten(), boxes.new_full((1,), -torch.inf)]).max()
        apart = boxes + (idxs.to(boxes) * (largest + 1))[:, None]
        return sys.modules["torchvision.ops.boxes"].nms(apart, scores, iou_threshold)

    return coordinate_trick


def _is_causal_enough(original: Callable[..., bool]) -> Callable[..., bool]:
    def ignore_causal_mask(*args: Any, **kwargs: Any) -> bool:
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            return False
        return original(*args, **kwargs)

    return ignore_causal_mask


_STAND_INS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("torchvision.ops.boxes", "_batched_nms_coordinate_trick"): _coordinate_trick,
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"): _is_causal_enough,
}
_PATCHES: dict[tuple[str, str], PerThread] = {}
