"""Execution contexts that no call uses: which of them a call takes.

Changing shapes is cheap for a context that is not exact, and running with the same shapes again for one that is (see
`Execution`). So a stream on which shapes change often has one of each: the one for shapes that change, and the other
for the last shapes that came again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from torch2rt.backend.cuda import is_capturing
from torch2rt.runtime.execution import Execution

CHANGES = 16  # of a context's shapes, before shapes that change get a context that is not exact
REPEATS = 8  # calls with the same shapes in a row, before such a context leaves them to an exact one


class IdleContexts(Protocol):
    """Execution contexts that no call uses and that calls on a stream may take: a list, for torch's own streams."""

    def pop(self) -> Execution:
        """Take one; raises `IndexError` if there is none."""

    def append(self, execution: Execution, /) -> None:
        """Give one back, after a call on the current stream."""


class ExternalStreamContexts:
    """Idle execution contexts of streams that torch has not made (`torch.cuda.ExternalStream`).

    Such a stream may be destroyed at any time. So its contexts are kept for the next caller on any other such stream,
    each with an event after its last work.
    """

    def __init__(self) -> None:
        self.idle: list[tuple[Execution, torch.cuda.Event]] = []

    def pop(self) -> Execution:
        """Take one, once its last work is done; raises `IndexError` if there is none, or in a capture."""
        if is_capturing():
            raise IndexError
        execution, event = self.idle.pop()
        event.wait()
        return execution

    def append(self, execution: Execution) -> None:
        """Give one back, after a call on the current stream."""
        event = torch.cuda.Event()
        event.record()
        self.idle.append((execution, event))

    def synchronize(self) -> None:
        """Wait for the last work of all of them."""
        for _, event in self.idle:
            event.synchronize()


def best(
    taken: Execution, idle: list[Execution], tensors: Sequence[torch.Tensor], has_inexact: bool, make: Callable[[], Any]
) -> Execution:
    """Of an execution context and those that are idle on its stream, the one for a call; the others stay idle.

    It is one that has run last with these shapes, unless that is not exact and they come again and again: then it is an
    exact one. For other shapes it is one that is not exact, if `has_inexact` says that there are such, which `make`
    makes. Of several, it is the one that was idle the longest.
    """
    try:
        shapes = [tensor.shape for tensor in tensors]
    except (AttributeError, RuntimeError):
        return taken  # some are not tensors, which is an error of the call
    all_of_them = [*idle, taken]
    exact = not has_inexact
    for one in all_of_them:
        one.repeats = one.repeats + 1 if one.shapes == shapes else 0
    for one in all_of_them:
        if one.repeats:
            if one.exact or one.repeats <= REPEATS or is_capturing():
                return _exchanged(taken, idle, [one])
            exact = True
    found = [one for one in all_of_them if one.exact == exact]
    if found or exact or is_capturing():
        return _exchanged(taken, idle, found)
    idle.append(taken)
    made: Execution = make()
    return made


def _exchanged(taken: Execution, idle: list[Execution], wanted: Sequence[Execution]) -> Execution:
    """The first of the wanted contexts that is still there, in exchange for the one that was taken."""
    for one in wanted:
        if one is taken:
            break
        if _is_removed(one, idle):
            idle.append(taken)
            return one
    return taken


def take_exact(idle: IdleContexts) -> Execution | None:
    """Take an exact one of those that are idle on one of torch's streams, if there is any."""
    those = idle if isinstance(idle, list) else []
    return next((one for one in those[:] if one.exact and _is_removed(one, those)), None)


def _is_removed(one: Execution, idle: list[Execution]) -> bool:
    """Take one context; `False` if another thread has taken it."""
    try:
        idle.remove(one)
    except ValueError:
        return False
    return True
