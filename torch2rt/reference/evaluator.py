"""A TensorRT network evaluated with torch, layer by layer: the oracle where there is no GPU, the debugger where one is.

`Evaluator` reads a network once and makes a plan: the layers that the outputs need, in an order that works. A loop or a
conditional is one step of its plan and has plans of its own, for its body or its branches, that start from the values
they take from outside. What does not depend on a loop's iteration is outside of it; what only a branch needs is inside.
Every result is held against the type and shape that TensorRT declares.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch2rt.backend.tensorrt import LOG, trt
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.reference.layers import LAYERS, dims, require, torch_type

Values = dict[str, Tensor]
Compute = Callable[[Sequence[Any], torch.device], Sequence[Tensor]]

BOUNDARIES = {
    "TRIP_LIMIT": "ITripLimitLayer",
    "RECURRENCE": "IRecurrenceLayer",
    "ITERATOR": "IIteratorLayer",
    "LOOP_OUTPUT": "ILoopOutputLayer",
    "CONDITION": "IConditionLayer",
    "CONDITIONAL_OUTPUT": "IIfConditionalOutputLayer",
}


def evaluate(
    network: Any, inputs: Mapping[str, Tensor], weights: Mapping[tuple[int, str], Tensor] | None = None
) -> Values:
    """The marked outputs of an `INetworkDefinition`, by name. For several calls, keep an `Evaluator`."""
    return Evaluator(network, weights)(inputs)


class Evaluator:
    """A network made ready to be evaluated with torch, on the device of the inputs.

    `weights` goes before what the bindings read back, by layer index and role ("weights" of a constant, "kernel",
    "bias", "scale", "shift", "power"); bfloat16, fp8 and int4 cannot be read back. The network is kept alive. `also`
    are names of tensors within the network that are to be among the results beside its outputs.

    >>> Evaluator(network)({"x": torch.randn(2, 3)})  # doctest: +SKIP
    {'y': tensor(...)}
    """

    def __init__(
        self, network: Any, weights: Mapping[tuple[int, str], Tensor] | None = None, also: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self.network = network
        self.inputs = [Declared.of(network.get_input(i)) for i in range(network.num_inputs)]
        self.outputs = [*(network.get_output(i).name for i in range(network.num_outputs)), *also]
        graph = _Graph(network, weights or {})
        self.plan = graph.plan([*self.outputs, *graph.assertions], [declared.name for declared in self.inputs])

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Values:
        names = [declared.name for declared in self.inputs]
        if set(names) != inputs.keys():
            raise InputError(f"The network's inputs are {names}, given are {list(inputs)}.")
        for declared in self.inputs:
            if not declared.fits(inputs[declared.name]):
                raise InputError(declared.mismatch(inputs[declared.name]))
        device = next((x.device for x in inputs.values() if x.device.type != "cpu"), torch.device("cpu"))
        values = self.plan({name: value.to(device) for name, value in inputs.items()}, device)
        made = zip(self.outputs, values, strict=False)
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in made}


# What a network is made of


class Declared(NamedTuple):
    """What TensorRT says about a tensor."""

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
    declared: Declared
    start: str
    following: str


class Iterator(NamedTuple):
    declared: Declared
    tensor: str
    axis: int
    reverse: bool


class LoopResult(NamedTuple):
    declared: Declared
    source: str
    kind: str
    axis: int
    length: str | None


class BranchResult(NamedTuple):
    declared: Declared
    then: str
    other: str


@dataclass
class Step:
    """A layer, or a loop or conditional within a plan: what it reads, what it makes and how."""

    label: str
    reads: list[str | None]
    makes: list[str]
    compute: Compute
    done_with: list[str] = field(default_factory=list)


@dataclass
class Loop:
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


Producer = Step | Loop | Conditional


@dataclass
class Plan:
    steps: list[Step]
    targets: list[str]

    def __call__(self, given: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
        values = dict(given)
        for step in self.steps:
            read = [None if name is None else values[name] for name in step.reads]
            values.update(zip(step.makes, step.compute(read, device), strict=True))
            del read
            for name in step.done_with:
                del values[name]
        return [values[name] for name in self.targets]


class _Graph:
    """The layers of a network by the tensors they make, and the plans over them."""

    def __init__(self, network: Any, weights: Mapping[tuple[int, str], Tensor]) -> None:
        self.producers: dict[str, Producer] = {}
        self.loops: dict[str, Loop] = {}
        self.conditionals: dict[str, Conditional] = {}
        self.entries: dict[str, tuple[str, list[str | None]]] = {}  # what starts a body or branch: its scope, its reads
        self.assertions: list[str] = []
        roles: dict[int, dict[str, Tensor]] = {}
        for (index, role), value in weights.items():
            roles.setdefault(index, {})[role] = value
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            label = f"{layer.name} ({layer.type.name})"
            try:
                self._read(layer, label, roles.get(i, {}))
            except Torch2RTError as error:
                raise Torch2RTError(f"{label}: {error}") from error
        self.scopes = self._scopes()
        self._place_assertions()
        self._taken: dict[str, list[str]] = {}

    # Reading

    def _read(self, layer: Any, label: str, stored: Mapping[str, Tensor]) -> None:
        kind = layer.type.name  # before __class__ is assigned: activation and pooling layers hide it
        reads = [t if t is None else t.name for t in map(layer.get_input, range(layer.num_inputs))]
        declared = [Declared.of(layer.get_output(i)) for i in range(layer.num_outputs)]
        makes = [d.name for d in declared]
        if kind in BOUNDARIES:
            layer.__class__ = getattr(trt, BOUNDARIES[kind])
            if kind.startswith("CONDITION"):
                self._read_conditional(layer, reads, declared)
            else:
                self._read_loop(kind, layer, reads, declared)
        elif kind == "ASSERTION":
            layer.__class__ = trt.IAssertionLayer
            self.assertions.append(label)
            self._add(Step(label, reads, [label], _assertion(label, layer.message)), [label])
        else:
            require(kind in LAYERS, "this layer type is not supported")
            require(getattr(layer, "num_ranks", 1) == 1, "layers over several devices are not supported")
            class_name, prepare = LAYERS[kind]
            layer.__class__ = getattr(trt, class_name)
            if kind == "CONDITIONAL_INPUT":
                self.entries[makes[0]] = layer.conditional.name, reads
            self._add(Step(label, reads, makes, _layer(label, prepare(layer, stored), declared)), makes)

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

    # Scopes

    def _scopes(self) -> dict[str, frozenset[str]]:
        """The loops and conditionals that each tensor is inside of, because it depends on what starts them."""
        scopes: dict[str, frozenset[str]] = {}
        rows = [(name, frozenset([scope]), reads, "") for name, (scope, reads) in self.entries.items()]
        for name, producer in self.producers.items():
            if name not in self.entries:
                left = "" if isinstance(producer, Step) else producer.label
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

    # Planning

    def plan(self, targets: Sequence[str], given: Iterable[str]) -> Plan:
        """The steps from the given tensors to the targets."""
        given = set(given)
        needed = self._needed(targets, given)
        steps: dict[int, Step] = {}
        for name in needed:
            producer = self._producer(name)
            if id(producer) not in steps:
                steps[id(producer)] = self._step(producer, given | needed)
        makers = {name: steps[id(self._producer(name))] for name in needed}
        return Plan(_release(_order(targets, given, makers), set(targets)), list(targets))

    def _producer(self, name: str) -> Producer:
        if name not in self.producers and name in self.entries:
            raise Torch2RTError(f"{name!r} is used outside of {self.entries[name][0]}")
        require(name in self.producers, f"nothing makes {name!r}")
        return self.producers[name]

    def _outside(self, producer: Producer) -> list[str]:
        """All that is made outside of a producer and that it may read. The branches of a conditional are outside."""
        if not isinstance(producer, Loop):
            return [name for name in producer.reads if name is not None]
        if producer.label not in self._taken:
            taken = dict.fromkeys(producer.before)
            seen = {*producer.state, *producer.slices}
            stack = [name for name in (*producer.body, producer.condition) if name is not None]
            while stack:
                name = stack.pop()
                if name in seen:
                    continue
                seen.add(name)
                if producer.label in self.scopes.get(name, ()):
                    stack.extend(self._outside(self._producer(name)))
                else:
                    taken[name] = None
            self._taken[producer.label] = list(taken)
        return self._taken[producer.label]

    def _needed(self, targets: Iterable[str], given: set[str]) -> set[str]:
        """What is made in any case: not what only one branch of a conditional reads."""
        needed: set[str] = set()
        stack = list(targets)
        while stack:
            name = stack.pop()
            if name in given or name in needed:
                continue
            needed.add(name)
            producer = self._producer(name)
            if isinstance(producer, Conditional):
                require(producer.condition is not None, f"{producer.label} has no condition")
                stack.append(str(producer.condition))
            else:
                stack.extend(self._outside(producer))
        return needed

    def _step(self, producer: Producer, ready: set[str]) -> Step:
        if isinstance(producer, Step):
            return Step(producer.label, producer.reads, producer.makes, producer.compute)
        if isinstance(producer, Loop):
            taken = self._outside(producer)
            known = [*taken, *producer.state]
            proceed = None if producer.condition is None else self.plan([producer.condition], known)
            body = self.plan(producer.body, [*known, *producer.slices])
            return Step(producer.label, [*taken], producer.makes, _loop(producer, taken, proceed, body))
        taken = self._lazily(producer.branches, ready)
        plans = [self.plan(branch, taken) for branch in producer.branches]
        return Step(producer.label, [producer.condition, *taken], producer.makes, _conditional(producer, taken, plans))

    def _lazily(self, branches: Sequence[Sequence[str]], ready: set[str]) -> list[str]:
        """Of what is made anyway, the tensors that the branches start from."""
        taken, seen = [], set()
        stack = [name for branch in branches for name in branch]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in ready:
                taken.append(name)
            else:
                stack.extend(self._outside(self._producer(name)))
        return taken


def _order(targets: Iterable[str], given: set[str], makers: Mapping[str, Step]) -> list[Step]:
    """Each step after those it reads from: depth first, on a stack of our own, as networks are deeper than Python's."""
    ordered: list[Step] = []
    finished: dict[int, bool] = {}
    stack: list[tuple[str, bool]] = [(name, False) for name in targets]
    while stack:
        name, leaving = stack.pop()
        if name in given:
            continue
        step = makers[name]
        if leaving:
            finished[id(step)] = True
            ordered.append(step)
        elif id(step) not in finished:
            finished[id(step)] = False
            stack.append((name, True))
            stack.extend((read, False) for read in step.reads if read is not None)
        else:
            require(finished[id(step)], f"{step.label} reads its own result")
    return ordered


def _release(steps: list[Step], kept: set[str]) -> list[Step]:
    """Note after which step a tensor is of no more use."""
    last: dict[str, Step] = {}
    for step in steps:
        last.update((name, step) for name in (*step.makes, *step.reads) if name is not None)
    for name, step in last.items():
        if name not in kept:
            step.done_with.append(name)
    return steps


# What the steps do


def _layer(label: str, run: Callable[..., Any], declared: Sequence[Declared]) -> Compute:
    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        try:
            made = run(*values)
            made = made if isinstance(made, tuple) else (made,)
            return [d.check(value.to(device)) for d, value in zip(declared, made, strict=True)]
        except Exception as error:
            given = ", ".join("none" if v is None else f"{v.dtype} {list(v.shape)}" for v in values)
            raise Torch2RTError(f"{label}, given {given or 'nothing'}: {error}") from error

    return compute


def _assertion(label: str, message: str) -> Compute:
    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        require(bool(values[0].all()), f"{label} failed: {message}")
        return [values[0]]

    return compute


def _conditional(conditional: Conditional, taken: Sequence[str], plans: Sequence[Plan]) -> Compute:
    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        then, other = plans
        made = (then if bool(values[0]) else other)(dict(zip(taken, values[1:], strict=True)), device)
        return [result.declared.check(value) for result, value in zip(conditional.results, made, strict=True)]

    return compute


def _loop(loop: Loop, taken: Sequence[str], proceed: Plan | None, body: Plan) -> Compute:
    require(loop.count is not None or proceed is not None, f"{loop.label} has no trip limit")
    backwards = any(iterator.reverse for iterator in loop.iterators)
    require(loop.count is not None or not backwards, f"{loop.label} iterates backwards from no trip count")

    def piece(iterator: Iterator, outside: Values, trip: int) -> Tensor:
        at = int(outside[loop.count or ""]) - 1 - trip if iterator.reverse else trip
        n = outside[iterator.tensor].shape[iterator.axis]
        require(at < n, f"{iterator.declared.name!r} iterates beyond the {n} elements of its tensor")
        return iterator.declared.check(outside[iterator.tensor].select(iterator.axis, at))

    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        outside = dict(zip(taken, values, strict=True))
        count = None if loop.count is None else int(outside[loop.count])
        state = {r.declared.name: r.declared.check(outside[r.start]) for r in loop.recurrences}
        collected: list[list[Tensor]] = [[] for _ in loop.results]
        trip = 0
        while count is None or trip < count:
            known = {**outside, **state}
            if proceed is not None and not bool(proceed(known, device)[0]):
                break
            known.update((i.declared.name, piece(i, outside, trip)) for i in loop.iterators)
            made = body(known, device)
            state = {name: _like(name, state[name], value) for name, value in zip(state, made, strict=False)}
            for parts, value, result in zip(collected, made[len(state) :], loop.results, strict=False):
                parts.extend([value] if result.length is not None else [])
            trip += 1
        results = zip(loop.results, collected, strict=True)
        return [result.declared.check(_collect(result, parts, state, outside)) for result, parts in results]

    return compute


def _like(name: str, before: Tensor, after: Tensor) -> Tensor:
    same = before.shape == after.shape and before.dtype == after.dtype
    require(same, f"{name!r} turns from {before.dtype} {list(before.shape)} into {after.dtype} {list(after.shape)}")
    return after


def _collect(result: LoopResult, parts: list[Tensor], state: Values, outside: Values) -> Tensor:
    name = result.declared.name
    if result.length is None:
        require(result.source in state, f"{name!r} is the last value of what is no recurrence")
        return state[result.source]
    length = int(outside[result.length])
    require(length == len(parts), f"{name!r} is {length} long after {len(parts)} iterations: the rest is undefined")
    require(length > 0, f"{name!r} concatenates no iterations, which is not supported")
    return torch.stack(parts[::-1] if result.kind == "REVERSE" else parts, result.axis)
