"""The oracle of an engine: its network evaluated with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch2rt.backend.tensorrt import LOG
from torch2rt.interface import Interface
from torch2rt.network import Network
from torch2rt.reference.evaluator import Evaluator
from torch2rt.runtime.converted import Evaluated
from torch2rt.runtime.live import Live
from torch2rt.runtime.variants import Dispatch


class ReferenceModule(Evaluated):
    """A network evaluated with torch, layer by layer, under the converted module's calling convention.

    Of several networks, the one is evaluated that serves the shapes of a call; `interface` is that of all together.
    """

    def __init__(
        self,
        *networks: Network,
        interface: Interface | None = None,
        live: Live | None = None,
        follow: Callable[[], None] | None = None,
        owner: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._live, self._follow = live, follow
        self._owner = (owner,)  # which `follow` refits; in a tuple, as it is no part of this module
        self._read(live.up_to_date() if live is not None else networks)
        self._dispatch: Dispatch | None = None
        if len(networks) > 1 and interface is not None:
            self._dispatch = Dispatch(interface, [network.interface for network in networks])

    @property
    def interface(self) -> Interface:
        """Names, dtypes and ranges of inputs and outputs."""
        return self._networks[0].interface if self._dispatch is None else self._dispatch.interface

    def _interface(self) -> Interface:
        return self.interface

    def outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The engine's outputs for its inputs, each in the order of the interface."""
        if self._follow is not None:
            self._follow()
        if (live := self._live) is not None:
            if (networks := live.up_to_date()) is not self._networks:
                self._read(networks)
            live.reads.acquire(me := object())
        else:
            for network in self._networks:
                network.check_weights()
        try:
            return self._outputs(tensors)
        finally:
            if live is not None:
                live.reads.release(me)

    def _read(self, networks: Sequence[Network]) -> None:
        with LOG.capture():  # TensorRT complains when asked for attributes that a dynamic layer does not have
            self._evaluators = [Evaluator(network.definition, network.weights_by_layer()) for network in networks]
        self._networks = networks

    def _outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        shapes, dtypes = [tuple(t.shape) for t in tensors], [t.dtype for t in tensors]
        self.interface.check(shapes, dtypes)
        index = 0 if self._dispatch is None else self._dispatch.find(shapes)
        interface = self._networks[index].interface
        with torch.no_grad():
            given = {spec.name: x.permute(spec.axes) for spec, x in zip(interface.inputs, tensors, strict=True)}
            outputs = self._evaluators[index](given)
        return [outputs[name] for name in interface.outputs]
