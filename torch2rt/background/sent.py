"""What a module was like when it was sent to a helper process, and whether it is like that still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torch2rt.recipes.contents import contents
from torch2rt.recipes.settings import differences, settings
from torch2rt.recipes.tensors import inner_tensors, named_tensors


class Watched:
    """Tells what of a module has changed, by the identity, address and write counter of its tensors.

    Neither a write through `.data` nor a step of a fused optimizer shows in these: `Sent` compares values.
    """

    def __init__(self, module: Any) -> None:
        self._weights = _marks(_tensors(module))

    def changed(self, module: Any) -> list[str]:
        """The names of what is another now."""
        return _differing(self._weights, _marks(_tensors(module)))


class Sent(Watched):
    """Tells what of a module differs from what a helper was given of it.

    Tensors are compared by value, wherever they are by now. A module's mode and its plain attributes, such as a number,
    belong to what was sent, too, but for those that its calls write to themselves (`written_by_calls`). `numbers` tells
    the memory of tensors by the identity of their storages, as `received` is given it.
    """

    def __init__(self, module: torch.nn.Module, numbers: Mapping[int, int]) -> None:
        tensors = _tensors(module)
        self._settings = _settings(module)
        self._places = {name: place for name, x in tensors.items() if (place := _place(x, numbers)) is not None}
        # Some, such as those of float8, were sent with the call itself, and so as they are now.
        self._contents = contents(
            {name: x for name, x in tensors.items() if _has_memory(x) and name not in self._places}
        )
        self._others = _marks({name: x for name, x in tensors.items() if not _has_memory(x)})
        self.written_by_calls: frozenset[str] = frozenset()

    def received(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Look at the memory that the helper was given."""
        made = {}
        for name, (number, dtype, *view) in self._places.items():
            made[name] = torch.empty(0, dtype=dtype).set_(storages[number], *view)
        self._contents |= contents(made)

    def changed(self, module: Any) -> list[str]:
        tensors = _tensors(module)
        now = {name: x for name, x in tensors.items() if _has_memory(x)}
        others = {name: x for name, x in tensors.items() if name not in now}
        names = [*_differing(self._contents, contents(now)), *_differing(self._others, _marks(others))]
        names += differences(self._settings, _settings(module))
        return sorted({name for name in names if not any(map(f"{name}.".startswith, self._ignored()))})

    def _ignored(self) -> list[str]:
        return [f"{name}." for name in self.written_by_calls]


@contextlib.contextmanager
def writes_of(module: torch.nn.Module) -> Iterator[list[str]]:
    """A list that has, after the context, the attributes of a module and its modules that were written to within.

    Parameters, buffers and modes are not among them. It is for a process of one thread, as it looks at all writes to
    attributes of modules: one that leaves the value as it was would be seen in no other way.
    """
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    paths = {id(each): f"{path}." if path else "" for path, each in module.named_modules()}
    before, set_attribute = settings(module), torch.nn.Module.__setattr__
    written: set[str] = set()
    found: list[str] = []

    def noted(owner: torch.nn.Module, name: str, value: Any) -> None:
        if id(owner) in paths and name != "training":
            written.add(paths[id(owner)] + name)
        set_attribute(owner, name, value)

    torch.nn.Module.__setattr__ = noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
    found += sorted({*written, *differences(before, settings(module))} - own)


def _tensors(module: Any) -> dict[str, torch.Tensor]:
    plain = getattr(module, "_orig_mod", module)
    return inner_tensors(named_tensors(plain)) if isinstance(plain, torch.nn.Module) else {}


def _settings(module: torch.nn.Module) -> dict[str, str]:
    plain = getattr(module, "_orig_mod", module)
    modes = {f"{path}.training".lstrip("."): str(each.training) for path, each in plain.named_modules()}
    return settings(plain) | modes


def _has_memory(tensor: torch.Tensor) -> bool:
    return (
        not is_lazy(tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )


def _place(tensor: torch.Tensor, numbers: Mapping[int, int]) -> tuple[Any, ...] | None:
    """Where a tensor's memory is among what was sent; `None` for one that was sent in another way."""
    if not _has_memory(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    if (number := numbers.get(tensor.untyped_storage()._cdata)) is None:
        return None
    return number, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _marks(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """What tells by and large whether tensors were written to: who they are, where, and torch's count of writes."""
    marks = {}
    for name, x in tensors.items():
        address = x.data_ptr() if _has_memory(x) else 0
        writes = -1 if is_lazy(x) or x.is_inference() else x._version
        marks[name] = (id(x), address, writes)
    return marks


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
