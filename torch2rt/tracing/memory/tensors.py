"""The tensors inside a value, and the memory that tensors share."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_leaves


def memory_of(tensor: torch.Tensor) -> int:
    """A number that tensors have in common if they share memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors and those inside of torch.vmap have no memory to show
        return -id(tensor)


def is_same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors look at the same memory in the same way."""
    return memory_of(a) == memory_of(b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


def tensor_versions(value: Any) -> list[int]:
    """torch's own write counters of the traced tensors in a call's arguments; those of inference mode have none."""
    return [t._version for t in tensors_in(value) if isinstance(t, FakeTensor) and not t.is_inference()]


def subclass_of(value: Any) -> type | None:
    """The class of a tensor that is made of others, as `torchao`'s quantised weights are; `None` for other values."""
    if (
        not issubclass(type(value), torch.Tensor)  # what stands for a tensor only says that it is one
        or type(value) in _PLAIN
        or isinstance(value, (FakeTensor, FunctionalTensor))
    ):
        return None
    return type(value) if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ else None


def subclass_among(value: Any) -> type | None:
    """`subclass_of` the first such tensor within a value."""
    return next((kind for leaf in tree_leaves(value) if (kind := subclass_of(leaf)) is not None), None)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_wrapped(value: Any) -> bool:
    """Whether this is a tensor of `torch.vmap` and the like around another one."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
