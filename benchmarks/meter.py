"""What the benchmarks measure with: seconds and peak memory of stages, and conversions in processes of their own."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class Meter:
    """The seconds of each stage, and the process's peak memory in bytes above where it was at the start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        _reset_peak()
        self.base = _memory("VmRSS")

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        self.seconds[name] = time.perf_counter() - start
        self.peak[name] = _memory("VmHWM") - self.base
        return result


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # where it is not allowed, the peak is that of the whole process: an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def _memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a script prints last, or what went wrong, under "error"."""
    done = subprocess.run([sys.executable, script, *arguments], check=False, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit code {done.returncode}: {why}", "seconds": {}, "peak": {}}


def verdict(checks: Iterable[tuple[bool, str]], strict: bool) -> int:
    """Print which aims are met; the exit status, which is 1 only if it is `strict` and one is missed."""
    checks = list(checks)
    print()
    for met, text in checks:
        print(f"{'met   ' if met else 'missed'} {text}")
    return 1 if strict and not all(met for met, _ in checks) else 0
