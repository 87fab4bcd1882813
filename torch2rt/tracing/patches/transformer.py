"""`nn.Transformer` in a trace: its Python looks into masks to choose between ways, of which a trace has one.

Whether a mask is the causal one changes how torch computes, but not what. Whether all padding is at the ends changes
the result: `nn.TransformerEncoder` then leaves the padded places out, and what comes from its last layer is zero there.
That choice is made among values here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch2rt.tracing.patches.process_switches import Shared

_HERE = threading.local()  # `is_traced` of the trace that is under way in this thread
_FORWARD = torch.nn.TransformerEncoder.forward
_LAYER = torch.nn.TransformerEncoderLayer.forward
_DETECT = transformer._detect_is_causal_mask


@contextmanager
def _replaced() -> Iterator[None]:
    torch.nn.TransformerEncoder.forward = _forward  # type: ignore[method-assign]
    torch.nn.TransformerEncoderLayer.forward = _layer  # type: ignore[method-assign]
    transformer._detect_is_causal_mask = _detect_is_causal_mask
    try:
        yield
    finally:
        torch.nn.TransformerEncoder.forward = _FORWARD  # type: ignore[method-assign]
        torch.nn.TransformerEncoderLayer.forward = _LAYER  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = _DETECT


_REPLACED = Shared(_replaced)


@contextmanager
def masks_as_values(is_traced: Callable[[Any], bool]) -> Iterator[None]:
    """While this thread traces, let `nn.Transformer` and its parts not ask what traced masks hold."""
    before, _HERE.is_traced = _is_traced_here(), is_traced
    try:
        with _REPLACED:
            yield
    finally:
        _HERE.is_traced = before


def _is_traced_here() -> Callable[[Any], bool] | None:
    return getattr(_HERE, "is_traced", None)


def _detect_is_causal_mask(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    if (is_traced := _is_traced_here()) is not None:
        with torch._C.DisableTorchFunction():  # the question itself is not to be traced
            if is_traced(mask):
                return is_causal is True
    return _DETECT(mask, is_causal, size)


def _forward(
    self: torch.nn.TransformerEncoder,
    src: torch.Tensor,
    mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    padding = src_key_padding_mask
    is_tracing = _is_traced_here() is not None
    if not is_tracing or padding is None or mask is not None or src.dim() != 3 or not _may_leave_out(self):
        return _FORWARD(self, src, mask, padding, is_causal)
    is_padded = padding if padding.dtype is torch.bool else padding != 0
    at_the_end = torch.arange(src.shape[1], device=src.device) >= (~is_padded).sum(1, keepdim=True)
    if getattr(self, "mask_check", True):
        leaves_out = (is_padded == at_the_end).all()
    else:  # as many places as are padded, wherever those are
        is_padded, leaves_out = at_the_end, torch.ones((), dtype=torch.bool, device=src.device)
    left_out = torch.zeros(is_padded.shape, dtype=src.dtype, device=src.device).masked_fill(is_padded, -torch.inf)
    padding = F._canonical_mask(padding, "src_key_padding_mask", None, "mask", src.dtype)
    padding = torch.where(leaves_out, left_out, padding)
    for layer in self.layers:
        src = layer(src, src_mask=None, is_causal=is_causal is True, src_key_padding_mask=padding)
    src = torch.where((leaves_out & is_padded).unsqueeze(-1), 0.0, src)
    return src if self.norm is None else self.norm(src)


def _layer(
    self: torch.nn.TransformerEncoderLayer,
    src: torch.Tensor,
    src_mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """A layer that torch may run as one operator, of which it has a result of another dtype under autocast.

    On a GPU that operator has the approximate gelu. A token of zeros on the device tells.
    """
    autocasts = torch.is_autocast_enabled(src.device.type)
    gelu_on_gpu = self.activation_relu_or_gelu == 2 and src.device.type == "cuda"
    if _is_traced_here() is None or not (autocasts or gelu_on_gpu):
        return _LAYER(self, src, src_mask, src_key_padding_mask, is_causal)
    with torch._C.DisableTorchFunction():
        one = torch.zeros((1,) * (src.dim() - 1) + src.shape[-1:], dtype=src.dtype, device=src.device)
        masks = [
            None if mask is None else torch.zeros((1,) * mask.dim(), dtype=mask.dtype, device=mask.device)
            for mask in (src_mask, src_key_padding_mask)
        ]
        dtype = _LAYER(self, one, *masks, is_causal).dtype if autocasts else src.dtype
        is_approximate = gelu_on_gpu and _runs_as_one(self, one, *masks, is_causal)
    with _ApproximateGelu() if is_approximate else nullcontext():
        result = _LAYER(self, src, src_mask, src_key_padding_mask, is_causal)
    return result.to(dtype) if autocasts else result


def _runs_as_one(layer: torch.nn.TransformerEncoderLayer, *arguments: Any) -> bool:
    """Whether torch runs a layer as one operator."""
    with _Operators() as operators:  # beneath which autocast casts nothing
        _LAYER(layer, *arguments)
    return torch.ops.aten._transformer_encoder_layer_fwd.default in operators.called


class _Operators(TorchDispatchMode):
    """Keeps what operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func)
        return func(*args, **(kwargs or {}))


class _ApproximateGelu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"approximate": "tanh"} if func is F.gelu else {}
        return func(*args, **{**(kwargs or {}), **more})


def _may_leave_out(encoder: torch.nn.TransformerEncoder) -> bool:
    """Whether torch leaves padded places out, if they are all at the ends."""
    return (
        torch.backends.mha.get_fastpath_enabled()
        and getattr(encoder, "use_nested_tensor", False)
        and not encoder.layers[0].training
        and not torch.is_autocast_enabled()
    )
