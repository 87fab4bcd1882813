"""The oracle of a module with torch calls: its networks evaluated with torch, and the torch calls themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.interface import Interface
from torch2rt.network import Network
from torch2rt.runtime.converted import Evaluated
from torch2rt.runtime.partitioned.growth import Growth
from torch2rt.runtime.partitioned.parts import serves
from torch2rt.runtime.partitioned.schedule import Carriers, Runner, Running, Schedule, address
from torch2rt.runtime.partitioned.torch_segment import TorchSegment
from torch2rt.runtime.reference_module import ReferenceModule


@dataclasses.dataclass
class PartitionedNetwork:
    """What the segments of a module were lowered to: a `Network` for each engine, the calls themselves for torch.

    `eager` has the calls of networks whose sizes depend on values, and so may be such as are not served; `growth` says
    what becomes of these.
    """

    parts: list[Any]  # Network or TorchSegment
    schedule: Schedule
    interface: Interface
    assumptions: list[str] = dataclasses.field(default_factory=list)
    eager: dict[int, TorchSegment] = dataclasses.field(default_factory=dict)
    growth: Growth = dataclasses.field(default_factory=Growth)

    @property
    def definitions(self) -> list[Any]:
        return [part.definition for part in self.parts if isinstance(part, Network)]

    @property
    def nan(self) -> str:
        return next((part.nan for part in self.parts if isinstance(part, Network)), "keep")

    def reference(self) -> PartitionedReference:
        """The program with its networks evaluated by torch."""
        return PartitionedReference(self)


class PartitionedReference(Evaluated):
    """A partitioned module without engines: networks are evaluated with torch."""

    def __init__(
        self, network: PartitionedNetwork, watch: Callable[[Network, Sequence[torch.Tensor]], None] | None = None
    ) -> None:
        """With `watch`, each network that is evaluated is handed to it before, with what it is given."""
        super().__init__()
        self.whole = network
        self.parts = [part.copy() if isinstance(part, TorchSegment) else None for part in network.parts]
        self.eager = {index: segment.copy() for index, segment in network.eager.items()}
        runners: list[Runner] = [
            mine or _evaluated(index, part, self.eager.get(index), network.growth, watch)
            for index, (mine, part) in enumerate(zip(self.parts, network.parts, strict=True))
        ]
        self.running = Running(network.schedule, runners, Carriers(), self._constants)

    def _constants(self) -> set[int]:
        return {address(t) for part in self.parts if part is not None for t in part.constants()} - {0}

    @property
    def interface(self) -> Interface:
        """Names, dtypes and ranges of inputs and outputs."""
        return self.whole.interface

    def _interface(self) -> Interface:
        return self.whole.interface

    def outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for the input tensors, each in the order of the interface."""
        self.interface.check([tuple(t.shape) for t in tensors], [t.dtype for t in tensors])
        return self.running(tensors)


def _evaluated(
    index: int,
    network: Network,
    eager: TorchSegment | None,
    growth: Growth,
    watch: Callable[[Network, Sequence[torch.Tensor]], None] | None,
) -> Runner:
    reference = ReferenceModule(network)

    def evaluate(*tensors: torch.Tensor) -> Any:
        if eager is None or serves(reference.interface, tensors):
            if watch is not None:
                watch(network, tensors)
            return reference.outputs(tensors)
        growth.check(index, reference.interface, [tuple(tensor.shape) for tensor in tensors])
        return eager(*tensors)

    return evaluate
