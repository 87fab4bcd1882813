"""A TensorRT network under construction or done, with the weights that it reads."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from torch2rt.backend.tensorrt import LOG, TORCH_DTYPES, type_of_layer
from torch2rt.errors import Torch2RTError
from torch2rt.interface import Interface
from torch2rt.recipes.replay import Recipes
from torch2rt.recipes.tape import Tape
from torch2rt.structure import bare_name


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which of the module's parameters or buffers a tensor came from, if from one, and what was done to it."""

    parameter: str | None = None
    changes: tuple[str, ...] = ()

    def then(self, change: str) -> Origin:
        return Origin(self.parameter, (*self.changes, change))


COMPUTED = Origin(None, ("computed",))


def origin_of(node: torch.fx.Node) -> Origin:
    """The origin of what a graph's `get_attr` node stands for: as the pass that made it says, or by its name."""
    if (origin := node.meta.get("made_of")) is not None:
        return origin
    name = str(node.target)
    return COMPUTED if name.startswith("_constant_") else Origin(name)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor that a network reads, and its origin: `Origin("conv.weight", ("folded with batch norm",))`.

    `number` is the one by which `Network.recipes` knows it; `None` where nothing was recorded. `version` is torch's
    count of writes to it when the network was made.
    """

    tensor: torch.Tensor
    origin: Origin
    number: int | None = None
    version: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", version_of(self.tensor))


class Origins:
    """The origins of torch tensors and of their views. It keeps no tensor alive."""

    def __init__(self) -> None:
        self._recorded: dict[int, tuple[StorageWeakRef, list[tuple[_Place, Origin]]]] = {}

    def record(self, tensor: torch.Tensor, origin: Origin) -> None:
        if origin is not COMPUTED and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._recorded:
                self._recorded[storage._cdata] = StorageWeakRef(storage), []  # so that no other one has its address
            self._recorded[storage._cdata][1].append((_Place.of(tensor), origin))

    def derive(self, tensor: torch.Tensor, other: torch.Tensor, change: str) -> None:
        """Record that a tensor was made of another one, unless it is a view of it or that one is not known."""
        if self.of(tensor) is COMPUTED and (origin := self.of(other)) is not COMPUTED:
            self.record(tensor, origin.then(change))

    def of(self, tensor: torch.Tensor) -> Origin:
        """The origin of a tensor; `COMPUTED` where it is not known."""
        if tensor.layout is not torch.strided:
            return COMPUTED
        _, recorded = self._recorded.get(tensor.untyped_storage()._cdata, (None, ()))
        place = _Place.of(tensor)
        around = [(whole, origin) for whole, origin in recorded if place.is_in(whole)]
        if not around:
            return COMPUTED
        whole, origin = min(around, key=lambda found: found[0].end - found[0].start)
        change = place.change_from(whole)
        return origin.then(change) if change else origin


class _Place(NamedTuple):
    """Where in its memory a tensor is, in bytes, and how."""

    dtype: torch.dtype
    start: int
    end: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dense: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Place:
        shape, stride, bytes = tuple(tensor.shape), tensor.stride(), tensor.element_size()
        start, count = tensor.storage_offset(), tensor.numel()
        end = start + sum((size - 1) * step for size, step in zip(shape, stride)) + 1 if count else start
        return cls(tensor.dtype, start * bytes, end * bytes, count, shape, stride, tensor.is_contiguous())

    def is_in(self, whole: _Place) -> bool:
        return whole.start <= self.start and self.end <= whole.end

    def change_from(self, whole: _Place) -> str | None:
        """In a word, how a view differs from what it is a view of."""
        if self.dtype != whole.dtype:
            return f"viewed as {bare_name(self.dtype)}"
        if (self.shape, self.stride) == (whole.shape, whole.stride):
            return None
        if self.numel != whole.numel:
            return "sliced" if self.numel < whole.numel else "expanded"
        return "reshaped" if self.dense == whole.dense else "transposed"


@dataclasses.dataclass
class Network:
    """A TensorRT network and what must live as long as it does.

    `definition` is the `INetworkDefinition`. `weights` holds every tensor that the network reads, by the name of the
    layer and the role there, such as `conv1.conv2d:kernel`: TensorRT refers to this memory and does not copy it.
    `assumptions` are for the report of the conversion (`torch2rt.engine.report.Report`). `nan` is what was asked of
    `lower`. For `torch2rt.debug.compare` and `torch2rt.save`, `torch2rt()` adds the graph as it was `traced` and as it
    was `lowered`, whose constants had the `versions` (torch's counts of writes) then; `values` are the names of the
    network's tensors by those of the traced nodes. Where it was lowered with a `tape`, the weights are copies of its
    own, and `recipes` says how they are made of the module's tensors.
    """

    definition: Any
    builder: Any
    interface: Interface
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)
    assumptions: list[str] = dataclasses.field(default_factory=list)
    nan: str = "keep"
    traced: torch.fx.GraphModule | None = None
    lowered: torch.fx.GraphModule | None = None
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    tape: Tape | None = None
    recipes: Recipes | None = None
    structure: str | None = None  # equal for networks that differ in their weights alone; `None` where that is unknown
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    building: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # TensorRT builds it once at a time

    def keep_graphs(self, traced: torch.fx.GraphModule, lowered: torch.fx.GraphModule) -> None:
        """Keep the graph as it was traced and as it was lowered."""
        self.traced, self.lowered, self.versions = traced, lowered, versions(lowered)

    @property
    def definitions(self) -> list[Any]:
        """The network's definition, in a list as a partitioned module has several."""
        return [self.definition]

    @property
    def num_layers(self) -> int:
        return self.definition.num_layers

    def weight_names(self) -> dict[int, str]:
        """The name by which an engine that can be refitted knows each weight, by its number in `recipes`.

        Weights of the same memory have one name. Those without elements have none.
        """
        names: dict[tuple[int, torch.dtype, int], str] = {}
        found = {}
        for name, weight in self.weights.items():
            if weight.number is not None and weight.tensor.numel():
                key = weight.tensor.data_ptr(), weight.tensor.dtype, weight.tensor.numel()
                found[weight.number] = names.setdefault(key, name)
        return found

    def weights_by_layer(self) -> dict[tuple[int, str], torch.Tensor]:
        """The weights' tensors by the index of the layer and the role there, as `torch2rt.reference` takes them."""
        index = {self.definition.get_layer(i).name: i for i in range(self.num_layers)}
        places = ((name.rpartition(":"), weight.tensor) for name, weight in self.weights.items())
        return {(index[layer], role): tensor for (layer, _, role), tensor in places}

    def check_weights(self) -> None:
        """Raise `Torch2RTError` where weights are memory of a module that was written to since."""
        for weight in self.weights.values():
            if weight.number is None and version_of(weight.tensor) != weight.version:
                raise Torch2RTError(
                    f"The module's {weight.origin.parameter or 'weights'} was written to since it was converted, and "
                    "the network has it of the module's memory: convert again, with refittable=True, or a copy of the "
                    "module."
                )

    def facts(self) -> dict[str, Any]:
        """What `torch2rt inspect` says of the network, as JSON values: the outputs' types, and the layers."""
        with LOG.capture():
            outputs = map(self.definition.get_output, range(self.definition.num_outputs))
            layers = map(self.definition.get_layer, range(self.num_layers))
            return {
                "outputs": {x.name: describe(x).replace("-1", "?") for x in outputs},
                "layers": [[layer.name, type_of_layer(layer).name] for layer in layers],
            }

    def __repr__(self) -> str:
        inputs = ", ".join(f"{i.name}: {i.describe()}" for i in self.interface.inputs)
        return f"Network({self.num_layers} layers, {inputs} -> {', '.join(self.interface.outputs)})"


def versions(graph: torch.fx.GraphModule) -> dict[str, int]:
    """How often torch has counted writes to each constant of a graph."""
    found = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    return {name: version_of(value) for name, value in found}


def version_of(tensor: torch.Tensor) -> int:
    """How often torch has counted writes to a tensor; -1 where it counts none."""
    return -1 if tensor.is_inference() else tensor._version


def describe(tensor: Any) -> str:
    """Dtype and shape of a TensorRT tensor, such as `float32[2, -1]`."""
    dtype = bare_name(TORCH_DTYPES.get(tensor.dtype, tensor.dtype))
    try:
        return f"{dtype}{list(tensor.shape)}"
    except RuntimeError:
        return dtype
