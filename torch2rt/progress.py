"""What a terminal shows while a module is traced."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PATIENCE = 0.5  # seconds after which a spinner appears


def is_shown(progress: bool | None) -> bool:
    """Whether progress is shown: as asked, or where stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


class Spinner:
    """A line on stderr that turns while work is under way, with the work's label, its seconds, and a detail."""

    def __init__(self, label: str, progress: bool | None) -> None:
        self._label, self._is_shown, self._start = label, is_shown(progress), time.monotonic()
        self._details: list[Callable[[], str]] = []

    @contextmanager
    def turning(self, detail: Callable[[], str]) -> Iterator[None]:
        """Turn while a `with` block runs, and show `detail()`; of nested blocks, that of the innermost."""
        self._details.append(detail)
        thread = None
        if self._is_shown and len(self._details) == 1:
            done = threading.Event()
            thread = threading.Thread(target=self._turn, args=(done,), daemon=True)
            thread.start()
        try:
            yield
        finally:
            if thread is not None:
                done.set()
                thread.join()
            self._details.pop()

    def _turn(self, done: threading.Event) -> None:
        stream, count = sys.stderr, 0
        frames = FRAMES if (stream.encoding or "").lower().replace("-", "") == "utf8" else "|/-\\"
        while not done.wait(max(0.1, self._start + PATIENCE - time.monotonic())):
            line = f"{frames[count % len(frames)]} {self._label} {time.monotonic() - self._start:.0f} s"
            line = f"{line} {self._details[-1]()}"[: shutil.get_terminal_size().columns - 1]
            stream.write(f"\r{line}\x1b[K")
            stream.flush()
            count += 1
        if count:
            stream.write("\r\x1b[K")
            stream.flush()
