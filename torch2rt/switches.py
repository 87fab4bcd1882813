"""What a trace switches off in the process, and on again: other traces may be under way in other threads."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.Lock()
_TRACES: list[Any] = []


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let `torch.compile` run what it is given as it is: it cannot compile fake tensors, and we trace that code.

    torch has one such switch for the process, so the first of several traces at once sets it and the last sets it back.
    """
    with _LOCK:
        if not _TRACES:
            _TRACES.append(torch.compiler.set_stance("force_eager"))
        _TRACES.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _TRACES.pop()
            if len(_TRACES) == 1:
                _TRACES.pop().__exit__(None, None, None)


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
