"""`int(size * 0.5)` and `float(size)` in a module's Python, which would ask a dynamic size which number it is.

`int` is a class, which no function can take the place of: `isinstance(n, int)` and `type(n) == int` have to go on. So
another class does, whose calls with sizes give sizes, and which is `int` to whatever asks. It stands in the globals of
the Python files that were seen to make numbers of sizes, and nowhere else.
"""

from __future__ import annotations

import ctypes
import dis
import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack

from torch2rt.tracing.patches.process_switches import Shared


class _StandIn(type):
    """A class of classes that are another one to whatever asks, but for calls with one size of a trace."""

    original: type
    of_size: Callable[[Any], Any]
    symbolic: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], (torch.SymInt, torch.SymFloat)):
            return cls.of_size(args[0])
        if len(args) == 1 and not kwargs and isinstance(args[0], FakeTensor) and cls.original is int:
            return args[0].to(torch.int64).item()
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (cls.original, cls.symbolic))

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(getattr(other, "original", other), cls.original)

    def __eq__(cls, other: object) -> bool:
        return cls.original is getattr(other, "original", other)

    def __hash__(cls) -> int:
        return hash(cls.original)


def _stand_in(original: type, symbolic: type, of_size: Callable[[Any], Any]) -> type:
    held = {"original": original, "symbolic": symbolic, "of_size": staticmethod(of_size)}
    return _StandIn(original.__name__, (original,), held)


_STAND_INS = {
    "int": _stand_in(int, torch.SymInt, torch.sym_int),
    "float": _stand_in(float, torch.SymFloat, torch.sym_float),
}


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def with_dtypes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a torch call, with dtypes in the place of `int` and its like: `x.to(int)`."""
    if not any(isinstance(value, type) for value in (*args, *kwargs.values())):
        return args, kwargs
    known = {key: _DTYPES.get(value, value) if isinstance(value, type) else value for key, value in kwargs.items()}
    return tuple(_DTYPES.get(value, value) if isinstance(value, type) else value for value in args), known


def maker_of_numbers(frame: FrameType | None) -> dict[str, Any] | None:
    """The globals of code that calls `int` or `float`, where a stand-in can take the place of these."""
    if frame is None or not any(name in frame.f_code.co_names and name not in frame.f_globals for name in _STAND_INS):
        return None
    return None if _asks_for_identity(frame.f_code) else frame.f_globals


def _asks_for_identity(code: CodeType) -> bool:
    """Whether code says `type(n) is int`, which a stand-in would answer wrongly."""
    found = list(dis.get_instructions(code))
    return any(
        one.argval in _STAND_INS and one.opname.startswith("LOAD_") and other.opname == "IS_OP"
        for one, other in itertools.pairwise(found)
    )


_lock = threading.Lock()
_users: dict[tuple[int, str], int] = {}  # how many traces want a stand-in, by the globals' id


def symbolic_numbers(scopes: Sequence[dict[str, Any]]) -> AbstractContextManager[None]:
    """Let `int(size)` and `float(size)` be sizes in code with these globals."""
    return standing_in([(scope, name, stand_in) for scope in scopes for name, stand_in in _STAND_INS.items()])


@contextmanager
def standing_in(places: Sequence[tuple[dict[str, Any], str, type]]) -> Iterator[None]:
    """Let classes stand for builtin ones of a name in some globals, if these have none of that name."""
    entered: list[tuple[dict[str, Any], str, type]] = []
    with _lock:
        for scope, name, stand_in in places:
            users = _users.get((id(scope), name), 0)
            if users or name not in scope:
                scope[name] = stand_in
                _users[id(scope), name] = users + 1
                entered.append((scope, name, stand_in))
    try:
        yield
    finally:
        with _lock:
            for scope, name, stand_in in entered:
                _users[id(scope), name] -= 1
                if not _users[id(scope), name]:
                    del _users[id(scope), name]
                    if scope.get(name) is stand_in:
                        del scope[name]


# `isinstance(size, int)` ---------------------------------------------------------------------------------------------


_TORCH = os.path.dirname(torch.__file__) + os.sep


def _class_for(plain: type) -> property:
    def its_class(self: Any) -> type:
        if not _get_current_function_mode_stack():  # most often: in torch's calls and ours, the tracer steps aside
            return type(self)
        asking = sys._getframe(1)
        name = str(asking.f_globals.get("__name__")).partition(".")[0]
        is_library = name == "torch2rt" or asking.f_code.co_filename.startswith(_TORCH)
        return type(self) if is_library else plain

    return property(its_class)


@contextmanager
def _plain_classes() -> Iterator[None]:
    """Let sizes of a trace be of Python's types to the module's code: `isinstance` asks for `__class__`.

    That is an entry of the class's namespace, which Python sets by no other way than in the class's body.
    """
    spaces = {kind: gc.get_referents(kind.__dict__)[0] for kind in PLAIN}
    for kind, plain in PLAIN.items():
        spaces[kind]["__class__"] = _class_for(plain)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))
    try:
        yield
    finally:
        for kind, space in spaces.items():
            del space["__class__"]
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))


PLAIN = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
PLAIN_CLASSES = Shared(_plain_classes)
