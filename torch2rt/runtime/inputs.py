"""Which tensors an engine reads as they are, which have to be copied first, and which are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface

ALIGNMENT = 256  # bytes; TensorRT reads and writes no other addresses
SCRATCH_ALIGNMENT = 512  # the same of scratch memory; torch's begins at its multiples
LOWEST_ADDRESS = 1 << 32  # no GPU memory begins below; a tensor whose storage was freed seems to be at its offset


class Inputs:
    """The inputs of an engine on one GPU.

    A call looks at `dtypes`, `dense` (for each input a function that says whether a tensor lies in memory as the engine
    reads it) and `index` (of the GPU) by itself. Only a tensor that fails there is given to `usable`.
    """

    def __init__(self, interface: Interface, device: torch.device) -> None:
        self.interface, self.device, self.index = interface, device, device.index
        self.names = [spec.name for spec in interface.inputs]
        self.dtypes = [spec.dtype for spec in interface.inputs]
        self.dense = [_is_dense(spec.memory_format) for spec in interface.inputs]

    def check(self, tensors: Sequence[Any]) -> None:
        """Raise `InputError` for tensors that the engine does not take."""
        for position, tensor in enumerate(tensors):
            self.check_one(position, tensor)
        self.interface.check([tuple(tensor.shape) for tensor in tensors], self.dtypes)

    def check_one(self, position: int, tensor: Any) -> None:
        """Raise `InputError` for a tensor that the engine cannot read, whatever its shape."""
        spec = self.interface.inputs[position]
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, the engine takes {spec.describe()}.")
        if tensor.dtype != spec.dtype:
            raise InputError(
                f"Input '{spec.name}' is {tensor.dtype}, the engine takes {spec.dtype}: {spec.describe()}."
            )
        if tensor.device != self.device:
            raise InputError(f"Input '{spec.name}' is on {tensor.device}, the engine on {self.device}.")
        if tensor.numel() and not _has_memory(tensor):
            raise InputError(f"Input '{spec.name}' is {_kind(tensor)}, without memory to read.")

    def usable(self, position: int, tensor: Any) -> torch.Tensor:
        """An input as TensorRT can read it: dense, aligned, and not negated lazily; raises `InputError` otherwise."""
        self.check_one(position, tensor)
        tensor = tensor.detach().resolve_neg().contiguous(memory_format=self.interface.inputs[position].memory_format)
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _is_dense(memory_format: torch.memory_format) -> Callable[[torch.Tensor], bool]:
    """A function that says whether a tensor lies in memory as this format says, without gaps."""
    if memory_format is torch.contiguous_format:
        return torch.Tensor.is_contiguous  # a third of the host time of one with an argument
    return functools.partial(torch.Tensor.is_contiguous, memory_format=memory_format)


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:  # fake, or inside of torch.vmap
        return False


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of layout {value.layout} on {value.device}"
