"""Functions of `torch.autograd.Function` in a trace: their `forward` is traced like the module's own code.

With fallback, one that takes tensors out of torch, as to numpy or to a kernel of another library, is a call of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torch2rt.tracing.patches.process_switches import Shared
from torch2rt.tracing.tracer import Tracer

_HERE = threading.local()  # `tracer` of the trace that is under way in this thread
_APPLY = torch.autograd.Function.__dict__["apply"]


class FunctionCall:
    """`function.apply`, as a callable that torch.fx can print."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


@contextmanager
def whole_functions(tracer: Tracer) -> Iterator[None]:
    """While this thread traces with fallback, let functions that cannot be traced be calls of their own."""
    before, _HERE.tracer = getattr(_HERE, "tracer", None), tracer
    try:
        with _REPLACED:
            yield
    finally:
        _HERE.tracer = before


@contextmanager
def _replaced() -> Iterator[None]:
    torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = _APPLY


_REPLACED = Shared(_replaced)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    original = _APPLY.__get__(None, cls)
    tracer: Tracer | None = getattr(_HERE, "tracer", None)
    if tracer is None or not tracer.values.is_traced((args, kwargs)):
        return original(*args, **kwargs)
    return tracer.whole_if_unknown(FunctionCall(cls), args, kwargs, lambda: original(*args, **kwargs))
