"""Callables of traced graphs that are more than torch's functions, and that no file can hold.

They draw from a generator of the module's, change the state of one, or run the user's Python.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch


class PythonCall:
    """A callable that torch.fx can print. `refusal` says why it is no engine's."""

    refusal = "it is Python code that is not traced"

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name


class DrawsFrom(PythonCall):
    """A torch function with a generator of its own, which the module keeps, or has made."""

    refusal = "an engine draws no random numbers"

    def __init__(self, function: Callable[..., Any], generator: torch.Generator) -> None:
        super().__init__(getattr(function, "__name__", "draw").split(".")[0])
        self.function, self.generator = function, generator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, generator=self.generator, **kwargs)


class SavesState(PythonCall):
    """Keeps the state of a generator, for a `SetsState` of the same call, in the same thread."""

    refusal = "an engine has no generators of random numbers"

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__("save_state")
        self.generator, self.kept = generator, threading.local()

    def __call__(self) -> None:
        self.kept.state = self.generator.get_state()


class SetsState(PythonCall):
    """Gives a generator a state: one that is known, as after `torch.manual_seed(3)`, or one that was saved."""

    refusal = SavesState.refusal

    def __init__(self, generator: torch.Generator, state: bytes | SavesState) -> None:
        digest = "" if isinstance(state, SavesState) else hashlib.sha256(state).hexdigest()[:16]
        super().__init__(f"set_state_{digest}" if digest else "restore_state")
        self.generator, self.state = generator, state

    def __call__(self) -> None:
        if isinstance(self.state, SavesState):
            self.generator.set_state(self.state.kept.state)
        else:
            set_state(self.generator, self.state)


def set_state(generator: torch.Generator, state: bytes) -> None:
    """Give a generator a state of `get_state`, as bytes."""
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
