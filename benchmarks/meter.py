"""What the benchmarks measure with: seconds and peak memory of stages, processes of their own, kernels of calls."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Meter:
    """The seconds of each stage, on the clock and of all threads together, and the process's peak memory in bytes above
    where it was at the start.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.of_threads: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        _reset_peak()
        self.base = _memory("VmRSS")

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        start, start_of_threads = time.perf_counter(), time.process_time()
        result = function()
        self.seconds[name] = time.perf_counter() - start
        self.of_threads[name] = time.process_time() - start_of_threads
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


def in_a_process(script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that a script prints last, or what went wrong, under "error"; `environment` is added to ours."""
    command, variables = [sys.executable, script, *arguments], {**os.environ, **(environment or {})}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit code {done.returncode}: {why}", "seconds": {}, "peak": {}}


def kernel_times(call: Callable[[], Any], calls: int = 10) -> list[tuple[str, int, float]]:
    """What a call enqueues on the current stream: each kernel's name, how often it runs, its microseconds in all."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.current_stream().synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.current_stream().synchronize()
    sums: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    return [(name, round(counts[name] / calls), us / calls) for name, us in sums.most_common()]


def kernel_lines(times: Sequence[tuple[str, int, float]], most: int = 12) -> list[str]:
    """A line for each of the kernels that take most of a call."""
    return [f"  {us:9.1f} us {n:4} x {name[:110]}" for name, n, us in times[:most]]


def verdict(checks: Iterable[tuple[bool, str]], strict: bool) -> int:
    """Print which aims are met; the exit status, which is 1 only if it is `strict` and one is missed."""
    checks = list(checks)
    print()
    for met, text in checks:
        print(f"{'met   ' if met else 'missed'} {text}")
    return 1 if strict and not all(met for met, _ in checks) else 0
