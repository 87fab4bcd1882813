"""A module under the types that an engine's inputs and outputs have, to compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Retyped(torch.nn.Module):
    """A float32 module that takes and returns another floating-point type, as with `io_precision`.

    >>> Retyped(torch.nn.Linear(3, 5), torch.float16)(torch.ones(2, 3).half()).dtype
    torch.float16
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self.wide, (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: retyped(x, self.dtype), self.module(*args, **kwargs))

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype is self.dtype else x


def retyped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor in another type; one of any other type as it is."""
    return x.to(dtype) if x.dtype is torch.float32 else x


def modules_of(module: Any) -> Mapping[str, Any]:
    """The modules of a module by their paths, as a trace names them."""
    return dict(getattr(module, "_orig_mod", module).named_modules())
