"""What a trace switches off in the process, and on again: other traces may be under way in other threads."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


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


@contextmanager
def without_log(name: str) -> Iterator[None]:
    """Keep what this thread logs under a name to ourselves: errors that are expected."""
    log, here = logging.getLogger(name), threading.get_ident()

    def is_another_threads(record: logging.LogRecord) -> bool:
        return record.thread != here

    log.addFilter(is_another_threads)
    try:
        yield
    finally:
        log.removeFilter(is_another_threads)
