"""What goes into an engine and what comes out: names, types, ranges, and the shape of the Python values around them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from torch2rt.errors import InputError
from torch2rt.promises import Promise
from torch2rt.sizes import Dim, Symbols, describe, evaluate_json, holds, is_met, to_json
from torch2rt.structure import Spec, bare_name, children, flatten, is_same, take, unflatten

Shape = tuple[int, ...]
AXES = {torch.channels_last: (0, 2, 3, 1), torch.channels_last_3d: (0, 2, 3, 4, 1)}  # as they lie in memory


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor that the engine takes: its dtype and the shapes it is served for (`min <= opt <= max`).

    The engine reads it in `memory_format`, and so has its axes in the order in which they lie in memory. `promises` say
    what a trace may take for granted of dynamic sizes; the interface's constraints check it at calls.
    `others` are the opt shapes of the engine's optimization profiles but the first.
    """

    name: str
    dtype: torch.dtype
    min: Shape
    opt: Shape
    max: Shape
    memory_format: torch.memory_format = torch.contiguous_format
    promises: tuple[Promise, ...] = ()
    others: Sequence[Shape] = ()

    @property
    def opts(self) -> list[Shape]:
        """The shape that each optimization profile is tuned for."""
        return [self.opt, *self.others]

    @property
    def dynamic(self) -> list[int]:
        """The axes whose size may vary."""
        return [axis for axis, (low, high) in enumerate(zip(self.min, self.max, strict=True)) if low != high]

    def dim(self, index: int, axis: int) -> Dim:
        """A dynamic dimension of this input, which is the `index`th."""
        steps = [promise.factor for promise in self.promises if promise.axis == axis]
        return Dim(index, self.name, axis, self.min[axis], self.max[axis], *steps)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes as they lie in memory, the outermost first."""
        return AXES.get(self.memory_format, tuple(range(len(self.opt))))

    def in_memory(self, sizes: Sequence[Any]) -> tuple[Any, ...]:
        """What is given for each axis, in the engine's order."""
        return tuple(sizes[axis] for axis in self.axes)

    def describe(self) -> str:
        """Such as `float32[1..4, 3, 224, 224]`, or `float16[1, 3, 224, 224] in channels_last`."""
        sizes = (str(low) if low == high else f"{low}..{high}" for low, high in zip(self.min, self.max, strict=True))
        order = f" in {bare_name(self.memory_format)}" if self.memory_format in AXES else ""
        return f"{bare_name(self.dtype)}[{', '.join(sizes)}]{order}"


@dataclasses.dataclass(frozen=True)
class Interface:
    """The calling convention of a converted module, a value that nothing changes.

    `arguments` describes `(args, kwargs)` and `result` the returned value, both as `structure.flatten` does;
    `parameters` are the keywords of the parameters that a call may give by position, `""` where there is none;
    `leaves` says for each leaf of the result which output it is (`{"output": 0}`) or which size (`{"size": [...]}`);
    `constraints` are claims about sizes that every call must satisfy, each with its text; `constrained` adds one.
    """

    inputs: Sequence[Input]
    arguments: Spec
    parameters: Sequence[str] = dataclasses.field(default_factory=list)
    outputs: Sequence[str] = dataclasses.field(default_factory=list)
    result: Spec = None
    leaves: Sequence[dict[str, Any]] = dataclasses.field(default_factory=list)
    constraints: Sequence[tuple[Any, str]] = dataclasses.field(default_factory=list)

    def __reduce__(self) -> Any:
        """Pickle as JSON: torch.save cannot pickle a memory format that is not a tensor's."""
        return Interface.from_json, (self.to_json(),)

    @functools.cached_property
    def plain_inputs(self) -> int:
        """How many tensors a call has, one after the other and nothing else; -1 if that is not how it is called."""
        count = len(self.inputs)
        plain = {"tuple": [{"tuple": [{"leaf": i} for i in range(count)]}, {"dict": [], "items": []}]}
        return count if self.arguments == plain else -1

    @functools.cached_property
    def plain_result(self) -> type | None:
        """`torch.Tensor` if a call returns one output, `tuple` if it returns all, in order; else `None`."""
        leaves = [{"leaf": i} for i in range(len(self.outputs))]
        if self.leaves != [{"output": i} for i in range(len(self.outputs))]:
            return None
        plain = {torch.Tensor: {"leaf": 0}, tuple: {"tuple": leaves}}
        return next((kind for kind, result in plain.items() if self.result == result), None)

    @functools.cached_property
    def profiles(self) -> list[list[Shape]]:
        """The opt shapes of each of the engine's optimization profiles, which all serve the whole range."""
        first, *others = self.asked_profiles
        return [first, *(shapes for shapes in others if self.serves(shapes))]

    @property
    def asked_profiles(self) -> list[list[Shape]]:
        """The opt shapes that were asked for; of several engines for one range, each has those that it serves."""
        return [list(shapes) for shapes in zip(*[spec.opts for spec in self.inputs])] or [[]]

    def nearest_profile(self, shapes: Sequence[Sequence[int]]) -> int:
        """The index of the profile whose opt shapes are the nearest: the product of all ratios is the smallest.

        Of several that are as near, it is the first.
        """
        distances = []
        for opts in self.profiles:
            pairs = [pair for opt, shape in zip(opts, shapes) for pair in zip(opt, shape)]
            distances.append(math.prod(max(a, b, 1) / max(min(a, b), 1) for a, b in pairs))
        return distances.index(min(distances))

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in input order; `InputError` if the call does not have the converted call's form."""
        positional, keywords = self.arguments["tuple"]
        if kwargs.keys() == set(keywords["dict"]):
            found: list[torch.Tensor] = []
            given = [args, *[kwargs[name] for name in keywords["dict"]]]
            if all(take(spec, value, found) for spec, value in zip([positional, *keywords["items"]], given)):
                return found
        leaves, spec = flatten(self._arrange(args, kwargs), torch.is_tensor, "arguments")
        if not is_same(spec, self.arguments):
            raise InputError(
                f"The call does not have the form it was converted with: {_difference(self.arguments, spec)}"
            )
        return leaves

    def _arrange(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between position and keyword to where they stood in the conversion."""
        positional, keywords = self.arguments["tuple"]
        count, names = len(positional["tuple"]), keywords["dict"]
        if twice := set(self.parameters[: len(args)]) & set(kwargs):
            raise InputError(f"The call gives {sorted(twice)} both by position and by keyword.")
        values = {**dict(zip(self.parameters[count:], args[count:])), **kwargs}
        head = list(args[:count])
        while len(head) < count and len(head) < len(self.parameters) and self.parameters[len(head)] in values:
            head.append(values.pop(self.parameters[len(head)]))
        extra = args[max(count, len(self.parameters)) :]
        if extra:
            head.extend(extra)
        return tuple(head), {name: values[name] for name in [*names, *values] if name in values}

    def check(self, shapes: list[Shape], dtypes: Sequence[torch.dtype]) -> None:
        """Raise `InputError` naming the input, the dimension and the range of what does not fit."""
        for spec, shape, dtype in zip(self.inputs, shapes, dtypes, strict=True):
            if dtype != spec.dtype:
                raise InputError(f"Input '{spec.name}' is {dtype}, the engine takes {spec.dtype}: {spec.describe()}.")
            if len(shape) != len(spec.min):
                raise InputError(
                    f"Input '{spec.name}' has {len(shape)} dimensions {tuple(shape)}, the engine takes "
                    f"{spec.describe()}."
                )
            for axis, (size, low, high) in enumerate(zip(shape, spec.min, spec.max, strict=True)):
                if not low <= size <= high:
                    served = f"{low}" if low == high else f"{low} to {high}"
                    raise InputError(
                        f"Input '{spec.name}' has size {size} in dimension {axis}, the engine serves {served}: "
                        f"got {tuple(shape)}, {spec.describe()}."
                    )
        if (text := self.unmet(shapes)) is not None:
            got = ", ".join(f"{i.name} {tuple(s)}" for i, s in zip(self.inputs, shapes, strict=True))
            raise InputError(f"The model needs {text}, got {got}.")

    def shapes(self, shapes: Any) -> list[Shape]:
        """One shape for each input, as a user gives them: a list, nested like the inputs, or a dict by name."""
        by_name = shapes_by_name("shapes", shapes, self.arguments, {spec.name: spec.opt for spec in self.inputs})
        return list(by_name.values())

    def serves(self, shapes: Sequence[Shape]) -> bool:
        """Whether calls with these shapes are taken: within the ranges, and all claims about sizes are true of them."""
        for spec, shape in zip(self.inputs, shapes, strict=True):
            for size, low, high in zip(shape, spec.min, spec.max, strict=True):
                if not low <= size <= high:
                    return False
        return all(is_met(relation, shapes) for relation, _ in self.constraints)

    def unmet(self, shapes: list[Shape]) -> str | None:
        """The first claim about sizes that is false for these shapes."""
        return next((text for relation, text in self.constraints if not is_met(relation, shapes)), None)

    def constrained(self, claim: sympy.Basic, symbols: Symbols, text: str | None = None) -> Interface:
        """The interface that checks a claim about sizes at every call, once however often it is asked for."""
        constraint = (to_json(claim, symbols), text or describe(claim, symbols))
        if constraint in self.constraints:
            return self
        return dataclasses.replace(self, constraints=[*self.constraints, constraint])

    def holds_at_opt(self, claim: sympy.Basic, symbols: Symbols) -> bool:
        """Whether a claim about sizes is true of the opt shapes."""
        return holds(claim, {s: self.inputs[dim.input].opt[dim.axis] for s, dim in symbols.items()})

    def is_relation(self, claim: sympy.Basic, symbols: Symbols) -> bool:
        """Whether a claim relates several sizes, so that no ranges could say it, and holds for the opt shapes."""
        return len(claim.free_symbols) > 1 and self.holds_at_opt(claim, symbols)

    def wrap(self, outputs: Sequence[torch.Tensor], shapes: list[Shape]) -> Any:
        """Put the engine's outputs into the value that the module returns."""
        leaves = [
            outputs[leaf["output"]] if "output" in leaf else evaluate_json(leaf["size"], shapes) for leaf in self.leaves
        ]
        return unflatten(self.result, leaves)

    def to_json(self) -> dict[str, Any]:
        """The interface as JSON values."""
        data = dataclasses.asdict(self)
        for item in data["inputs"]:
            del item["promises"]
            item["dtype"], item["memory_format"] = bare_name(item["dtype"]), bare_name(item["memory_format"])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Interface:
        """The inverse of `to_json`."""
        inputs = [
            Input(
                i["name"],
                getattr(torch, i["dtype"]),
                tuple(i["min"]),
                tuple(i["opt"]),
                tuple(i["max"]),
                getattr(torch, i.get("memory_format", "contiguous_format")),
                others=tuple(map(tuple, i.get("others", ()))),
            )
            for i in data["inputs"]
        ]
        constraints = [(relation, text) for relation, text in data["constraints"]]
        return cls(**{**data, "inputs": inputs, "constraints": constraints})


def is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def with_size(shape: Shape, axis: int, size: int) -> Shape:
    """A shape with another size in one dimension, which is counted from the front."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def shapes_by_name(what: str, shapes: Any, arguments: Spec, default: Mapping[str, Shape]) -> dict[str, Shape]:
    """One shape per input name, from a dict by name, a flat list, or a list nested like the inputs.

    An input that a dict does not name has its default.
    """
    if shapes is None:
        return dict(default)
    if isinstance(shapes, Mapping):
        if unknown := set(shapes) - set(default):
            raise InputError(f"{what} names {sorted(unknown)}, the inputs are {list(default)}.")
        given = {**default, **{name: tuple(shape) for name, shape in shapes.items()}}
    else:
        flat = [
            tuple(shape) for shape in flatten([shapes] if is_shape(shapes) and shapes else shapes, is_shape, what)[0]
        ]
        if len(flat) != len(default):
            raise InputError(
                f"{what} has {len(flat)} shapes for {len(default)} input tensors {list(default)}: {shapes!r}."
            )
        given = dict(zip(default, flat, strict=True))
    for name, shape in given.items():
        if len(shape) != len(default[name]):
            raise InputError(
                f"{what} gives input '{name}' {len(shape)} dimensions {shape}, the example has {default[name]}."
            )
    return given


def _difference(expected: Spec, got: Spec, path: str = "arguments") -> str:
    """The first place where two descriptions differ, in words."""

    def words(spec: Spec) -> str:
        if "leaf" in spec:
            return "a tensor"
        if "constant" in spec:
            return repr(spec["constant"])
        kind = next(k for k in ("class", "dict", "tuple", "list", "dtype", "device", "type", "sequence") if k in spec)
        children = spec.get("items", spec.get(kind, ()))
        return f"{spec[kind]}" if kind in ("class", "dtype", "device", "type") else f"a {kind} of {len(children)}"

    ours, theirs = children(expected), children(got)
    if path == "arguments":
        positions = (children(ours[0]), children(theirs[0]))
        if len(positions[0]) != len(positions[1]):
            return f"it takes {len(positions[0])} positional arguments and got {len(positions[1])}."
        if set(children(ours[1])) != set(children(theirs[1])):
            return f"it takes the keywords {list(children(ours[1]))} and got {list(children(theirs[1]))}."
    if {k for k in expected if k != "items"} == {k for k in got if k != "items"} and list(ours) == list(theirs):
        for key in ours:
            if not is_same(ours[key], theirs[key]):
                return _difference(ours[key], theirs[key], f"{path}[{key!r}]")
    return f"{path} was {words(expected)} and is {words(got)}."
