"""A gate that lets many in at once, or one alone, and costs the many next to nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Gate:
    """Who enters says so first, and then looks whether the gate is closed; who wants to be alone closes it first, and
    then looks who is inside. So of two that come at the same time, one sees the other.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held by who is alone
        self.inside: set[Any] = set()
        self.closed = False
        self.leave = self.inside.discard

    def enter(self, who: Any) -> None:
        """Go in, beside others, until `leave(who)`, also if this is interrupted; waits while somebody is alone."""
        self.inside.add(who)
        if self.closed:
            self.inside.discard(who)
            with self.lock:
                self.inside.add(who)  # who closes it next will see

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until everybody has left, and keep the others out."""
        with self.lock:
            self.closed = True
            try:
                while self.inside:
                    time.sleep(0)  # they leave soon; to be woken takes longer
                yield
            finally:
                self.closed = False
