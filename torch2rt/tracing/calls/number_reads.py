"""Integers that Python takes out of tensors, as sizes that depend on values: `.item()`, `.tolist()`, `int(tensor)`.

A size is carried from segment to segment by a tensor that has it. So the integer n becomes the size of a tensor of n
elements. A negative one is an error of the call, as no tensor has such a size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from torch2rt.callables import Target
from torch2rt.sizes import is_symbolic

WITH_VALUES = torch.ops.aten.repeat_interleave.Tensor  # of [n], which gives n zeros
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read(func: Target, args: tuple[Any, ...], record: Callable[..., Any]) -> Any:
    """What a call that reads integers returns, each a size; `NotImplemented` for other calls.

    `record` makes and records a call.
    """
    name = getattr(func, "__name__", "")
    if name not in ("item", "tolist") or not args or not _holds_integers(args[0]):
        return NotImplemented
    x = args[0]
    if name == "item" and x.numel() == 1:
        return _size(x, record)
    if name == "item" or any(map(is_symbolic, x.shape)):
        return NotImplemented
    return _listed(x, record)


def with_sizes(args: Any, kwargs: Any, record: Callable[..., Any]) -> Any:
    """The arguments of a call, integers that are in tensors as sizes; `None` where there is no such tensor."""
    if not any(_is_integer(value) for value in tree_leaves((args, kwargs))):
        return None
    return tree_map(lambda value: _size(value, record) if _is_integer(value) else value, (args, kwargs))


def _listed(x: torch.Tensor, record: Callable[..., Any]) -> Any:
    if not x.dim():
        return _size(x, record)
    return [_listed(record(torch.Tensor.select, x, 0, i), record) for i in range(x.shape[0])]


def _size(x: torch.Tensor, record: Callable[..., Any]) -> Any:
    return record(WITH_VALUES, record(torch.Tensor.to, record(torch.Tensor.reshape, x, (1,)), torch.int64)).shape[0]


def _is_integer(value: Any) -> bool:
    return _holds_integers(value) and not value.dim()


def _holds_integers(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.dtype in INTEGERS
