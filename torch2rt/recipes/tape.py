"""A record of all that is computed from a module's parameters and buffers while a thread traces and lowers it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from torch2rt.recipes.tensors import inner_of, named_tensors
from torch2rt.structure import as_bytes

# What gives the values of a tensor to Python, or to others, without an operator.
_READS = ("numpy", "tolist", "__array__", "__dlpack__", "__deepcopy__", "__reduce_ex__")
READS = frozenset(getattr(torch.Tensor, name) for name in _READS)
FACTS = frozenset({"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size", "is_contiguous"})


class Place(NamedTuple):
    """Where in which memory a tensor is: `slot` is the number of the memory on the tape."""

    slot: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    @classmethod
    def of(cls, tensor: torch.Tensor, slot: int) -> Place:
        flags = tensor.is_conj(), tensor.is_neg()
        return cls(slot, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), *flags)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The memory of parameters, buffers and attributes of the module, by name: several where they share it."""

    bytes: int
    named: dict[str, Place]


@dataclasses.dataclass(frozen=True)
class Constant:
    """Memory that no parameter had a part in, as it was when it was first met."""

    content: torch.UntypedStorage
    outside: torch.Tensor | None  # the tensor, if it was there before the trace: it may have changed since


@dataclasses.dataclass(frozen=True)
class Op:
    """One call of an operator, with `Place`s for tensors in its arguments; `out` are those of its results."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[Place, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    is_final: bool = False  # it cannot be made again, as it draws random numbers or changes how memory is used


@dataclasses.dataclass(frozen=True)
class Read:
    """A value that Python has seen: the network is as it is because of it.

    `func` gives it, from `args` with tensors in place of `Place`s; `value` is what it was. `what` names the call.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any
    what: str
    reads: frozenset[int]
    writes: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Emit:
    """A weight of a network, as it is at this point of the tape."""

    number: int
    place: Place
    reads: frozenset[int]
    writes: frozenset[int] = frozenset()


Entry = Op | Read | Emit


class Tape:
    """What a thread computes from a module's tensors, in the context `recording()`.

    - `leaves`, `constants`: memory that no operator on the tape has made, by its number. `entries`: the rest, in order.

    A tensor is known by its memory, so views need no entries. Operators on tensors that have nothing to do with the
    module's are not recorded: their results are constants.

    >>> linear = torch.nn.Linear(3, 5)
    >>> tape = Tape(linear)
    >>> with tape.recording(), torch.no_grad():
    ...     number, place = tape.weight(linear.weight.t() * 2)
    >>> [type(entry).__name__ for entry in tape.entries]
    ['Op', 'Emit']
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.leaves: dict[int, Leaf] = {}
        self.constants: dict[int, Constant] = {}
        self.entries: list[Entry] = []
        self.count = self.weights = 0
        self.paused = 0
        self._slots: dict[int, tuple[StorageWeakRef, int]] = {}
        self._made: dict[int, StorageWeakRef] = {}  # memory of the trace's own
        self._of_leaves: set[int] = set()
        self.unknown: set[str] = set()  # what the tape cannot follow, such as sparse tensors
        self.outside: dict[int, torch.Tensor] = {}  # that were there before the trace, and are not the module's
        for name, tensor in named_tensors(module).items():
            for path, inner in inner_of(name, tensor):
                if not _is_plain(inner) or inner.is_meta or inner.is_inference():
                    self.unknown.add(path)
                    continue
                slot = self._slot(inner)
                if slot is None:
                    slot = self._new_slot(inner)
                    self.leaves[slot] = Leaf(inner.untyped_storage().nbytes(), {})
                self.leaves[slot].named[path] = Place.of(inner, slot)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Tape]:
        """Write down what this thread computes."""
        with _Operators(self), _Functions(self):
            yield self

    def weight(self, tensor: torch.Tensor) -> tuple[int, Place]:
        """Note a weight of a network; returns its number and its place."""
        place = self._place(tensor)
        self.entries.append(Emit(self.weights, place, frozenset({place.slot})))
        self.weights += 1
        return self.weights - 1, place

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is on the tape."""
        return tensor.layout is torch.strided and self._slot(tensor) is not None

    def is_of_module(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is the module's, or was made of it."""
        slot = self._slot(tensor) if tensor.layout is torch.strided else None
        return slot is not None and (slot in self.leaves or slot in self._of_leaves)

    def is_outside(self, slot: int) -> bool:
        """Whether some memory was there before the trace, and is not the module's."""
        return slot in self.constants and self.constants[slot].outside is not None

    # Memory ----------------------------------------------------------------------------------------------------------

    def _slot(self, tensor: torch.Tensor) -> int | None:
        known = self._slots.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def _new_slot(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        self._slots[storage._cdata] = StorageWeakRef(storage), self.count  # no other storage has its address, then
        self.count += 1
        return self.count - 1

    def _place(self, tensor: torch.Tensor) -> Place:
        """Where a tensor is; memory that is not known yet becomes a constant."""
        if (slot := self._slot(tensor)) is None:
            slot, storage = self._new_slot(tensor), tensor.untyped_storage()
            outside = None if storage._cdata in self._made else tensor.detach()
            self._note_outside(tensor)
            with unrecorded():
                self.constants[slot] = Constant(storage.clone(), outside)
        return Place.of(tensor, slot)

    def _note_outside(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._made and key not in self._slots and not tensor.is_inference():
            self.outside.setdefault(key, tensor)  # itself: what `detach` gives here counts writes of its own

    # What happens ----------------------------------------------------------------------------------------------------

    def note(self, func: Any, args: Any, kwargs: Any, out: Any, before: list[tuple[torch.Tensor, int | None]]) -> None:
        """Write down a call of an operator; `before` are the tensors in its arguments, with their slots before it."""
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func is not torch.ops.aten.lift_fresh.default:  # what `torch.tensor` has just made
            for tensor, slot in before:
                if slot is None and _is_plain(tensor):
                    self._note_outside(tensor)
        if not any(slot is not None for _, slot in before):
            for tensor in made:
                if tensor.layout is torch.strided:
                    storage = tensor.untyped_storage()
                    if self._slot(tensor) is None and storage._cdata not in self._made:
                        if not any(x.layout is torch.strided and _shares(x, storage) for x, _ in before):
                            self._made[storage._cdata] = StorageWeakRef(storage)
            return
        name = func._schema.name.partition("::")[2]
        if name in FACTS or name.startswith("prim"):
            return
        if not all(map(_is_plain, (*(x for x, _ in before), *made))):
            self.read(_digests, ([x for x, _ in before if _is_plain(x)],), {}, func.__name__)
            for tensor in filter(_is_plain, made):
                if self._slot(tensor) is None:
                    self._made[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
            return
        if not made and not func._schema.is_mutable:
            self._append_read(func, args, kwargs, out, func.__name__)
            return
        if not func._schema.is_mutable and all(self._slot(tensor) is not None for tensor in made):
            return  # views
        places = tree_map_only(torch.Tensor, self._place, (tuple(args), dict(kwargs)))
        reads = _slots_in(places)
        written = frozenset(self._place(x).slot for x in _written(func, args, kwargs))
        for tensor in made:
            if self._slot(tensor) is None:
                self._new_slot(tensor)
        out_places = tuple(Place.of(tensor, self._slot(tensor) or 0) for tensor in made)
        new = frozenset(place.slot for place in out_places) - reads
        if any(slot in self.leaves or slot in self._of_leaves for slot in reads):
            self._of_leaves |= written | new
        self.entries.append(Op(func, places[0], places[1], out_places, reads, written | new, _is_final(func)))

    def read(self, func: Any, args: Any, kwargs: Any, what: str) -> None:
        """Write down that Python sees something of the values of tensors."""
        with unrecorded():
            self._append_read(func, args, kwargs, func(*args, **kwargs), what)

    def _append_read(self, func: Any, args: Any, kwargs: Any, value: Any, what: str) -> None:
        places = tree_map_only(torch.Tensor, self._place, (tuple(args), dict(kwargs)))
        self.entries.append(Read(func, places[0], places[1], value, what, _slots_in(places)))


class _Operators(TorchDispatchMode):
    """Shows a tape every operator that runs on real tensors."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape, kwargs = self.tape, kwargs or {}
        if tape.paused:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(is_traceable_wrapper_subclass(x) for x in tensors):
            return NotImplemented  # the tensors inside come next
        if any(isinstance(x, FakeTensor) or x.is_meta for x in tensors):
            return func(*args, **kwargs)
        before = [(x, tape._slot(x) if x.layout is torch.strided else None) for x in tensors]
        out = func(*args, **kwargs)
        if not any(isinstance(x, FakeTensor) for x in tree_leaves(out)):
            tape.note(func, args, kwargs, out, before)
        return out


class _Functions(TorchFunctionMode):
    """Shows a tape what reads tensors past all operators."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and not self.tape.paused:
            tensor = args[0]
            is_real = not isinstance(tensor, FakeTensor) and not is_traceable_wrapper_subclass(tensor)
            if is_real and not tensor.is_meta and self.tape.is_known(tensor):
                self.tape.read(_digests, ([tensor],), {}, func.__name__)
        return func(*args, **kwargs or {})


def recording(tape: Tape | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which a tape, if there is one, records what this thread computes."""
    return contextlib.nullcontext() if tape is None else tape.recording()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """A context for choices that stay as they are when parameters change, such as the ranges of a calibration.

    No tape of this thread records what happens in it.
    """
    tapes = [mode.tape for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Operators)]
    for tape in tapes:
        tape.paused += 1
    try:
        yield
    finally:
        for tape in tapes:
            tape.paused -= 1


def _shares(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    return tensor.untyped_storage()._cdata == storage._cdata


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in one memory by its strides."""
    return tensor.layout is torch.strided and not tensor.is_quantized


def _is_final(func: Any) -> bool:
    """Whether an operator cannot be run again: it draws random numbers, or changes how memory is used."""
    name = func._schema.name.partition("::")[2]
    return torch.Tag.nondeterministic_seeded in func.tags or name.startswith(("resize_", "set_", "record_stream"))


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors in a call's arguments that it writes to."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    return found


def _slots_in(places: Any) -> frozenset[int]:
    leaves = tree_leaves(places, is_leaf=lambda x: isinstance(x, Place))
    return frozenset(leaf.slot for leaf in leaves if isinstance(leaf, Place))


def _digests(tensors: list[torch.Tensor]) -> tuple[str, ...]:
    """What tells the values of tensors from others."""
    return tuple(map(digest, tensors))


def digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's elements, dtype and shape."""
    data = as_bytes(tensor).cpu()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + data.numpy().tobytes()).hexdigest()
