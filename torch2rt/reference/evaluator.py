"""A TensorRT network evaluated with torch, layer by layer: the oracle where there is no GPU, the debugger where one is.

`reading.py` reads a network once. `Evaluator` makes a plan of it: the layers that the outputs need, in an order that
works. A loop or a conditional is one step of its plan and has plans of its own, for its body or its branches, that
start from the values they take from outside. What does not depend on a loop's iteration is outside of it; what only a
branch needs is inside. Every result is held against the type and shape that TensorRT declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch2rt.errors import InputError, Torch2RTError
from torch2rt.reference.layers import require
from torch2rt.reference.reading import (
    Assertion,
    Conditional,
    Declared,
    Iterator,
    Layer,
    Loop,
    LoopResult,
    NetworkReader,
    Producer,
)

Values = dict[str, Tensor]
Compute = Callable[[Sequence[Any], torch.device], Sequence[Tensor]]


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
    ) -> None:
        self.network = network
        self.inputs = [Declared.of(network.get_input(i)) for i in range(network.num_inputs)]
        self.outputs = [*(network.get_output(i).name for i in range(network.num_outputs)), *also]
        reader = NetworkReader(network, weights or {})
        targets = [*self.outputs, *reader.assertions]
        self.plan = _Planner(reader).plan(targets, [declared.name for declared in self.inputs])

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


@dataclass
class Step:
    """A layer, or a loop or conditional within a plan: what it reads, what it makes and how."""

    label: str
    reads: list[str | None]
    makes: list[str]
    compute: Compute
    done_with: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """Steps in an order that works, and the tensors to return after the last one."""

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


class _Planner:
    """Makes plans over the producers of a network."""

    def __init__(self, reader: NetworkReader) -> None:
        self.producers, self.entries, self.scopes = reader.producers, reader.entries, reader.scopes
        self._outside_of_loops: dict[str, list[str]] = {}

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
        """The tensors made outside of a producer that it may read. A conditional's branches are outside of it."""
        if not isinstance(producer, Loop):
            return [name for name in producer.reads if name is not None]
        if producer.label not in self._outside_of_loops:
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
            self._outside_of_loops[producer.label] = list(taken)
        return self._outside_of_loops[producer.label]

    def _needed(self, targets: Iterable[str], given: set[str]) -> set[str]:
        """The tensors that are made whichever branch of a conditional runs."""
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
        if isinstance(producer, Layer):
            return Step(producer.label, producer.reads, producer.makes, _layer(producer))
        if isinstance(producer, Assertion):
            return Step(producer.label, producer.reads, producer.makes, _assertion(producer))
        if isinstance(producer, Loop):
            taken = self._outside(producer)
            known = [*taken, *producer.state]
            proceed = None if producer.condition is None else self.plan([producer.condition], known)
            body = self.plan(producer.body, [*known, *producer.slices])
            return Step(producer.label, [*taken], producer.makes, _loop(producer, taken, proceed, body))
        taken = self._branch_inputs(producer.branches, ready)
        plans = [self.plan(branch, taken) for branch in producer.branches]
        return Step(producer.label, [producer.condition, *taken], producer.makes, _conditional(producer, taken, plans))

    def _branch_inputs(self, branches: Sequence[Sequence[str]], ready: set[str]) -> list[str]:
        """The tensors that the branches start from, of those that are made whichever branch runs."""
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


def _layer(layer: Layer) -> Compute:
    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        try:
            made = layer.run(*values)
            made = made if isinstance(made, tuple) else (made,)
            return [d.check(value.to(device)) for d, value in zip(layer.declared, made, strict=True)]
        except Exception as error:
            given = ", ".join("none" if v is None else f"{v.dtype} {list(v.shape)}" for v in values)
            raise Torch2RTError(f"{layer.label}, given {given or 'nothing'}: {error}") from error

    return compute


def _assertion(assertion: Assertion) -> Compute:
    def compute(values: Sequence[Any], device: torch.device) -> list[Tensor]:
        require(bool(values[0].all()), f"{assertion.label} failed: {assertion.message}")
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
            state = {name: _same_type(name, state[name], value) for name, value in zip(state, made, strict=False)}
            for parts, value, result in zip(collected, made[len(state) :], loop.results, strict=False):
                parts.extend([value] if result.length is not None else [])
            trip += 1
        results = zip(loop.results, collected, strict=True)
        return [result.declared.check(_collect(result, parts, state, outside)) for result, parts in results]

    return compute


def _same_type(name: str, before: Tensor, after: Tensor) -> Tensor:
    """The new value of a recurrence, which must have the type and shape of the value before."""
    same = before.shape == after.shape and before.dtype == after.dtype
    require(same, f"{name!r} turns from {before.dtype} {list(before.shape)} into {after.dtype} {list(after.shape)}")
    return after


def _collect(result: LoopResult, parts: list[Tensor], state: Values, outside: Values) -> Tensor:
    """A loop's result after its last iteration: `parts` are the values of all iterations."""
    name = result.declared.name
    if result.length is None:
        require(result.source in state, f"{name!r} is the last value of what is no recurrence")
        return state[result.source]
    length = int(outside[result.length])
    require(length == len(parts), f"{name!r} is {length} long after {len(parts)} iterations: the rest is undefined")
    require(length > 0, f"{name!r} concatenates no iterations, which is not supported")
    return torch.stack(parts[::-1] if result.kind == "REVERSE" else parts, result.axis)
