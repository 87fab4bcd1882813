"""What tells the contents of tensors apart, computed where the tensors are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torch2rt.structure import as_bytes

CHUNK = 1 << 18  # numbers that are summed at a time
_MASK = (1 << 64) - 1

Content = tuple[torch.dtype, tuple[int, ...], int, int]


def contents(tensors: Mapping[str, torch.Tensor]) -> dict[str, Content]:
    """For each tensor its dtype, its shape, and two sums of its bits with weights that depend on their position.

    Any change of one number changes both sums; of others, one in 2**64 goes unnoticed. Each device is waited for once.

    >>> a = torch.tensor([1.0, 2.0])
    >>> contents({"a": a})["a"] == contents({"a": a.flip(0)})["a"]
    False
    """
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    factors: dict[torch.device, list[torch.Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            device = tensor.device
            if device not in factors:
                factors[device] = [_factors(device, seed) for seed in (1, 2)]
            sums.setdefault(device, {})[name] = _sums(tensor, factors[device])
        found = {}
        for each in sums.values():
            for name, (first, second) in zip(each, torch.stack(list(each.values())).tolist(), strict=True):
                found[name] = (tensors[name].dtype, tuple(tensors[name].shape), first, second)
    return {name: found[name] for name in tensors}


def _factors(device: torch.device, seed: int) -> torch.Tensor:
    """Odd factors for the positions of a chunk: an odd factor takes no two 64-bit numbers to one."""
    x = (torch.arange(CHUNK, device=device) + seed * CHUNK) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 31)) * _signed(0xBF58476D1CE4E5B9)
    return (x ^ (x >> 27)) | 1


def _sums(tensor: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    data = as_bytes(tensor)
    widths = (torch.int64, torch.int32) if data.storage_offset() % 8 == 0 else ()
    width = next((d for d in widths if data.numel() % d.itemsize == 0), torch.uint8)
    numbers, total = data.view(width), torch.zeros(2, dtype=torch.int64, device=data.device)
    for index, start in enumerate(range(0, numbers.numel(), CHUNK)):
        part = numbers[start : start + CHUNK].to(torch.int64)
        sums = torch.stack([(part * factor[: part.numel()]).sum() for factor in factors])
        total += sums * _signed(pow(0xD6E8FEB86659FD93, index + 1, 1 << 64))
    return total


def _signed(number: int) -> int:
    return number - (1 << 64) if number > _MASK >> 1 else number
