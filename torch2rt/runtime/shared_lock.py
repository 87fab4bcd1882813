"""A lock that many threads may hold at once, or one alone, and that costs the many next to nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
TURNS = 1000  # calls that are made one after the other once two have met


class SharedLock:
    """Calls of an engine hold it together; who makes an execution context, or runs one first, holds it alone.

    A sharing holder registers first and looks for an exclusive one second, and an exclusive holder the other way round.
    So of two threads that arrive together, at least one sees the other.

    Where threads keep meeting for the exclusive lock, each waits inside of its call, with some of Python's work done
    and some to come, and all of these want Python's own lock from the one that runs. Whole calls in turn are more a
    second then: after a meeting, the next ones should hold `turn` and count down `turns`.
    """

    def __init__(self) -> None:
        self.exclusive_lock = threading.RLock()
        self.holders: set[Any] = set()  # that share it
        self.is_exclusive = False
        self.release = self.holders.discard
        self.turn, self.turns = threading.RLock(), 0

    def acquire(self, holder: Any) -> None:
        """Share the lock until `release(holder)`, which is right also if this call is interrupted.

        It waits while the lock is held exclusively.
        """
        self.holders.add(holder)
        if self.is_exclusive:
            self.holders.discard(holder)
            with self.exclusive_lock:
                self.holders.add(holder)  # the next exclusive holder will see it

    def alone(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make a call while nobody shares the lock, and others are kept from sharing it. It may be made in another."""
        if self.is_exclusive:
            self.turns = TURNS
        with self.exclusive_lock:
            before, self.is_exclusive = self.is_exclusive, True
            try:
                while self.holders:
                    time.sleep(0)  # they release it soon; to be woken takes longer
                return call(*args)
            finally:
                self.is_exclusive = before

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """As `alone`, for what is done in a `with` statement, which takes longer."""
        with self.exclusive_lock:
            before, self.is_exclusive = self.is_exclusive, True
            try:
                while self.holders:
                    time.sleep(0)
                yield
            finally:
                self.is_exclusive = before
