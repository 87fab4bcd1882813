"""Constant tensors that torch takes for numbers, as in `x.new_full((2,), stride[0])`.

torch asks such a tensor for its value while it runs the call. `FakeMode` answers, because the tensor is real, and
remembers the tensor, so that the graph holds the number in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from torch2rt.tracing.patches.fake_kernels import KERNELS

Number = bool | int | float | complex


class FakeMode(FakeTensorMode):
    """torch's fake mode, in which the values of real tensors are known."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # An address of a tensor without memory would be 0, which a kernel of another library takes for a tensor's: on a
        # GPU, that ends the whole process's use of it.
        self._allow_unsafe_data_ptr_access = False
        self._read: dict[int, Number] = {}

    @contextmanager
    def reading(self) -> Iterator[dict[int, Number]]:
        """The numbers that torch reads in the context, by the ids of the tensors that it reads them from."""
        before, self._read = self._read, {}
        try:
            yield self._read
        finally:
            self._read = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                number = func(*args)
            self._read[id(args[0])] = number
            return number
        if not (args and isinstance(args[0], FakeTensor)) and _is_of_numbers(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs or {})
        if (kernel := KERNELS.get(func)) is not None:
            result = kernel(self, func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_of_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call computes from real 0-d tensors alone, as `min_val > max_val` in a torch function does."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return (
        bool(tensors)
        and not any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves)
        and not any(isinstance(t, FakeTensor) or t.dim() for t in tensors)
        and not func._schema.is_mutable
        and "empty" not in func._schema.name  # its numbers would be whatever lies in memory
        and torch.Tag.nondeterministic_seeded not in func.tags
    )


def with_numbers(arguments: Any, numbers: dict[int, Number]) -> Any:
    """A call's arguments with the numbers that torch read in the place of the tensors that hold them."""
    return map_aggregate(arguments, lambda a: numbers.get(id(a), a) if isinstance(a, torch.Tensor) else a)
