"""One segment as it is called: by an engine, or by torch where an engine does not serve the sizes that it meets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.growth import Growth
from torch2rt.runtime.partitioned.schedule import Runner
from torch2rt.runtime.partitioned.torch_segment import TorchSegment

FEW_CALLS = 3  # of torch's, which take the host about as long as the replay of a CUDA graph


class Part(NamedTuple):
    """A segment, and for an engine that may meet sizes beyond its range the same calls as torch's.

    `place` is its index in the module, and `growth` what becomes of the engine where sizes are too large.
    """

    place: int
    segment: TRTModule | TorchSegment
    eager: TorchSegment | None
    growth: Growth

    def runner(self) -> Runner:
        """The segment as a function of its tensors."""
        place, segment, eager, growth = self
        if isinstance(segment, TorchSegment):
            return segment.forward
        if eager is None and all(spec.opt for spec in segment._interface().inputs):
            return segment.forward

        def run_engine(*tensors: torch.Tensor) -> Any:
            tensors = on_one_gpu(tensors)
            if eager is not None and not serves(segment._interface(), tensors):
                if not growth.grow(place, segment, tensors):
                    return eager(*tensors)
            return segment(*tensors)

        return run_engine

    def may_be_captured(self) -> bool:
        """Whether the calls may be part of a CUDA graph, as far as is known without trying."""
        return isinstance(self.segment, TRTModule) or not (self.segment.draws or self.segment.waits)

    def is_long(self) -> bool:
        """Whether torch makes more calls than take about as long as the replay of a CUDA graph."""
        return isinstance(self.segment, TorchSegment) and self.segment.calls > FEW_CALLS

    def has_own_results(self) -> bool:
        """Whether nobody else knows of the memory of its results, as of an engine's."""
        return isinstance(self.segment, TRTModule) and self.eager is None

    def constants(self) -> Iterator[torch.Tensor]:
        """The tensors that torch's calls keep between calls."""
        for each in (self.segment, self.eager):
            if isinstance(each, TorchSegment):
                yield from each.constants()

    def chosen(self, tensors: Sequence[torch.Tensor]) -> TRTModule | TorchSegment:
        """What makes the calls for these tensors, as the engine is now."""
        if self.eager is not None and not serves(self.segment._interface(), tensors):
            self.growth.check(self.place, self.segment._interface(), [tuple(t.shape) for t in tensors])
            return self.eager
        return self.segment


def on_one_gpu(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors, with those on the GPU that torch keeps on the CPU, as it does with some of 0 dimensions."""
    device = next((t.device for t in tensors if t.is_cuda), None)
    return tensors if device is None else tuple(t if t.is_cuda else t.to(device) for t in tensors)


def serves(interface: Interface, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an engine takes tensors of these shapes."""
    with contextlib.suppress(InputError):
        interface.check([tuple(t.shape) for t in tensors], [t.dtype for t in tensors])
        return True
    return False
