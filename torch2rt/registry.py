"""Which converter serves which torch callable.

A converter is a function of a context and of torch's own parameters. It is registered under the callables it serves;
in-place spellings need no entry (the tracer records `Tensor.add_` as `Tensor.add` and a write), and an ATen operator
without an entry of its own is served by the converter of the torch function of the same name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Container
from typing import Any

import torch

from torch2rt.callables import Target, candidates, functional, operator_of, qualified_name
from torch2rt.errors import ConversionError

Call = tuple[Target, Any, Any]  # with its arguments by position and by name

ALIASES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "x": "input",
    "x1": "input",
    "x2": "other",
    "self": "input",
    "a": "input",
    "A": "input",
    "input": "A",
    "inp": "input",
    "dims": "dim",
    "output_dtype": "dtype",
}


@dataclasses.dataclass(frozen=True)
class Converter:
    """A registered converter and what calling it needs to know."""

    function: Callable[..., Any]
    limits: str
    parameters: tuple[inspect.Parameter, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of `target` as this converter takes them.

        numpy-style and ATen keyword names become torch's, those of an ATen operator go by its schema, and the integers
        of `permute(0, 2, 1)` and of `permute((0, 2, 1))` arrive alike in a `*dims` parameter.
        """
        names = [p.name for p in self.parameters]
        args, kwargs = by_schema(target, names, args, renamed(kwargs, names))
        star = next((p for p in self.parameters if p.kind is p.VAR_POSITIONAL), None)
        if star is None:
            return args, kwargs
        before = names.index(star.name)
        if star.name in kwargs:
            rest = kwargs.pop(star.name)
            args = (*args, *(kwargs.pop(n) for n in names[len(args) : before]))
        else:
            rest = args[before:]
            if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
                rest = rest[0]
        return (*args[:before], *(rest if isinstance(rest, (tuple, list)) else (rest,))), kwargs


def renamed(kwargs: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Keyword arguments with numpy-style and ATen names made torch's, where `names` has those."""
    return {ALIASES[k] if k not in names and ALIASES.get(k) in names else k: v for k, v in kwargs.items()}


def by_schema(
    target: Target | None, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments by name, with its operator's own defaults, if `names` has all that its schema has by position.

    An ATen operator may order its arguments in another way than the torch function of its name, and have other
    defaults: `aten.sort.stable(self, stable, dim)` is `torch.sort(input, dim, descending, stable=...)`.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return args, kwargs
    arguments = target._schema.arguments
    ours = [a.name if a.name in names else ALIASES.get(a.name, "") for a in arguments]
    by_position = [name for name, a in zip(ours, arguments, strict=True) if not a.kwarg_only]
    if len(args) > len(by_position) or not all(name in names for name in by_position):
        return args, kwargs
    defaults = {
        o: a.default_value for o, a in zip(ours, arguments, strict=True) if o in names and a.has_default_value()
    }
    return (), {**defaults, **dict(zip(ours, args, strict=False)), **kwargs}


def overload_of(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
    """Which of an operator's overloads a call is of, where it has several: their arguments differ."""
    if not isinstance(target, torch._ops.OpOverloadPacket) or len(target.overloads()) == 1:
        return target
    try:
        name = torch._C._jit_resolve_packet(target._qualified_op_name, *args, **kwargs)
    except RuntimeError:  # torch will say what is wrong with the arguments
        return target
    return getattr(target, name or "default")


class Registry:
    """Torch callables and their converters."""

    def __init__(self) -> None:
        self.converters: dict[Target, Converter] = {}
        self.on_complex: dict[Target, Converter] = {}
        self.factories: set[Target] = set()
        self.unfolded: set[Target] = set()
        self.rewrites: dict[Target, str] = {}
        self.composites: dict[Target, Callable[..., Any]] = {}
        self.fusions: dict[Target, Callable[..., None]] = {}

    def converter(
        self, *targets: Target, limits: str = "", override: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function for `targets`; `limits` says in a few words what it refuses.

        `override=True` replaces what torch2rt, or an earlier call of this, does for `targets`, and nothing else:
        `torch.relu`, `torch.Tensor.relu` and `torch.nn.functional.relu` are three targets.

        Raises `ValueError` for a target that has a converter, without `override`, and for one that writes in place: of
        `torch.relu_`, torch2rt records the call of `torch.relu` and the write.
        """

        return self._register(self.converters, targets, limits, override)

    def complex_converter(
        self, *targets: Target, limits: str = "", override: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function for calls of `targets` that take or return complex numbers.

        It also serves the other callables that share their converter with one of `targets`.
        """
        return self._register(self.on_complex, targets, limits, override)

    def _register(
        self, table: dict[Target, Converter], targets: tuple[Target, ...], limits: str, override: bool
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            parameters = tuple(inspect.signature(function).parameters.values())[1:]
            entry = Converter(function, limits, parameters)
            if not (is_own := function.__module__.startswith(_OWN)):
                load()  # so that a target with a converter is known as such, in whatever order they are registered
            served = self._vacant(table, entry.name, targets, override, is_own)
            for target in served:
                table[target] = entry
                if override:
                    self.composites.pop(target, None)
                    self.fusions.pop(target, None)
            return function

        return register

    def vacant(self, name: str, targets: tuple[Target, ...], override: bool = False) -> list[Target]:
        """The targets as `converter` registers them; raises what it raises for a function of this name."""
        load()
        return self._vacant(self.converters, name, targets, override, is_own=False)

    def _vacant(
        self, table: dict[Target, Converter], name: str, targets: tuple[Target, ...], override: bool, is_own: bool
    ) -> list[Target]:
        served = [operator_of(target) for target in targets]
        for target in served:  # before any of them is registered
            if not callable(target):
                raise TypeError(f"{name}: {target!r} is not callable.")
            if not override and (other := self._name_of(table, target, is_own)) is not None:
                raise ValueError(
                    f"{name}: {qualified_name(target)} has a converter, {other}. Pass override=True to replace it."
                )
            if not is_own and (same := functional(target)) is not None:
                raise ValueError(
                    f"{name}: {qualified_name(target)} writes in place, which torch2rt records as a call of "
                    f"{qualified_name(same)} and a write. Register a converter for that."
                )
        return served

    def _name_of(self, table: dict[Target, Converter], target: Target, is_own: bool) -> str | None:
        """The function that serves a target in one of the tables of converters, if there is one.

        Our own files may give one target a converter and a body, which steps aside, and an ATen operator its own
        converter beside that of torch's function.
        """
        spellings = (target,) if is_own else tuple(candidates(target))
        found = next((table[t].name for t in spellings if t in table), None)
        if found is None and not is_own and table is self.converters:
            found = next((self.composites[t].__name__ for t in spellings if t in self.composites), None)
        return found

    def factory(self, *targets: Target) -> None:
        """Declare callables whose result depends on their arguments' sizes, dtypes and devices, never on values.

        The tracer runs them for real where the result's size is static, so that what follows is folded too.
        """
        self.factories.update(targets)

    def keep(self, *targets: Target) -> None:
        """Declare callables whose layers the engine needs where all arguments are constant, too.

        Other calls of constants are computed by torch. A weight that is quantised and brought back would be an ordinary
        one then, and TensorRT would have no integers to multiply.
        """
        self.unfolded.update(targets)

    def is_kept(self, target: Target) -> bool:
        return bool(self.unfolded) and any(t in self.unfolded for t in candidates(target))

    def composite(self, *targets: Target) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as the body of `targets`: other torch calls, recorded in their place.

        It runs while the module is traced, on the call's own arguments, and may return `NotImplemented` to step aside.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            signature = inspect.signature(function)

            @functools.wraps(function)
            def body(*args: Any, **kwargs: Any) -> Any:
                kwargs = renamed(kwargs, signature.parameters)
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:
                    raise ConversionError(f"{error}, in the way torch2rt knows it") from error
                return function(*args, **kwargs)

            self.composites.update(dict.fromkeys(targets, body))
            return function

        return register

    def fusion(self, *targets: Target) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function to do away with calls of `targets` where others can do their work.

        It is given the `torch2rt.passes.fuse.Fuser` of a graph and each such call, once, before the graph is lowered.
        """

        def register(function: Callable[..., None]) -> Callable[..., None]:
            self.fusions.update(dict.fromkeys(targets, function))
            return function

        return register

    def rewrite(self, advice: str, *targets: Target) -> None:
        """Declare callables that cannot be converted, and what to write instead."""
        self.rewrites.update(dict.fromkeys(targets, advice))

    def advice(self, *targets: Target) -> str | None:
        """What to write instead of a call that cannot be converted, if somebody knows."""
        return next((self.rewrites[t] for target in targets for t in candidates(target) if t in self.rewrites), None)

    def find(self, target: Target) -> Converter | None:
        """The converter that serves a callable, or `None`."""
        found = next((self.converters[t] for t in candidates(target) if t in self.converters), None)
        return found or next((self.on_complex[t] for t in candidates(target) if t in self.on_complex), None)

    def body(self, target: Target) -> Callable[..., Any] | None:
        """The composite that serves a callable, or `None`: an operator's own converter goes before its namesake's."""
        for candidate in candidates(target):
            if candidate in self.composites:
                return self.composites[candidate]
            if candidate in self.converters:
                return None
        return None

    def find_complex(self, target: Target) -> Converter | None:
        """The converter that serves a callable's calls on complex numbers, or `None`."""
        found = next((self.on_complex[t] for t in candidates(target) if t in self.on_complex), None)
        shared = self.find(target)
        return found or next((c for t, c in self.on_complex.items() if self.converters.get(t) is shared), None)

    def is_factory(self, target: Target) -> bool:
        return any(t in self.factories for t in candidates(target))


REGISTRY = Registry()
converter = REGISTRY.converter
complex_converter = REGISTRY.complex_converter
composite = REGISTRY.composite
factory = REGISTRY.factory
fusion = REGISTRY.fusion
keep = REGISTRY.keep
rewrite = REGISTRY.rewrite
_OWN = "torch2rt.converters."


def load() -> Registry:
    """The registry with every converter that comes with torch2rt in it.

    Those of torchvision's operators join when torchvision is imported, as it is before a module can call them; those of
    torch's quantised programs and of modelopt likewise.
    """
    import torch2rt.converters  # registers on import

    if "torchvision" in sys.modules:
        import torch2rt.converters.vision
    if hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        import torch2rt.converters.decomposed
    if hasattr(torch.ops.tensorrt, "quantize_op"):
        import torch2rt.converters.modelopt  # noqa: F401

    return REGISTRY
