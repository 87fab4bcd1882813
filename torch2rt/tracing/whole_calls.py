"""Calls of Python code that a trace with fallback records as one call each, as it cannot look into them.

Functions of `torch.autograd.Function` are traced like the module's own code, but for those that take tensors out of
torch, as to numpy or to a kernel of another library. Modules and functions that the user has given to `graph_break` are
never traced.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.errors import InputError
from torch2rt.python_calls import PythonCall
from torch2rt.tracing.patches.process_switches import Shared
from torch2rt.tracing.tracer import Tracer

C = TypeVar("C", bound=Callable[..., Any])
_HERE = threading.local()  # `tracer` of the trace with fallback that is under way in this thread
_APPLY = torch.autograd.Function.__dict__["apply"]


def graph_break(code: C) -> C:
    """Let a submodule or a function run in torch, whatever its Python does, where a module is converted with fallback.

    Such Python may look at values, loop over them, and return as many elements as it finds. For the trace it runs on
    drawn values, which shows what it returns: tensors in nested tuples, lists and dicts, always as many and of the same
    types. It must neither return views of its inputs nor write to them. A converted module that has one cannot be
    saved.

    - A module is returned itself. Nothing changes for other calls of it; `del module.forward` undoes this.
    - For a function, one that does the same is returned, to be called in its place: as a decorator, or where another
      library's code finds it, such as `transform.paste_masks_in_image = graph_break(paste_masks_in_image)`. The engine
      has its calls if the whole of the module can be one.

    Raises `InputError` for what is neither.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), graph_break(torch.nn.Softmax(-1)), torch.nn.Linear(5, 2))
    >>> from torch2rt import torch2rt
    >>> [type(s).__name__ for s in torch2rt(model, [torch.randn(2, 3)], fallback=True, min_segment_calls=1).segments]
    ['TRTModule', 'TorchSegment', 'TRTModule']
    """
    if isinstance(code, torch.nn.Module):
        if not isinstance(code.forward, _Forward):
            code.forward = _Forward(code)
        return code
    if not callable(code) or isinstance(code, type):
        raise InputError(f"graph_break takes a torch.nn.Module or a function, not a {type(code).__name__}.")

    @functools.wraps(code)
    def in_torch(*args: Any, **kwargs: Any) -> Any:
        tracer: Tracer | None = getattr(_HERE, "tracer", None)
        if tracer is None or not tracer.values.is_traced((args, kwargs)):
            return code(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return tracer.whole(FunctionCall(code), args, kwargs, code)

    return in_torch  # type: ignore[return-value]


def has_graph_breaks(module: torch.nn.Module) -> bool:
    """Whether the user has given a submodule to `graph_break`."""
    return any(isinstance(vars(m).get("forward"), _Forward) for m in module.modules())


class _Forward:
    """The `forward` of a module that is not to be traced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.original = module, type(module).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer: Tracer | None = getattr(_HERE, "tracer", None)
        if tracer is None or not tracer.values.is_traced((args, kwargs)):
            return self.original(self.module, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            probe = copy.deepcopy(self.module)  # which may keep something between calls
            return tracer.whole(ModuleCall(self.module), args, kwargs, lambda *a, **k: self.original(probe, *a, **k))


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if leaf is not None]


class ModuleCall(PythonCall):
    """A call of a module that is not traced, as a flat tuple of its tensors."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_tensors(self.module(*args, **kwargs)))


class FunctionCall(PythonCall):
    """A call of a function that is not traced, as a flat tuple of its tensors."""

    def __init__(self, function: Callable[..., Any], known_as: Any = None) -> None:
        known_as = known_as or function
        super().__init__(getattr(known_as, "__name__", type(known_as).__name__))
        self.function, module = function, getattr(known_as, "__module__", None) or "torch"
        # torch.fx would write a call of torch's own, by a name that means something else there, or nothing.
        self.__module__ = __name__ if module.partition(".")[0] == "torch" else module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_tensors(self.function(*args, **kwargs)))


@contextmanager
def whole_calls(tracer: Tracer) -> Iterator[None]:
    """While this thread traces with fallback, let such code be calls of their own."""
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
    call = FunctionCall(original, cls)
    return tracer.whole_if_unknown(call, args, kwargs, lambda: original(*args, **kwargs))
