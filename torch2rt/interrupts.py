"""Calls into TensorRT that take minutes, and that Ctrl-C ends all the same.

Python handles Ctrl-C in its main thread, and only between two steps of Python's own. So such a call is made in a thread
of its own, and the main thread waits for it.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
GRACE = 0.2  # seconds in which a call that is to end may do so

_abandoned: list[threading.Event] = []  # set when the call ends
_exit_codes: list[int] = []  # the one that Python is to end with at once, if any


def interruptible(
    call: Callable[[], Result], cancel: Callable[[], None], meanwhile: Callable[[], None] = lambda: None
) -> Result:
    """The result of a call, or the exception that a signal raises in the meantime: `KeyboardInterrupt` for Ctrl-C.

    `cancel` asks the call to end. One that does not end soon is left behind: it goes on in its thread until it ends.
    `meanwhile` runs in the caller's thread while the call does; what it raises ends the call, too.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal is handled here
        meanwhile()
        return call()
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="torch2rt", daemon=True).start()
        meanwhile()
        while not ended.wait(0.1):  # on Windows, a wait without a limit cannot be interrupted
            pass
    except BaseException:
        cancel()
        _abandoned.append(ended)
        ended.wait(GRACE)
        raise
    if errors:
        raise errors[0]
    return results[0]


def exit_at_once(code: int) -> None:
    """Have Python end with this exit code as soon as it starts to end, without the seconds of taking itself down."""
    _exit_codes.append(code)


@atexit.register
def _exit() -> None:
    """Do not let Python take itself down while an abandoned call runs: the call's messages to Python would be fatal.

    The exit code cannot be told here. An uncaught KeyboardInterrupt is known by its traceback, which Python has
    printed: then the process ends at once, as Python lets it end. After one that somebody has caught, the call's end is
    waited for.
    """
    uncaught = getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")  # that of a session
    try:
        while not all(ended.wait(0.1) for ended in _abandoned) and not uncaught and not _exit_codes:
            pass
    except KeyboardInterrupt:
        pass
    if all(ended.is_set() for ended in _abandoned) and not _exit_codes:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not _exit_codes and os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit([130, *_exit_codes][-1])
