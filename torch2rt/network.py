"""A TensorRT network under construction or done, with the weights that it reads."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from torch2rt.backend.tensorrt import LOG, TORCH_DTYPES
from torch2rt.interface import Interface
from torch2rt.structure import bare_name


@dataclasses.dataclass
class Network:
    """A TensorRT network and what must live as long as it does.

    `definition` is the `INetworkDefinition`. `weights` holds every tensor that the network reads, by the index of the
    layer and the role there: TensorRT refers to this memory and does not copy it. `assumptions` are for the report of
    the conversion (`torch2rt.engine.report.Report`). `nan` is what was asked of `lower`.
    """

    definition: Any
    builder: Any
    interface: Interface
    weights: dict[tuple[int, str], torch.Tensor] = dataclasses.field(default_factory=dict)
    assumptions: list[str] = dataclasses.field(default_factory=list)
    nan: str = "keep"
    building: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # TensorRT builds it once at a time

    @property
    def num_layers(self) -> int:
        return self.definition.num_layers

    def facts(self) -> dict[str, Any]:
        """What `torch2rt inspect` says of the network, as JSON values: the outputs' types, and the layers."""
        with LOG.capture():
            outputs = map(self.definition.get_output, range(self.definition.num_outputs))
            layers = map(self.definition.get_layer, range(self.num_layers))
            return {
                "outputs": {x.name: describe(x).replace("-1", "?") for x in outputs},
                "layers": [[layer.name, layer.type.name] for layer in layers],
            }

    def __repr__(self) -> str:
        inputs = ", ".join(f"{i.name}: {i.describe()}" for i in self.interface.inputs)
        return f"Network({self.num_layers} layers, {inputs} -> {', '.join(self.interface.outputs)})"


def describe(tensor: Any) -> str:
    """Dtype and shape of a TensorRT tensor, such as `float32[2, -1]`."""
    dtype = bare_name(TORCH_DTYPES.get(tensor.dtype, tensor.dtype))
    try:
        return f"{dtype}{list(tensor.shape)}"
    except RuntimeError:
        return dtype
