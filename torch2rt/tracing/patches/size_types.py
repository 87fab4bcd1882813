"""`type(size) is int` in a module's Python, which is true of the plain number that it gets from eager torch.

`isinstance(size, int)` asks the size for its class, and `type(size)` asks nothing. So a class takes the place of `type`
that says of sizes what Python's says of numbers, and is `type` to whatever asks. It stands in the globals of the Python
files that may run in the trace and compare what `type` gives, and nowhere else: files of the packages that the module's
classes are of, and files that are not installed.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FunctionType, GenericAlias, ModuleType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from torch2rt.tracing.patches.number_types import PLAIN, standing_in

_OTHERS = {"torch", "torch2rt", "numpy", "sympy", "tensorrt", "tensorrt_rtx", *sys.stdlib_module_names} - {"__main__"}

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})

_NAMES = {"int", "float", "bool", "Number", "Real", "Integral", "__name__"}


class _TypeOfNumbers(type):
    """A class of the class that is `type` to whatever asks, but for calls with one size of a trace."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not TYPE:  # a class of classes that was made meanwhile
            return type.__call__(cls, *args, **kwargs)
        if len(args) != 1 or kwargs:
            return type(*args, **kwargs)
        kind = type(args[0])
        if kind is type:
            return cls
        if kind in PLAIN and _get_current_function_mode_stack():
            kind = PLAIN[kind]
        in_file = sys._getframe(1).f_globals.get(kind.__name__) if kind in (int, float) else None
        return in_file if in_file is not None and in_file == kind else kind  # `number_types` may have put one there

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


class TYPE(type, metaclass=_TypeOfNumbers):
    """What stands for `type`."""

    __class_getitem__: Any = classmethod(GenericAlias)


def plain_types(files: list[dict[str, Any]]) -> Any:
    """A context in which `type(size)` is `int` in code with these globals."""
    return standing_in([(scope, "type", TYPE) for scope in files])


def files_that_ask(module: torch.nn.Module) -> list[dict[str, Any]]:
    """The globals of the Python files that a module's code is in, or may call, and in which `type` is called."""
    seen: dict[int, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    left = [scope for part in module.modules() for scope in _scopes_of(part)]
    packages = set(map(_package, left))
    while left:
        scope = left.pop()
        if id(scope) in seen or (package := _package(scope)) in _OTHERS:
            continue
        if package not in packages and str(scope.get("__file__", "")).startswith(_INSTALLED):
            continue
        seen[id(scope)] = scope
        asks = False
        for value in list(scope.values()):
            if isinstance(value, ModuleType):
                left.append(value.__dict__)
                continue
            for function in _functions(value):
                if function.__globals__ is not scope:
                    left.append(function.__globals__)
                elif not asks:
                    asks = _asks(function.__code__)
        if asks and "type" not in scope:
            found.append(scope)
    return found


def _package(scope: dict[str, Any]) -> str:
    return str(scope.get("__name__", "")).partition(".")[0]


def _scopes_of(part: torch.nn.Module) -> Iterator[dict[str, Any]]:
    for kind in type(part).__mro__:
        if (file := sys.modules.get(kind.__module__)) is not None:
            yield file.__dict__
    for value in itertools.chain(vars(type(part)).values(), vars(part).values()):
        yield from (function.__globals__ for function in _functions(value))


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions of a value: itself, what it wraps, and the methods of a class."""
    if isinstance(value, type):
        for method in list(vars(value).values()):
            if not isinstance(method, type):
                yield from _functions(method)
        return
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
    while isinstance(value, FunctionType):
        yield value
        value = value.__dict__.get("__wrapped__")


@functools.lru_cache(maxsize=1 << 14)
def _asks(code: CodeType) -> bool:
    """Whether code compares what `type` gives, as far as its names tell."""
    if "type" in code.co_names:
        called = sum(
            step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type" for step in dis.get_instructions(code)
        )
        if called > 1 or called and not _NAMES.isdisjoint(code.co_names):
            return True
    return any(isinstance(constant, CodeType) and _asks(constant) for constant in code.co_consts)
