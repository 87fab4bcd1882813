"""The weights of a network for other values of the module's parameters and buffers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from torch2rt.recipes.tape import Constant, Emit, Entry, Leaf, Op, Place, Read, Tape
from torch2rt.structure import as_bytes

Storages = dict[int, torch.UntypedStorage]


class Unreplayable(Exception):
    """The network is not the one of a module with these values; `names` are the parameters that it cannot follow."""

    def __init__(self, names: Iterable[str], reason: str) -> None:
        self.names, self.reason = sorted(names), reason
        super().__init__(f"{', '.join(self.names) or 'the module'}: {reason}")


@dataclasses.dataclass
class Recipes:
    """How the weights of one network are made of the module's tensors.

    `weights` are the network's own copies, by the number that the tape gave them. `places` says where the tensors of
    the module were, by name: what they are refitted with must have the same shape and dtype.
    """

    entries: list[Entry]
    leaves: dict[int, Leaf]
    constants: dict[int, Constant]
    weights: dict[int, torch.Tensor]
    outside: list[torch.Tensor] = dataclasses.field(default_factory=list)  # that were seen, and are not the module's
    unsure: set[int] = dataclasses.field(default_factory=set)  # weights that a replay did not give again

    @classmethod
    def of(cls, tape: Tape, weights: Mapping[int, torch.Tensor]) -> Recipes:
        """What these weights need of a tape, and all that Python has read of the module's values."""
        slots = {slot for entry in tape.entries for slot in entry.reads} & tape.leaves.keys()
        depends = _dependencies(tape.entries, slots)
        ends = [
            entry
            for entry, on in zip(tape.entries, depends, strict=True)
            if isinstance(entry, Read)
            and on
            or isinstance(entry, Emit)
            and entry.number in weights
            and (on or tape.is_outside(entry.place.slot))
        ]
        entries = _needed(tape.entries, ends)
        used = {slot for entry in entries for slot in entry.reads | entry.writes}
        return cls(
            entries,
            {slot: leaf for slot, leaf in tape.leaves.items() if slot in used},
            {slot: constant for slot, constant in tape.constants.items() if slot in used},
            dict(weights),
            list(tape.outside.values()),
        )

    @property
    def places(self) -> dict[str, Place]:
        """The module's tensors that the network depends on, by name, and what they were."""
        return {name: place for leaf in self.leaves.values() for name, place in leaf.named.items()}

    def with_tied(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, and those that were the same memory as one of them, of which a state dict may have one."""
        found = dict(values)
        for leaf in self.leaves.values():
            given = {place: values[name] for name, place in leaf.named.items() if name in values}
            found |= {n: given[place] for n, place in leaf.named.items() if n not in values and place in given}
        return found

    @property
    def reads(self) -> list[Read]:
        """What Python has read of the module's values while the network was made."""
        return [entry for entry in self.entries if isinstance(entry, Read)]

    def check(self, values: Mapping[str, torch.Tensor]) -> None:
        """Note which weights a replay does not give again, bit for bit, of the values that the network was made of."""
        try:
            again = self.replay(values, values.keys(), as_recorded=True)
        except Unreplayable:
            again = {}
        self.unsure = {
            number
            for number, weight in self.weights.items()
            if number not in again and self._made_of(number) or number in again and not _is_same(again[number], weight)
        }

    def _made_of(self, number: int) -> set[int]:
        """The leaves that a weight depends on."""
        depends = _dependencies(self.entries, self.leaves)
        found = (on for e, on in zip(self.entries, depends, strict=True) if isinstance(e, Emit) and e.number == number)
        return {leaf for on in found for leaf in on}

    def needed(self, changed: Iterable[str]) -> set[str]:
        """The names of the tensors whose values it takes to refit what depends on the changed ones."""
        entries = self._affected(self._slots(changed))
        used = {slot for entry in entries for slot in entry.reads}
        return {name for slot, leaf in self.leaves.items() if slot in used for name in leaf.named}

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(
        self,
        values: Mapping[str, torch.Tensor],
        changed: Iterable[str],
        device: torch.device | None = None,
        as_recorded: bool = False,
    ) -> dict[int, torch.Tensor]:
        """The weights that depend on the changed tensors, by number.

        `values` has the tensors of `needed(changed)`. They are computed on `device`, by default that of the changed
        tensors; `as_recorded` computes where the network's own were computed. Raises `Unreplayable` for tensors of
        other shapes or dtypes, and where Python has read a value that is another one now.
        """
        slots = self._slots(changed)
        if device is None and not as_recorded:
            devices = {values[name].device for slot in slots for name in self.leaves[slot].named}
            device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        entries = self._affected(slots)
        run = _Run(self, values, device, entries)
        made: dict[int, torch.Tensor] = {}
        for position, entry in enumerate(entries):
            if isinstance(entry, Op):
                run.op(entry)
            elif isinstance(entry, Read):
                run.read(entry)
            elif entry.number in self.unsure:
                names = {name for slot in self._made_of(entry.number) for name in self.leaves[slot].named}
                raise Unreplayable(names, "a weight that is made of it could not be made again")
            else:
                made[entry.number] = run.tensor(entry.place).contiguous().clone()
            run.forget(position)
        return made

    def _slots(self, names: Iterable[str]) -> set[int]:
        names = set(names)
        return {slot for slot, leaf in self.leaves.items() if names & leaf.named.keys()}

    def _affected(self, slots: set[int]) -> list[Entry]:
        """The entries that it takes to make the weights, and read the values, that depend on some of the leaves."""
        depends = _dependencies(self.entries, slots)
        ends = [e for e, on in zip(self.entries, depends, strict=True) if on and not isinstance(e, Op)]
        return _needed(self.entries, ends)

    def names_of(self, slots: Iterable[int]) -> set[str]:
        """The names of the module's tensors that some memory on the tape depends on."""
        origin: dict[int, set[int]] = {slot: {slot} for slot in self.leaves}
        for entry in self.entries:
            on = set().union(*(origin.get(slot, set()) for slot in entry.reads))
            for slot in entry.writes:
                origin[slot] = origin.get(slot, set()) | on
        return {name for slot in slots for leaf in origin.get(slot, ()) for name in self.leaves[leaf].named}


class _Run:
    """One replay: the memory of each slot so far."""

    def __init__(
        self, recipes: Recipes, values: Mapping[str, torch.Tensor], device: torch.device | None, entries: list[Entry]
    ) -> None:
        self.recipes, self.values, self.device = recipes, values, device
        self.storages: Storages = {}
        self.written = {slot for entry in entries if isinstance(entry, Op) for slot in entry.writes}
        last = {slot: position for position, entry in enumerate(entries) for slot in entry.reads | entry.writes}
        self.done: dict[int, list[int]] = {}
        for slot, position in last.items():
            self.done.setdefault(position, []).append(slot)

    def forget(self, position: int) -> None:
        """Let go of memory that no later entry needs."""
        for slot in self.done.get(position, ()):
            self.storages.pop(slot, None)

    def tensor(self, place: Place) -> torch.Tensor:
        if (storage := self.storages.get(place.slot)) is None:
            storage = self.storages[place.slot] = self._leaf_or_constant(place.slot)
        tensor = torch.empty(0, dtype=place.dtype, device=storage.device)
        tensor.set_(storage, place.offset, place.shape, place.stride)  # type: ignore[call-overload]
        tensor = torch._conj(tensor) if place.conjugated else tensor
        return torch._neg_view(tensor) if place.negated else tensor

    def _leaf_or_constant(self, slot: int) -> torch.UntypedStorage:
        if (constant := self.recipes.constants.get(slot)) is not None:
            content = constant.content
            moved = content if self.device is None else _bytes(content).to(self.device).untyped_storage()
            return moved.clone() if slot in self.written else moved
        leaf = self.recipes.leaves[slot]
        given = {name: self.values[name].detach() for name in leaf.named}
        for name, value in given.items():
            place = leaf.named[name]
            if tuple(value.shape) != place.shape or value.dtype != place.dtype:
                was, now = f"{place.dtype} {place.shape}", f"{value.dtype} {tuple(value.shape)}"
                raise Unreplayable([name], f"it was {was}, and is {now}")
        (name, place), value = next(iter(leaf.named.items())), next(iter(given.values()))
        if self.device is not None:
            value = value.to(self.device)
        is_whole = value.untyped_storage().nbytes() == leaf.bytes and Place.of(value, slot) == place
        if len(given) == 1 and is_whole and slot not in self.written:
            return value.untyped_storage()
        whole = torch.empty(leaf.bytes, dtype=torch.uint8, device=value.device).untyped_storage()
        parts = {}
        for name, value in given.items():
            place = leaf.named[name]
            parts[name] = torch.empty(0, dtype=place.dtype, device=whole.device)
            parts[name].set_(whole, place.offset, place.shape, place.stride)  # type: ignore[call-overload]
            parts[name].copy_(value)
        if len(parts) > 1 and not all(_is_same(part, given[name]) for name, part in parts.items()):
            raise Unreplayable(parts, "they were the same memory, and have other values now")
        return whole

    def _arguments(self, entry: Op | Read) -> Any:
        def value(item: Any) -> Any:
            if isinstance(item, Place):
                return self.tensor(item)
            return self.device if isinstance(item, torch.device) and self.device is not None else item

        return tree_map(value, (entry.args, entry.kwargs), is_leaf=lambda x: isinstance(x, Place))

    def op(self, entry: Op) -> None:
        if entry.is_final:
            raise Unreplayable(self.recipes.names_of(entry.reads), f"{entry.func} is not run again")
        args, kwargs = self._arguments(entry)
        try:
            out = entry.func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            names = self.recipes.names_of(entry.reads)
            raise Unreplayable(names, f"{entry.func} failed ({error})") from error
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor, place in zip(made, entry.out, strict=True):
            if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
                names = self.recipes.names_of(entry.reads)
                raise Unreplayable(names, f"{entry.func} gives {tuple(tensor.shape)} and not {place.shape}")
            if place.slot in self.storages:
                continue  # it was written to
            if (tensor.stride(), tensor.storage_offset()) != (place.stride, place.offset):
                like = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=tensor.device)
                size = like.untyped_storage().nbytes() + place.offset * like.element_size()
                whole = torch.empty(size, dtype=torch.uint8, device=tensor.device).untyped_storage()
                tensor = like.set_(whole, place.offset, place.shape, place.stride).copy_(tensor)  # type: ignore[call-overload]
            self.storages[place.slot] = tensor.untyped_storage()

    def read(self, entry: Read) -> None:
        args, kwargs = self._arguments(entry)
        if not _equal(now := entry.func(*args, **kwargs), entry.value):
            text = f": it was {entry.value}, and is {now}" if isinstance(now, (bool, int, float)) else ""
            raise Unreplayable(self.recipes.names_of(entry.reads), f"Python has read its value ({entry.what}){text}")


def _needed(entries: list[Entry], ends: Iterable[Entry]) -> list[Entry]:
    """The entries that it takes for some of them, in order."""
    wanted = set(map(id, ends))
    slots: set[int] = set()
    kept = []
    for entry in reversed(entries):
        if id(entry) in wanted or isinstance(entry, Op) and entry.writes & slots:
            kept.append(entry)
            slots |= entry.reads
    return kept[::-1]


def _dependencies(entries: list[Entry], leaves: Iterable[int]) -> list[frozenset[int]]:
    """The leaves, of these, that each entry depends on."""
    origin: dict[int, frozenset[int]] = {slot: frozenset({slot}) for slot in leaves}
    nothing: frozenset[int] = frozenset()
    found = []
    for entry in entries:
        on = nothing.union(*(origin.get(slot, nothing) for slot in entry.reads))
        for slot in entry.writes if on else ():
            origin[slot] = origin.get(slot, nothing) | on
        found.append(on)
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and bool(a == b)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    return torch.equal(as_bytes(a), as_bytes(b) if a.device == b.device else as_bytes(b).to(a.device))


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
