"""One segment as it is called: by an engine, or by torch where an engine does not serve the sizes that it meets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from torch2rt.errors import InputError
from torch2rt.interface import Interface
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.schedule import Runner
from torch2rt.runtime.partitioned.torch_segment import TorchSegment


class Part(NamedTuple):
    """A segment, and for an engine that may meet sizes beyond its range the same calls as torch's."""

    segment: TRTModule | TorchSegment
    eager: TorchSegment | None = None

    def runner(self) -> Runner:
        """The segment as a function of its tensors."""
        segment, eager = self
        if isinstance(segment, TorchSegment):
            return segment.forward
        if eager is None and all(spec.opt for spec in segment._interface().inputs):
            return segment.forward

        def run_engine(*tensors: torch.Tensor) -> Any:
            tensors = on_one_gpu(tensors)
            if eager is not None and not serves(interface, tensors):
                return eager(*tensors)
            return segment(*tensors)

        interface = segment._interface()
        return run_engine

    def may_be_captured(self) -> bool:
        """Whether the calls may be part of a CUDA graph, as far as is known without trying."""
        return isinstance(self.segment, TRTModule) or not (self.segment.draws or self.segment.waits)

    def constants(self) -> Iterator[torch.Tensor]:
        """The tensors that torch's calls keep between calls."""
        for each in self:
            if isinstance(each, TorchSegment):
                yield from each.constants()

    def chosen(self, tensors: Sequence[torch.Tensor]) -> TRTModule | TorchSegment:
        """What makes the calls for these tensors."""
        if self.eager is not None and not serves(self.segment._interface(), tensors):
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
