"""Objects among the inputs that a module changes, as transformers' decoders do with their caches."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch

from torch2rt.structure import is_object

Path = tuple[Any, ...]


def parts(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors and constants within an object, each with the attributes, indices and keys that lead to it."""
    items: Any
    if is_object(value):
        items = vars(value).items()
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from parts(item, (*path, key))


def kept_tensors(before: dict[Path, Any], after: dict[Path, Any]) -> set[Path]:
    """Where the same tensor is afterwards, which may have been written to."""
    return {path for path, x in before.items() if isinstance(x, torch.Tensor) and after.get(path) is x}


def has_changed(before: dict[Path, Any], after: dict[Path, Any]) -> bool:
    """Whether an object has other tensors or constants than before; writes to the tensors do not count."""
    if before.keys() != after.keys():
        return True
    is_same = lambda a, b: a is b or not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b  # noqa: E731
    return not all(is_same(value, after[path]) for path, value in before.items())


def overwrite(old: Any, new: Any, kept: Set[Path], path: Path = ()) -> Any:
    """Make `old` what `new` is, and return it, or `new` where it cannot be; tensors at `kept` places are written to."""
    if isinstance(new, torch.Tensor):
        if path not in kept or not isinstance(old, torch.Tensor):
            return new
        return old.copy_(new)
    if type(old) is not type(new):
        return new
    if is_object(new):
        values = {key: overwrite(vars(old).get(key), item, kept, (*path, key)) for key, item in vars(new).items()}
        vars(old).clear()
        vars(old).update(values)
        return old
    if isinstance(new, list):
        items = [overwrite(old[i] if i < len(old) else None, x, kept, (*path, i)) for i, x in enumerate(new)]
        old[:] = items
        return old
    if isinstance(new, dict):
        values = {key: overwrite(old.get(key), item, kept, (*path, key)) for key, item in new.items()}
        old.clear()
        old.update(values)
        return old
    return new
