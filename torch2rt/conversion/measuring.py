"""Which segments run faster as an engine, and which as torch calls, by measuring both."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface

GAIN = 1.01  # how many times as fast torch must be: measurements vary
WARM_UP, RUNS, ROUNDS = 3, 10, 10


def gpu_seconds(run: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> float:
    """The seconds of one call on the GPU, its host time included where the GPU waits for it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(RUNS):
        run(*tensors)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / RUNS


seconds = gpu_seconds  # tests put another one in its place


def check_measurable() -> None:
    """Raise `InputError` where nothing can be measured."""
    if seconds is gpu_seconds and not torch.cuda.is_available():
        raise InputError(
            'fallback="measure" runs segments on a GPU, and there is none here. Convert on the GPU to be used.'
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """The seconds of the same calls: as an engine, and by torch, by whether torch's compiler made the kernels."""

    engine: float
    torch: Mapping[bool, float]

    @property
    def is_faster_in_torch(self) -> bool:
        """Whether the engine is slower than the best that torch does, by more than measurements vary."""
        return bool(self.torch) and self.torch[self.compiled] * GAIN < self.engine

    @property
    def compiled(self) -> bool:
        """Whether the fastest way of torch's has kernels of its compiler."""
        return min(self.torch, key=self.torch.__getitem__, default=False)

    @property
    def reason(self) -> str:
        """Why the calls are left to torch, in words."""
        what = "torch.compile" if self.compiled else "torch"
        return (
            f"{what} was faster: {self.torch[self.compiled] * 1e3:.3f} ms, and {self.engine * 1e3:.3f} ms as an engine"
        )

    def __str__(self) -> str:
        named = [("torch.compile" if way else "torch", seconds) for way, seconds in self.torch.items()]
        return ", ".join(f"{what} {seconds * 1e3:.3f} ms" for what, seconds in [("TensorRT", self.engine), *named])


def measured(
    engine: Callable[..., Any],
    ways: Mapping[bool, Callable[[], Callable[..., Any]]],
    tensors: Sequence[torch.Tensor],
    graphs: bool = False,
) -> Measured:
    """What calls take as an engine, or several, and by torch.

    `ways` make what runs them by torch, by whether its compiler does; calls that it cannot compile are not its.
    `graphs`: calls will be replayed as CUDA graphs, so they are measured so, as far as they can be captured. All are
    measured in turn, and the best of several rounds counts: a GPU's clock changes from one second to the next.
    """
    is_own = seconds is gpu_seconds
    times: dict[bool | None, list[float]] = {}
    runs: dict[bool | None, Callable[..., Any]] = {}
    stream = torch.cuda.Stream() if is_own else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        makers: list[tuple[bool | None, Callable[[], Callable[..., Any]]]] = [(None, lambda: engine), *ways.items()]
        for way, make in makers:
            try:
                runs[way] = _prepared(make(), tensors, graphs) if is_own else make()
                times[way] = [seconds(runs[way], tensors)]
            except Exception:
                if not way:
                    raise
        for way in [way for _ in range(ROUNDS - 1) for way in times]:
            times[way].append(seconds(runs[way], tensors))
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    best = {way: min(found) for way, found in times.items()}
    return Measured(best.pop(None), {bool(way): value for way, value in best.items()})


def _prepared(run: Callable[..., Any], tensors: Sequence[torch.Tensor], graphs: bool) -> Callable[..., Any]:
    """A function that has been called before, or that replays a call of it."""
    for _ in range(WARM_UP):
        run(*tensors)
    stream = torch.cuda.current_stream()
    stream.synchronize()
    if not graphs:
        return run
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # TensorRT has its own threads
            kept = run(*tensors)
    except Exception:  # what waits for the GPU cannot be captured
        torch.cuda.synchronize()
        return run

    def replay(*_: torch.Tensor) -> Any:
        graph.replay()
        return kept

    return replay


def examples(interface: Interface, device: torch.device) -> list[torch.Tensor]:
    """Drawn tensors of the opt shapes: small numbers, and zeros in the place of indices."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in interface.inputs:
        is_number = spec.dtype.is_floating_point or spec.dtype.is_complex
        values = torch.rand(spec.opt, generator=generator) if is_number else torch.zeros(spec.opt)
        made.append(values.to(device, spec.dtype).contiguous(memory_format=spec.memory_format))
    return made
