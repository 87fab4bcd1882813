"""What torch's switches say of float32 on a GPU: whether products and convolutions round their inputs to TF32.

Torch 2.9 has new switches beside the old ones. Reading an old one raises an error where new ones were used.
"""

from __future__ import annotations

from typing import Any

import torch


def products_in_tf32() -> bool:
    """Whether torch computes matrix products of float32 in TF32."""
    return _is_tf32(torch.backends.cuda.matmul, torch.backends.cuda.matmul)


def convolutions_in_tf32() -> bool:
    """Whether torch computes convolutions of float32 in TF32."""
    return _is_tf32(torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None))


def _is_tf32(old: Any, new: Any) -> bool:
    precision = getattr(new, "fp32_precision", None)
    return bool(old.allow_tf32) if precision is None else precision == "tf32"


def tf32_switches() -> tuple[bool, bool, bool]:
    """Both, and whether the old switches say so, too: what `put_tf32` takes in another process."""
    now = products_in_tf32(), convolutions_in_tf32()
    try:
        return *now, now == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return *now, False


def put_tf32(products: bool, convolutions: bool, by_old: bool) -> None:
    """Set torch's switches, the old ones or the new ones."""
    if by_old:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    else:
        torch.backends.cuda.matmul.fp32_precision = _name_of(products)
        torch.backends.cudnn.conv.fp32_precision = _name_of(convolutions)  # type: ignore[attr-defined]


def _name_of(is_tf32: bool) -> Any:
    return "tf32" if is_tf32 else "ieee"
