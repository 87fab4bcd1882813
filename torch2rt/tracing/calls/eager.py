"""Calls that eager torch refuses, although its fake kernels, which a trace runs, take them.

Some fake kernels check less than the real ones. `F.linear` of a half tensor and float weights has a fake result, and so
has an interpolation to size 0. So the real kernels are asked, too: after a trace each kind of call is run once on small
tensors of zeros, of the dtypes that the trace saw and the smallest sizes that the engine serves.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from torch2rt.callables import Target, qualified_name
from torch2rt.graph import Decision
from torch2rt.sizes import evaluate, expression, is_symbolic
from torch2rt.structure import bare_name
from torch2rt.tracing.calls.in_place import out_of_place
from torch2rt.tracing.memory.storages import Storages
from torch2rt.tracing.recorder import Recorder
from torch2rt.tracing.sizes.guards import Decisions

Sizes = Mapping[sympy.Symbol, int]

SMALL = 8  # sizes below are those with which a call is tried
KEPT = 64  # elements of a constant that is given as it is, as its values may be indices or numbers of elements
FEW = 1 << 16  # elements of a call with several tensors, which may multiply them
MANY = 1 << 20  # elements of a call with one tensor
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
OWN_MEMORY = ("as_strided", "set_", "resize_", "storage", "data_ptr", "cuda")  # which depend on more than sizes
NOT_REFUSALS = tuple(
    error for name in ("OutOfMemoryError", "AcceleratorError") if (error := getattr(torch, name, None)) is not None
)


@dataclasses.dataclass(frozen=True)
class Operand:
    """The type of a tensor of a call.

    `value` is a small constant, which is given as it is; two of them are one operand if they are one object.
    """

    sizes: tuple[Any, ...]  # ints, and expressions where dynamic
    dtype: torch.dtype
    constant: int | None = None
    value: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    node: torch.fx.Node | None = dataclasses.field(default=None, compare=False)  # if it depends on the inputs

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(_at(size, sizes) for size in self.sizes)

    def show(self, sizes: Sizes) -> str:
        return f"{bare_name(self.dtype)}{list(self.shape(sizes))}"


@dataclasses.dataclass(frozen=True)
class RecordedCall:
    """One call as the module made it; two are equal if torch treats them alike."""

    func: Target
    arguments: Any
    name: str = dataclasses.field(compare=False)  # as the user's code has it
    place: str = dataclasses.field(compare=False)
    writes: bool = dataclasses.field(compare=False)

    @property
    def operands(self) -> list[Operand]:
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Operand)]

    @property
    def mixes_types(self) -> bool:
        """Whether its tensors are of several types of real or complex numbers."""
        return len({x.dtype for x in self.operands if x.dtype.is_floating_point or x.dtype.is_complex}) > 1


class EagerCalls:
    """The calls of one trace that real kernels have yet to be asked about."""

    def __init__(self, recorder: Recorder, storages: Storages) -> None:
        self.recorder, self.storages = recorder, storages
        self.calls: dict[RecordedCall, RecordedCall] = {}

    def describe(self, func: Target, args: Any, kwargs: Any) -> RecordedCall | None:
        """A call before it is made; `None` if it is none to ask about."""
        if not _is_torchs(func) or any(name in getattr(func, "__name__", "") for name in OWN_MEMORY):
            return None
        writes = out_of_place(func, args, kwargs)[0] is not None or func is torch.Tensor.__setitem__
        try:
            call = RecordedCall(func, self._described((args, kwargs)), "", "", writes)
        except TypeError:  # an argument that is no data
            return None
        if call in self.calls or _counts_values(call):
            return None
        name = qualified_name(next(iter(self.recorder.open_calls), func))
        return dataclasses.replace(call, name=name, place=self.recorder.location.here())

    def note(self, call: RecordedCall) -> None:
        """Ask about a call that torch's fake kernels have taken."""
        self.calls.setdefault(call, call)

    def _described(self, value: Any) -> Any:
        """Arguments as data that can be hashed, in which types stand for tensors."""
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) or value.layout is not torch.strided:
                raise TypeError
            sizes = tuple(self._described(size) if is_symbolic(size) else size for size in value.shape)
            if not isinstance(value, FakeTensor) and value.numel() <= KEPT:
                return Operand(sizes, value.dtype, id(value), value)
            return Operand(sizes, value.dtype, node=self.storages.last_node(value))
        if is_symbolic(value):
            if not expression(value).free_symbols <= self.recorder.symbols.keys():
                raise TypeError
            return expression(value)
        if isinstance(value, (tuple, list)):
            return "list" if isinstance(value, list) else "tuple", *map(self._described, value)
        if isinstance(value, dict):
            return "dict", *((key, self._described(item)) for key, item in value.items())
        if isinstance(value, slice):
            return "slice", *map(self._described, (value.start, value.stop, value.step))
        if value is None or value is ... or isinstance(value, PLAIN):
            return "value", value, type(value)  # as 1, 1.0 and True are equal
        raise TypeError

    def refusal(self, sizes: Sizes) -> tuple[RecordedCall, Exception] | None:
        """The first call that a real kernel refuses with inputs of these sizes, and its error."""
        with torch.random.fork_rng([]), torch.no_grad():
            return next(((call, error) for call in self.calls if (error := _error(call, sizes)) is not None), None)

    def refusals_of_small(self, decisions: Decisions) -> Iterator[Decision]:
        """The claims that sizes are large enough, where real kernels refuse small ones: fake kernels often do not.

        Sizes of the inputs themselves are not asked about: the smallest that are served are those of `refusal`.
        """
        known: dict[tuple[sympy.Basic, int], Sizes | None] = {}

        def at(size: sympy.Basic, value: int) -> Sizes | None:
            if (size, value) not in known:
                known[size, value] = decisions.sizes_where(sympy.Eq(size, value))
            return known[size, value]

        with torch.random.fork_rng([]), torch.no_grad():
            for call in self.calls:
                sizes = {size for operand in call.operands for size in operand.sizes if isinstance(size, sympy.Basic)}
                sizes |= {size for size in tree_leaves(call.arguments) if isinstance(size, sympy.Basic)}
                for size in sorted(sizes, key=str):
                    if size.is_Atom or not size.is_integer or not decisions.may_be_below(size, SMALL):
                        continue
                    if (refused := _most_refused(call, lambda value: at(size, value))) is not None:  # noqa: B023
                        yield Decision(sympy.Ge(size, refused + 1), call.place, False)


def _most_refused(call: RecordedCall, at: Callable[[int], Sizes | None]) -> int | None:
    """The largest of a call's small sizes with which a real kernel refuses it, and all smaller ones; `None` if none."""
    refused = None
    for value in range(SMALL):
        sizes = at(value)
        if sizes is not None and _error(call, sizes) is None:
            break
        refused = refused if sizes is None else value
    return refused


def _error(call: RecordedCall, sizes: Sizes) -> Exception | None:
    """What a real kernel says against a call, whatever the values of its tensors."""
    operands = call.operands
    elements = sum(math.prod(x.shape(sizes)) for x in operands)
    is_small = elements <= (MANY if sum(len(x.sizes) > 1 for x in operands) < 2 else FEW)
    if not is_small and not call.mixes_types:
        return None
    dense = is_small or call.writes
    for fill in (0, 1, None):  # of indices and divisors, one may be wrong, and a matrix of one number is singular
        if (error := _run(call, sizes, fill, dense)) is None:
            return None
    if is_small or _run(call, sizes, 0, dense, torch.float32) is None:
        return error
    return None  # perhaps for the strides of large tensors, which are one element expanded


def _run(
    call: RecordedCall, sizes: Sizes, fill: int | None, dense: bool, dtype: torch.dtype | None = None
) -> Exception | None:
    """The error of a real run on tensors of one number, or of drawn ones; `dtype` replaces every type of real numbers.

    It runs on the CPU whatever the call's device: an index that is out of range there is an error, and on a GPU it is
    the end of all work of the process. What the CPU alone has no kernel for is not refused.
    """

    def given(value: Any) -> Any:
        if isinstance(value, Operand):
            if value.value is not None and dtype is None:
                return value.value.detach().cpu().clone()
            kind = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
            shape = value.shape(sizes) if dense else ()
            if fill is None:
                return torch.rand(shape).mul_(2).to(kind).expand(value.shape(sizes))
            return torch.full(shape, fill, dtype=kind).expand(value.shape(sizes))
        if isinstance(value, sympy.Basic):
            return _at(value, sizes)
        if not isinstance(value, tuple):
            return value
        kind, *items = value
        if kind == "dict":
            return {key: given(item) for key, item in items}
        if kind == "slice":
            return slice(*map(given, items))
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(map(given, items))
        return "cpu" if _is_device(items[0]) else items[0]

    try:
        args, kwargs = given(call.arguments)
        call.func(*args, **kwargs)
    except (torch.linalg.LinAlgError, *NOT_REFUSALS):
        return None  # a matter of values, or of the device
    except NotImplementedError as error:  # mostly of kernels that other devices have
        return error if "not supported" in str(error) and not re.search("CPU|CUDA|backend", str(error)) else None
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        is_index = re.search("out of .*(bounds|range)", str(error))
        if is_index and not any(0 in operand.shape(sizes) for operand in call.operands):
            return None  # an index that the converter checks; in an empty tensor there is none
        return error
    return None


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or isinstance(value, str) and bool(re.fullmatch(r"cuda(:\d+)?", value))


def _counts_values(call: RecordedCall) -> bool:
    """Whether the sizes that fit depend on values: on repeats, or on how many values of a mask are true."""
    name = getattr(call.func, "__name__", "")
    if "repeat_interleave" in name:
        return True
    is_indexing = any(part in name for part in ("index", "item__"))
    return is_indexing and any(x.dtype in (torch.bool, torch.uint8) and x.value is None for x in call.operands)


def _at(size: Any, sizes: Sizes) -> Any:
    return evaluate(size, sizes) if isinstance(size, sympy.Basic) else size


def _is_torchs(func: Callable[..., Any]) -> bool:
    """Whether a function is torch's own, so that running it does nothing else."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace in ("aten", "prims")
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.startswith(("aten::", "prims::"))
    if isinstance(func, torch._ops.HigherOrderOperator):
        return False
    return qualified_name(func).startswith("torch.")
