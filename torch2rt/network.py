"""A TensorRT network under construction or done, with the weights that it reads."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from torch2rt.backend.tensorrt import LOG, TORCH_DTYPES
from torch2rt.interface import Interface
from torch2rt.structure import bare_name


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which of the module's parameters or buffers a tensor came from, if from one, and what was done to it."""

    parameter: str | None = None
    changes: tuple[str, ...] = ()

    def then(self, change: str) -> Origin:
        return Origin(self.parameter, (*self.changes, change))


COMPUTED = Origin(None, ("computed",))


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor that a network reads, and its origin: `Origin("conv.weight", ("folded with batch norm",))`."""

    tensor: torch.Tensor
    origin: Origin


class Origins:
    """The origins of torch tensors, which it keeps alive. A view of a tensor that it knows, it knows too."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[torch.Tensor, Origin]] = {}
        self._by_storage: dict[int, tuple[torch.Tensor, Origin]] = {}

    def record(self, tensor: torch.Tensor, origin: Origin) -> None:
        self._by_id[id(tensor)] = tensor, origin
        if tensor.layout is torch.strided:
            self._by_storage.setdefault(tensor.untyped_storage()._cdata, (tensor, origin))

    def derive(self, tensor: torch.Tensor, other: torch.Tensor, change: str) -> None:
        """Record that a tensor was made of another one, if that one's parameter is known."""
        if tensor is not other and (origin := self.of(other)).parameter is not None:
            self.record(tensor, origin.then(change))

    def of(self, tensor: torch.Tensor) -> Origin:
        """The origin of a tensor; `COMPUTED` where it is not known."""
        if (found := self._by_id.get(id(tensor))) is not None:
            return found[1]
        if not self._by_storage or tensor.layout is not torch.strided:
            return COMPUTED
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        if found is None:
            return COMPUTED
        whole, origin = found
        change = _view(tensor, whole)
        return origin.then(change) if change else origin


def _view(tensor: torch.Tensor, whole: torch.Tensor) -> str | None:
    """In a word, how a view differs from the tensor that it is a view of."""
    if tensor.shape == whole.shape and tensor.stride() == whole.stride():
        return None
    if tensor.numel() != whole.numel():
        return "sliced" if tensor.numel() < whole.numel() else "expanded"
    return "reshaped" if tensor.is_contiguous() == whole.is_contiguous() else "transposed"


@dataclasses.dataclass
class Network:
    """A TensorRT network and what must live as long as it does.

    `definition` is the `INetworkDefinition`. `weights` holds every tensor that the network reads, by the name of the
    layer and the role there, such as `conv1.conv2d:kernel`: TensorRT refers to this memory and does not copy it.
    `assumptions` are for the report of the conversion (`torch2rt.engine.report.Report`). `nan` is what was asked of
    `lower`.
    """

    definition: Any
    builder: Any
    interface: Interface
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    assumptions: list[str] = dataclasses.field(default_factory=list)
    nan: str = "keep"
    building: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # TensorRT builds it once at a time

    @property
    def num_layers(self) -> int:
        return self.definition.num_layers

    def weights_by_layer(self) -> dict[tuple[int, str], torch.Tensor]:
        """The weights' tensors by the index of the layer and the role there, as `torch2rt.reference` takes them."""
        index = {self.definition.get_layer(i).name: i for i in range(self.num_layers)}
        places = ((name.rpartition(":"), weight.tensor) for name, weight in self.weights.items())
        return {(index[layer], role): tensor for (layer, _, role), tensor in places}

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
