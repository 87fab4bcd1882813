"""Products of float16 numbers on a CPU, as fast as those of float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class WideProducts(TorchDispatchMode):
    """Computes products of float16 numbers in float32, as all kernels do, and rounds the results.

    torch's own for a CPU do it so slowly that ResNet-50 takes twenty times as long as in float32.
    """

    supports_higher_order_operators = True
    products = frozenset(
        """
            convolution _convolution addmm mm bmm baddbmm addmv mv dot linear
            _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
        """.split()
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").split(".")[0] in self.products and torch.float16 in {
            x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"
        }:
            args, kwargs = tree_map_only(torch.Tensor, lambda x: _cast(x, torch.float16, torch.float32), (args, kwargs))
            return tree_map_only(torch.Tensor, lambda x: _cast(x, torch.float32, torch.float16), func(*args, **kwargs))
        return func(*args, **kwargs)


def _cast(x: torch.Tensor, old: torch.dtype, new: torch.dtype) -> torch.Tensor:
    return x.to(new) if x.dtype is old else x
