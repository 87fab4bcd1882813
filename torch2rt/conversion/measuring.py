"""Which segments run faster as an engine, and which as torch calls, by measuring both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """That torch runs a segment faster: why, in words, and whether its kernels were torch's compiler's."""

    reason: str
    compiled: bool


def faster_in_torch(
    engine: Callable[..., Any],
    ways: Mapping[bool, Callable[[], Callable[..., Any]]],
    tensors: Sequence[torch.Tensor],
    graphs: bool = False,
) -> Found | None:
    """The faster way to run a segment by torch; `None` if its engine is at least about as fast.

    `ways` make what runs it, by whether torch's compiler does; one that it cannot compile is out of the question.
    `graphs`: calls will be replayed as CUDA graphs, so they are measured so, as far as they can be captured.
    """
    ours, theirs = _seconds(engine, tensors, graphs), {}
    for compiled, make in ways.items():
        try:
            theirs[compiled] = _seconds(make(), tensors, graphs)
        except Exception:
            if not compiled:
                raise
    best = min(theirs, key=theirs.__getitem__, default=False)
    if not theirs or theirs[best] * GAIN >= ours:
        return None
    what = "torch.compile" if best else "torch"
    return Found(f"{what} was faster: {theirs[best] * 1e3:.3f} ms, and {ours * 1e3:.3f} ms as an engine", best)


def _seconds(run: Callable[..., Any], tensors: Sequence[torch.Tensor], graphs: bool) -> float:
    if not graphs or seconds is not gpu_seconds:
        return seconds(run, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run(*tensors)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                run(*tensors)
        except Exception:  # what waits for the GPU cannot be captured
            torch.cuda.synchronize()
            return seconds(run, tensors)
        return seconds(lambda *_: graph.replay(), tensors)


def examples(interface: Interface, device: torch.device) -> list[torch.Tensor]:
    """Drawn tensors of the opt shapes: small numbers, and zeros in the place of indices."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in interface.inputs:
        is_number = spec.dtype.is_floating_point or spec.dtype.is_complex
        values = torch.rand(spec.opt, generator=generator) if is_number else torch.zeros(spec.opt)
        made.append(values.to(device, spec.dtype).contiguous(memory_format=spec.memory_format))
    return made
