"""The order in which the segments of a module run, and how values pass between them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.sizes import evaluate_json

Runner = Callable[..., Sequence[torch.Tensor]]  # of a segment's input tensors
CARRIER_CHUNK = 1 << 16  # bytes that a carrier of sizes has at least


@dataclasses.dataclass(frozen=True)
class Step:
    """One segment of a program: where its tensors come from and where they go.

    - `inputs`: for each tensor a slot, or the size of a carrier as JSON (see `torch2rt.passes.partitioning.split`).
    - `outputs`: the slots of what it returns. `free`: the slots that nobody reads afterwards.
    """

    inputs: Sequence[Any]
    outputs: Sequence[int]
    free: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The segments of a module in the order in which they run, as JSON values say it."""

    steps: Sequence[Step]
    results: Sequence[int]
    slots: int
    checks: Sequence[tuple[Any, str]] = ()

    @classmethod
    def of(
        cls,
        inputs: Sequence[Sequence[Any]],
        outputs: Sequence[Sequence[int]],
        results: Sequence[int],
        slots: int,
        checks: Sequence[tuple[Any, str]] = (),
    ) -> Schedule:
        """A schedule in which every value is let go of after its last use."""
        last: dict[int, int] = {}
        kept = {*results, *(slot for tree, _ in checks for slot in _slots_in(tree))}
        for index, taken in enumerate(inputs):
            for item in taken:
                for slot in _slots_in(item):
                    last[slot] = index
        free: list[list[int]] = [[] for _ in inputs]
        for slot, index in last.items():
            if slot not in kept:
                free[index].append(slot)
        steps = [Step(list(i), list(o), f) for i, o, f in zip(inputs, outputs, free, strict=True)]
        return cls(steps, list(results), slots, list(checks))

    def together(self, groups: Sequence[range]) -> tuple[Schedule, list[tuple[list[int], Schedule]]]:
        """The schedule with each of these groups of steps as one step, and what is in each group.

        That is the slots that the group takes, and its own steps, of which the results are what others take.
        """
        inputs, outputs, inside, step = [], [], [], 0
        for group in [*groups, range(len(self.steps), len(self.steps))]:
            others = self.steps[step : group.start]
            inputs += [step.inputs for step in others]
            outputs += [step.outputs for step in others]
            step = group.stop
            if group:
                own = [self.steps[i] for i in group]
                made = {slot for one in own for slot in one.outputs}
                taken = [one.inputs for i, one in enumerate(self.steps) if i not in group]
                used = {slot for items in taken for item in items for slot in _slots_in(item)}
                used.update(self.results, (slot for tree, _ in self.checks for slot in _slots_in(tree)))
                given = [slot for one in own for item in one.inputs for slot in _slots_in(item) if slot not in made]
                results = sorted(made & used)
                inputs.append(list(dict.fromkeys(given)))
                outputs.append(results)
                steps = [one.inputs for one in own], [one.outputs for one in own]
                inside.append((list(dict.fromkeys(given)), Schedule.of(*steps, results, self.slots)))
        return Schedule.of(inputs, outputs, self.results, self.slots, self.checks), inside

    def ready(self, runners: Sequence[Runner]) -> list[Ready]:
        """The steps with what runs each, as `run_steps` takes them.

        Inputs of the module are not let go of, as they are the caller's.
        """
        given = min((slot for step in self.steps for slot in step.outputs), default=self.slots)
        found: list[Ready] = []
        for step, runner in zip(self.steps, runners, strict=True):
            plain = all(isinstance(item, int) for item in step.inputs)
            slot = step.inputs[0] if plain and len(step.inputs) == 1 else None
            take = operator.itemgetter(*step.inputs) if plain and len(step.inputs) > 1 else None
            out = step.outputs[0] if len(step.outputs) == 1 else None
            free = [slot for slot in step.free if slot >= given]
            found.append((runner, slot, take, step.inputs, out, step.outputs, free))
        return found

    def to_json(self) -> dict[str, Any]:
        """The schedule as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Schedule:
        """The inverse of `to_json`."""
        steps = [Step(**step) for step in data["steps"]]
        return cls(steps, data["results"], data["slots"], [(tree, text) for tree, text in data["checks"]])


def _slots_in(item: Any) -> list[int]:
    """The slots that an input is, or reads sizes of."""
    if isinstance(item, int):
        return [item]
    if isinstance(item, (list, tuple)):
        if item[0] in ("dim", "laid out"):
            return [item[1]]
        return [slot for part in item[1:] if isinstance(part, (list, tuple)) for slot in _slots_in(part)]
    return []


class _Shapes(Sequence[Any]):
    """The shapes of the values in slots, for `evaluate_json`."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __getitem__(self, slot: Any) -> Any:
        return self.values[slot].shape

    def __len__(self) -> int:
        return len(self.values)


class Carriers:
    """Tensors of which only the size counts: pieces of one buffer for each device, which nobody writes to."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}

    def buffers(self) -> list[torch.Tensor]:
        """The buffers as they are now."""
        return list(self._buffers.values())

    def addresses(self) -> set[int]:
        """Where the buffers begin."""
        return set(map(address, self._buffers.values()))

    def of(self, size: int, device: torch.device) -> torch.Tensor:
        buffer = self._buffers.get(device)
        if buffer is None or len(buffer) < size:
            buffer = torch.zeros(max(CARRIER_CHUNK, 2 * size), dtype=torch.bool, device=device)
            self._buffers[device] = buffer
        return buffer[:size]


# What runs a step; its input, if it is the value of one slot; what takes them, if they are those of several; else the
# inputs; the output, if it is one; the outputs; and what is let go of.
Ready = tuple[
    Runner, int | None, Callable[[Any], tuple[Any, ...]] | None, Sequence[Any], int | None, Sequence[int], Any
]


def run_steps(steps: Sequence[Ready], values: list[Any], carriers: Carriers, device: torch.device) -> None:
    """Run the steps on the values in the slots, which are filled with what the steps return."""
    shapes = None
    for runner, slot, take, inputs, out, outs, free in steps:
        if slot is not None:
            results = runner(values[slot])
        elif take is not None:
            results = runner(*take(values))
        else:
            shapes = shapes or _Shapes(values)
            results = runner(
                *[values[i] if isinstance(i, int) else _made(i, values, shapes, carriers, device) for i in inputs]
            )
        if out is not None:
            (values[out],) = results
        else:
            for place, value in zip(outs, results, strict=True):
                values[place] = value
        for place in free:
            values[place] = None


class Running:
    """A schedule with what runs its steps, as a function of the module's tensors.

    None of its results shares memory with an input, a constant or another result. `kept` gives the addresses of the
    storages that outlive a call; `own` are the slots whose values have memory that nobody else knows of.
    """

    def __init__(
        self,
        schedule: Schedule,
        runners: Sequence[Runner],
        carriers: Carriers,
        kept: Callable[[], set[int]],
        own: Collection[int] = (),
    ) -> None:
        self.steps, self.results, self.checks = schedule.ready(runners), schedule.results, schedule.checks
        self.slots, self.carriers, self.kept, self.runners = schedule.slots, carriers, kept, runners
        self.is_own = set(schedule.results) <= set(own) and len(set(schedule.results)) == len(schedule.results)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results for these tensors."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(tensors)
        values: list[Any] = [*tensors, *[None] * (self.slots - len(tensors))]
        try:
            run_steps(self.steps, values, self.carriers, tensors[0].device if tensors else torch.device("cpu"))
        except Exception:  # perhaps torch refuses a size that should have been another one
            self._check(values)
            raise
        self._check(values)
        results = [values[slot] for slot in self.results]
        return results if self.is_own else self._separate(tensors, results)

    def _check(self, values: list[Any]) -> None:
        """Raise `InputError` for a claim that is false, of those about sizes that are known."""
        for tree, text in self.checks:
            known = all(values[slot] is not None for slot in _slots_in(tree))
            if known and not evaluate_json(tree, _Shapes(values)):
                needed = text or "sizes as it was traced with"
                raise InputError(f"The model needs {needed}, which these inputs' values make false.")

    def _separate(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results, copied where they share memory; a value that is returned twice stays one."""
        taken = self.kept() | {address(t) for t in tensors}
        outputs: dict[int, torch.Tensor] = {}
        for slot, value in zip(self.results, results, strict=True):
            if slot not in outputs:
                if address(value) in taken or value.is_conj() or value.is_neg():
                    value = value.resolve_conj().resolve_neg()
                    value = value.clone() if address(value) in taken else value
                if where := address(value):
                    taken.add(where)
                outputs[slot] = value
        return [outputs[slot] for slot in self.results]


def _made(item: Any, values: Sequence[Any], shapes: Any, carriers: Carriers, device: torch.device) -> torch.Tensor:
    """An input that is no value as it is: a carrier of a size, or a value laid out in another way."""
    if item[0] != "laid out":
        return carriers.of(evaluate_json(item, shapes), device)
    _, slot, axes, *rest = item
    value, shape = values[slot], values[slot].shape
    for axis in rest[0] if rest else ():  # all along it is the same
        value = value.narrow(axis, 0, min(1, shape[axis]))
    value = value.permute(axes).contiguous().permute([axes.index(axis) for axis in range(len(axes))])
    return value.expand(shape)


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins; 0 for tensors without memory of this kind."""
    if tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()
