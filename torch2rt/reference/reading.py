"""What a TensorRT network is made of, read back from its definition: layers, loops and conditionals, and their tensors.

`NetworkReader` goes through the layers of an `INetworkDefinition` once. It finds the producer of each tensor, and the
scopes of each tensor: the loops and conditionals that the tensor is inside of. `evaluator.py` evaluates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2rt.backend.tensorrt import LOG, trt, type_of_layer
from torch2rt.errors import Torch2RTError
from torch2rt.reference.layers import LAYERS, dims, require, torch_type

# Layers at the border of a loop or a conditional, by their type: the class that has their attributes.

BOUNDARIES = {
    "TRIP_LIMIT": "ITripLimitLayer",
    "RECURRENCE": "IRecurrenceLayer",
    "ITERATOR": "IIteratorLayer",
    "LOOP_OUTPUT": "ILoopOutputLayer",
    "CONDITION": "IConditionLayer",
    "CONDITIONAL_OUTPUT": "IIfConditionalOutputLayer",
}


class Declared(NamedTuple):
    """The name, type and shape that TensorRT declares for a tensor; a size of -1 is known only when it runs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Declared:
        with LOG.capture() as log:
            try:
                shape = dims(tensor.shape)
            except RuntimeError:
                shape = None
        if shape is None:
            raise Torch2RTError(f"TensorRT has no shape for {tensor.name!r}: {log[0] if log else 'no reason given'}")
        return cls(tensor.name, torch_type(tensor.dtype), shape)

    def fits(self, value: Tensor) -> bool:
        known = [(d, n) for d, n in zip(self.shape, value.shape, strict=False) if d != -1]
        return value.dtype == self.dtype and value.ndim == len(self.shape) and all(d == n for d, n in known)

    def mismatch(self, value: Tensor) -> str:
        made, said = f"{value.dtype} {list(value.shape)}", f"{self.dtype} {list(self.shape)}"
        return f"{self.name!r} is {made}, TensorRT declares {said}"

    def check(self, value: Tensor) -> Tensor:
        if not self.fits(value):
            raise Torch2RTError(self.mismatch(value))
        return value


class Recurrence(NamedTuple):
    """A value that a loop carries along: it begins as `start`, and after each iteration it is `following`."""

    declared: Declared
    start: str
    following: str


class Iterator(NamedTuple):
    """A tensor of which each iteration of a loop reads one slice along an axis."""

    declared: Declared
    tensor: str
    axis: int
    reverse: bool


class LoopResult(NamedTuple):
    """A tensor that a loop returns: the last value of a recurrence, or the values of all iterations stacked."""

    declared: Declared
    source: str
    kind: str
    axis: int
    length: str | None


class BranchResult(NamedTuple):
    """A tensor that a conditional returns, and the tensor of each branch that it may be."""

    declared: Declared
    then: str
    other: str


@dataclass
class Layer:
    """A layer that computes tensors: `run` takes the tensors it reads and returns those it makes."""

    label: str
    reads: list[str | None]
    declared: list[Declared]
    run: Callable[..., Any]

    @property
    def makes(self) -> list[str]:
        return [d.name for d in self.declared]


@dataclass
class Assertion:
    """A layer that fails unless a condition holds. It makes no tensor: its label stands for one in a plan."""

    label: str
    reads: list[str | None]
    message: str

    @property
    def makes(self) -> list[str]:
        return [self.label]


@dataclass
class Loop:
    """A loop with all layers at its border. The layers inside are producers like others: see `NetworkReader.scopes`."""

    label: str
    count: str | None = None
    condition: str | None = None
    recurrences: list[Recurrence] = field(default_factory=list)
    iterators: list[Iterator] = field(default_factory=list)
    results: list[LoopResult] = field(default_factory=list)
    assertions: list[str] = field(default_factory=list)

    @property
    def makes(self) -> list[str]:
        return [r.declared.name for r in self.results]

    @property
    def state(self) -> list[str]:
        return [r.declared.name for r in self.recurrences]

    @property
    def slices(self) -> list[str]:
        return [i.declared.name for i in self.iterators]

    @property
    def before(self) -> list[str]:
        """The tensors that must be there when the loop starts."""
        lengths = (r.length for r in self.results)
        names = [self.count, *(r.start for r in self.recurrences), *(i.tensor for i in self.iterators), *lengths]
        return [name for name in names if name is not None]

    @property
    def body(self) -> list[str]:
        """The tensors that an iteration makes."""
        return [*(r.following for r in self.recurrences), *(r.source for r in self.results), *self.assertions]

    @property
    def reads(self) -> list[str | None]:
        return [*self.before, *self.body, self.condition]


@dataclass
class Conditional:
    """An if-else with all layers at its border."""

    label: str
    condition: str | None = None
    results: list[BranchResult] = field(default_factory=list)

    @property
    def makes(self) -> list[str]:
        return [r.declared.name for r in self.results]

    @property
    def branches(self) -> list[list[str]]:
        return [[r.then for r in self.results], [r.other for r in self.results]]

    @property
    def reads(self) -> list[str | None]:
        return [self.condition, *(name for branch in self.branches for name in branch)]


Producer = Layer | Assertion | Loop | Conditional


class NetworkReader:
    """The producers of a network's tensors.

    - `producers`: the layer, loop or conditional that makes each tensor, by the tensor's name.
    - `entries`: the tensors that a body or a branch starts from, with the name of their loop or conditional and what
      they read.
    - `assertions`: the labels of the assertions outside of loops; those inside belong to their loop.
    - `scopes`: the loops and conditionals that each tensor is inside of.

    `weights` goes before what the bindings read back, by layer index and role.
    """

    def __init__(self, network: Any, weights: Mapping[tuple[int, str], Tensor]) -> None:
        self.producers: dict[str, Producer] = {}
        self.loops: dict[str, Loop] = {}
        self.conditionals: dict[str, Conditional] = {}
        self.entries: dict[str, tuple[str, list[str | None]]] = {}
        self.assertions: list[str] = []
        roles: dict[int, dict[str, Tensor]] = {}
        for (index, role), value in weights.items():
            roles.setdefault(index, {})[role] = value
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            label = f"{layer.name} ({type_of_layer(layer).name})"
            try:
                self._read(layer, label, roles.get(i, {}))
            except Torch2RTError as error:
                raise Torch2RTError(f"{label}: {error}") from error
        self.scopes = self._scopes()
        self._place_assertions()

    def _read(self, layer: Any, label: str, stored: Mapping[str, Tensor]) -> None:
        kind = type_of_layer(layer).name
        reads = [t if t is None else t.name for t in map(layer.get_input, range(layer.num_inputs))]
        declared = [Declared.of(layer.get_output(i)) for i in range(layer.num_outputs)]
        if kind in BOUNDARIES:
            layer.__class__ = getattr(trt, BOUNDARIES[kind])
            if kind.startswith("CONDITION"):
                self._read_conditional(layer, reads, declared)
            else:
                self._read_loop(kind, layer, reads, declared)
        elif kind == "ASSERTION":
            layer.__class__ = trt.IAssertionLayer
            self.assertions.append(label)
            self._add(Assertion(label, reads, layer.message), [label])
        else:
            require(kind in LAYERS, "this layer type is not supported")
            require(getattr(layer, "num_ranks", 1) == 1, "layers over several devices are not supported")
            class_name, prepare = LAYERS[kind]
            layer.__class__ = getattr(trt, class_name)
            if kind == "CONDITIONAL_INPUT":
                self.entries[declared[0].name] = layer.conditional.name, reads
            made = Layer(label, reads, declared, prepare(layer, stored))
            self._add(made, made.makes)

    def _read_conditional(self, layer: Any, reads: Sequence[Any], declared: Sequence[Declared]) -> None:
        name = layer.conditional.name
        conditional = self.conditionals.setdefault(name, Conditional(name))
        if declared:
            conditional.results.append(BranchResult(declared[0], *reads))
            self._add(conditional, [declared[0].name])
        else:
            conditional.condition = reads[0]

    def _read_loop(self, kind: str, layer: Any, reads: Sequence[Any], declared: Sequence[Declared]) -> None:
        loop = self.loops.setdefault(layer.loop.name, Loop(layer.loop.name))
        if kind == "TRIP_LIMIT" and layer.kind.name == "COUNT":
            loop.count = reads[0]
        elif kind == "TRIP_LIMIT":
            loop.condition = reads[0]
        elif kind == "RECURRENCE":
            require(len(reads) == 2, "a recurrence without its second input")
            loop.recurrences.append(Recurrence(declared[0], *reads))
            self.entries[declared[0].name] = loop.label, list(reads)
        elif kind == "ITERATOR":
            loop.iterators.append(Iterator(declared[0], reads[0], layer.axis, layer.reverse))
            self.entries[declared[0].name] = loop.label, list(reads)
        else:
            name, length = layer.kind.name, reads[1] if len(reads) > 1 else None
            require((length is None) == (name == "LAST_VALUE"), f"{name} and the length do not go together")
            loop.results.append(LoopResult(declared[0], reads[0], name, layer.axis, length))
            self._add(loop, [declared[0].name])

    def _add(self, producer: Producer, names: Iterable[str]) -> None:
        for name in names:
            require(name not in self.producers, f"two tensors are called {name!r}")
            self.producers[name] = producer

    def _scopes(self) -> dict[str, frozenset[str]]:
        """The loops and conditionals that each tensor is inside of, because it depends on what starts them."""
        scopes: dict[str, frozenset[str]] = {}
        rows = [(name, frozenset([scope]), reads, "") for name, (scope, reads) in self.entries.items()]
        for name, producer in self.producers.items():
            if name not in self.entries:
                left = producer.label if isinstance(producer, (Loop, Conditional)) else ""
                rows.append((name, frozenset(), producer.reads, left))
        changed = bool(self.entries)
        while changed:
            changed = False
            for name, own, reads, left in rows:
                scope = own.union(*(scopes.get(read, ()) for read in reads if read is not None)) - {left}
                if scope != scopes.get(name, frozenset()):
                    scopes[name], changed = scope, True
        return scopes

    def _place_assertions(self) -> None:
        """An assertion that depends on a loop's iteration is checked in each of them."""
        inside = {name: self.scopes.get(name, frozenset()) for name in self.assertions}
        for name, scope in inside.items():
            if scope:
                inner = len(scope) == 1 and scope <= self.loops.keys()
                require(inner, f"{name}: assertions inside of {sorted(scope)} are not supported")
                self.loops[next(iter(scope))].assertions.append(name)
        self.assertions = [name for name, scope in inside.items() if not scope]
