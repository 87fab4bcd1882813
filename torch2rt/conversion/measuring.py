"""Which segments run faster as an engine, and which as torch calls, by measuring both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface

GAIN = 1.05  # how many times as fast torch must be: measurements vary
WARM_UP, RUNS, REPEATS = 3, 10, 5


def gpu_seconds(run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> float:
    """The seconds of one call on the GPU, its host time included where the GPU waits for it."""
    with torch.no_grad():
        for _ in range(WARM_UP):
            run(*tensors)
        found = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(RUNS):
                run(*tensors)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - start) / RUNS)
    return statistics.median(found)


seconds = gpu_seconds  # tests put another one in its place


def check_measurable() -> None:
    """Raise `InputError` where nothing can be measured."""
    if seconds is gpu_seconds and not torch.cuda.is_available():
        raise InputError(
            'fallback="measure" runs segments on a GPU, and there is none here. Convert on the GPU to be used.'
        )


def faster_in_torch(
    engine: Callable[..., Any], calls: Callable[..., Any], tensors: Sequence[torch.Tensor]
) -> str | None:
    """Why a segment is torch's, in words; `None` if its engine is at least about as fast."""
    ours, theirs = seconds(engine, tensors), seconds(calls, tensors)
    if theirs * GAIN >= ours:
        return None
    return f"torch was faster: {theirs * 1e3:.3f} ms, and {ours * 1e3:.3f} ms as an engine"


def examples(interface: Interface, device: torch.device) -> list[torch.Tensor]:
    """Drawn tensors of the opt shapes: small numbers, and zeros in the place of indices."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in interface.inputs:
        is_number = spec.dtype.is_floating_point or spec.dtype.is_complex
        values = torch.rand(spec.opt, generator=generator) if is_number else torch.zeros(spec.opt)
        made.append(values.to(device, spec.dtype).contiguous(memory_format=spec.memory_format))
    return made
