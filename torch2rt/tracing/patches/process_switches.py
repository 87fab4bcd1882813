"""What a trace switches off in the process, and on again: other traces may be under way in other threads."""

from __future__ import annotations

import builtins
import functools
import gc
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack

from torch2rt.sizes import is_symbolic


class Shared:
    """A switch that the process has one of: the first of several traces at once enters `turn()`, the last leaves it."""

    def __init__(self, turn: Callable[[], AbstractContextManager[Any]]) -> None:
        self.turn, self.lock, self.users = turn, threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.turned = self.turn()
                self.turned.__enter__()
            self.users += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.turned.__exit__(None, None, None)


# Let `torch.compile` run what it is given as it is: it cannot compile fake tensors, and we trace that code.
without_compiler = Shared(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def without_collections() -> Iterator[None]:
    """Put off Python's garbage collection: a trace makes so many objects that it would look through all of the process
    several times, which takes a fifth of the trace's time.
    """
    if not gc.isenabled():  # the caller wants it so, or another trace, which enables it again
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")  # of errors that we report, too


@contextmanager
def without_logs() -> Iterator[None]:
    """Keep the warnings and errors of torch's fake tensors in this thread out of the log: they are expected."""
    logs, here = [logging.getLogger(name) for name in LOGS], threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno < logging.WARNING

    for log in logs:
        log.addFilter(is_wanted)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(is_wanted)


class PerThread:
    """A function of the process's that another one takes the place of, for the threads that are inside of the context.

    `stand_in(original)` makes the other one. `original` serves all other threads, and again everyone once the last
    thread has left.
    """

    def __init__(self, owner: Any, name: str, stand_in: Callable[[Any], Any]) -> None:
        self.inside: dict[int, int] = {}  # how often a thread has entered, by its ident
        self.switch = Shared(lambda: self._replaced(owner, name, stand_in))

    @contextmanager
    def _replaced(self, owner: Any, name: str, stand_in: Callable[[Any], Any]) -> Iterator[None]:
        original, inside, here = getattr(owner, name), self.inside, threading.get_ident
        other = stand_in(original)

        @functools.wraps(original)
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (other if here() in inside else original)(*args, **kwargs)

        setattr(owner, name, choose)
        try:
            yield
        finally:
            if getattr(owner, name) is choose:  # or somebody else has replaced it since, and calls this one
                setattr(owner, name, original)

    def __enter__(self) -> None:
        self.switch.__enter__()
        ident = threading.get_ident()
        self.inside[ident] = self.inside.get(ident, 0) + 1

    def __exit__(self, *exception: object) -> None:
        ident = threading.get_ident()
        self.inside[ident] -= 1
        if not self.inside[ident]:
            del self.inside[ident]
        self.switch.__exit__(*exception)


def _symbolic_len(original: Callable[[Any], int]) -> Callable[[Any], Any]:
    def length(value: Any, /) -> Any:
        if isinstance(value, FakeTensor) and value.dim() and is_symbolic(size := value.shape[0]):
            return size
        return original(value)

    return length


def _original_of_a_script(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(self, "_torchdynamo_inline", None)  # for torch.compile, which needs it as we do
        if original is None or getattr(self, "__name__", "") != "ScriptFunction":
            return compiled(self, *args, **kwargs)  # what `torch.jit.trace` made is not what the original is
        floats = {a.name for a in self.schema.arguments if str(a.type) == "float"}  # TorchScript makes ints floats here
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        return original(**{k: torch.sym_float(v) if k in floats else v for k, v in given.items()})

    return call


_passed_over: weakref.WeakSet[Any] = weakref.WeakSet()


def _no_grad_enter(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def enter(self: Any) -> None:
        if _get_current_function_mode_stack():  # the module's own code: in torch's and ours, the tracer steps aside
            _passed_over.add(self)
        else:
            original(self)

    return enter


def _no_grad_exit(original: Callable[..., None]) -> Callable[..., None]:
    def leave(self: Any, *exception: Any) -> None:
        if self in _passed_over:
            _passed_over.discard(self)
        else:
            original(self, *exception)

    return leave


FOR_THIS_THREAD = (
    # `len(x)` is the first size of a traced tensor, of which Python would make a plain number
    PerThread(builtins, "len", _symbolic_len),
    # a function of `torch.jit.script` runs as the Python it was made from: TorchScript knows no symbolic sizes, and
    # would take a dynamic size for the number that stands for it
    PerThread(torch.jit.ScriptFunction, "__call__", _original_of_a_script),
    # `torch.inference_mode` in a module is what `torch.no_grad` is, under which a trace is: torch does not count the
    # writes to inference tensors
    PerThread(torch.inference_mode, "__enter__", _no_grad_enter),
    PerThread(torch.inference_mode, "__exit__", _no_grad_exit),
)
