"""What the families share: type aliases, checks, reading a layer's attributes, precision, laying out and padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch2rt.backend.tensorrt import TORCH_DTYPES, trt
from torch2rt.errors import Torch2RTError

Stored = Mapping[str, Tensor]
Run = Callable[..., Any]

# torch has no four bit integers: their values are kept in int8.
DTYPES: dict[Any, torch.dtype] = {
    **TORCH_DTYPES,
    **{
        getattr(trt.DataType, name): dtype
        for name, dtype in (("FP8", torch.float8_e4m3fn), ("INT4", torch.int8))
        if hasattr(trt.DataType, name)
    },
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Torch2RTError(message)


def pick(table: Mapping[str, Any], choice: Any) -> Any:
    """The table's entry for an enum value."""
    require(choice.name in table, f"{choice} is not supported")
    return table[choice.name]


def bits(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def dims(value: Any) -> tuple[int, ...] | None:
    """Dims as ints, or None where they are unset or come as a tensor."""
    try:
        return None if value is None else tuple(int(value[i]) for i in range(len(value)))
    except ValueError:  # unset ones have the length -1 in TensorRT for RTX 1.4
        return None


def torch_type(dtype: Any) -> torch.dtype:
    require(dtype in DTYPES, f"{dtype} is not supported")
    return DTYPES[dtype]


def ints(tensor: Tensor) -> list[int]:
    return [int(i) for i in tensor.reshape(-1).tolist()]


def values(layer: Any, stored: Stored, role: str) -> Tensor | None:
    """A weights attribute as a flat tensor, None where it is empty."""
    if role in stored:
        return stored[role].detach().reshape(-1)
    array = getattr(layer, role)
    if array is None or array.size == 0:
        return None
    require(isinstance(array, np.ndarray), f"{role} cannot be read back; pass it in `weights`")
    return torch.from_numpy(array).reshape(-1)


def same_type(*tensors: Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None}
    require(len(dtypes) == 1, f"strong typing forbids mixing {sorted(map(str, dtypes))}")
    return dtypes.pop()


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def floats(x: Tensor) -> Tensor:
    require(x.is_floating_point(), f"{x.dtype} where only floating point is defined")
    return x.float()


def accumulator(x: Tensor) -> Tensor:
    """Floats for sums of products; double on a GPU, where torch may use TF32 for float32."""
    return floats(x).double() if x.is_cuda else floats(x)


def limit_of(dtype: torch.dtype, op: str) -> float | int:
    if dtype.is_floating_point:
        return -math.inf if op == "MAX" else math.inf
    return torch.iinfo(dtype).min if op == "MAX" else torch.iinfo(dtype).max


def without_nan(x: Tensor, op: str) -> Tensor:
    """The least that can be in the place of each NaN: what GPUs pass over in a maximum or a minimum."""
    return torch.where(x.isnan(), limit_of(x.dtype, op), x) if x.is_floating_point() else x


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector laid along one axis of a tensor of this rank."""
    return vector.reshape([-1 if d == axis else 1 for d in range(rank)])


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0) -> Tensor:
    """Pad the last dimensions, whose order `pads` is in."""
    return F.pad(x, list(itertools.chain.from_iterable(reversed(pads))), value=value)


def take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`index_select` that puts up with indices out of range, for results that are masked afterwards."""
    n = x.shape[axis]
    if n == 0 and index.numel():
        shape = list(x.shape)
        shape[axis] = index.numel()
        return x.new_zeros(shape)
    return x.index_select(axis, index.clamp(0, max(n - 1, 0)))
