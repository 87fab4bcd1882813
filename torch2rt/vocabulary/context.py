"""What a converter is given: the network under construction, and what was recorded of the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import sympy
import torch

from torch2rt.backend.quirks import lacks_dynamic_int4_in_float32
from torch2rt.backend.tensorrt import DTYPES, trt
from torch2rt.errors import ConversionError
from torch2rt.graph import graph_meta
from torch2rt.network import Network, Origins, Weight
from torch2rt.recipes.tape import Place, Tape, unrecorded
from torch2rt.sizes import Symbols, is_symbolic
from torch2rt.structure import as_bytes, bare_name

Sizes = tuple[Any, ...]  # ints, and SymInts where a size is dynamic


_MATRIX_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm", "conv1d", "conv2d", "conv3d")


def _name(node: torch.fx.Node) -> str:
    return getattr(node.target, "__name__", node.op)


def _is_for_matrices(node: torch.fx.Node) -> bool:
    """Whether a result goes into products of matrices and the outputs alone; dropout does nothing in an engine."""
    safe = (*_MATRIX_PRODUCTS, "output")
    return all(_name(user) in safe or _name(user) == "dropout" and _is_for_matrices(user) for user in node.users)


@dataclasses.dataclass(frozen=True, eq=False)
class Complex:
    """The value of a complex tensor: TensorRT has none, so a float32 tensor for each part."""

    real: Any
    imag: Any


class Calls(Protocol):
    """What lowering does for a converter that needs other calls lowered."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of a call on complex numbers, the arguments by the names of its converter for real numbers."""
        ...

    def again(self, **changes: Any) -> Any:
        """The result of that converter, with some arguments replaced by real ones."""
        ...

    def apply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of another call's converter on real values."""
        ...

    def inline(self, subgraph: torch.fx.GraphModule, *operands: Any) -> list[Any]:
        """The results of a subgraph on these values, as layers of the network."""
        ...


class Context:
    """What a converter is given beside torch's arguments.

    `network` is the TensorRT network under construction and `out` the recorded result of the call: a fake tensor with
    the result's dtype and (symbolic) shape, or a tuple of them; `device` is where the module was traced; `nan` is what
    was asked of `lower`. `arguments`, `again`, `apply` and `inline` are those of `Calls`. The rest belongs to the
    vocabulary.
    """

    def __init__(self, lowered: Network, graph: torch.fx.GraphModule, calls: Calls) -> None:
        self.lowered = lowered
        self.nan = lowered.nan
        self.network = lowered.definition
        self.out: Any = None
        self.node: torch.fx.Node | None = None  # the recorded call, where the converter is not asked by another one
        self.symbols: Symbols = graph_meta(graph).symbols
        recorded = next((n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"), None)
        self.device: Any = None if recorded is None else recorded.device
        self._shape_env: Any = None if recorded is None else recorded.fake_mode.shape_env
        self.inputs: list[Any] = []  # network inputs, in interface order
        self.sizes: dict[int, tuple[Any, Sizes]] = {}  # by id of an ITensor: the tensor and its sizes
        self.bytes: set[int] = set()  # ids of the int32 tensors that stand for uint8 ones
        self.memo: dict[Any, Any] = {}
        self.origins = Origins()
        self._copies: dict[Place, torch.Tensor] = {}
        self._unnamed: dict[tuple[int, str], Weight] = {}  # by the index of the layer, until it has a name
        self.calls = calls
        self.again, self.apply, self.inline = calls.again, calls.apply, calls.inline

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of a call on complex numbers, the arguments by the names of its converter for real numbers."""
        return self.calls.arguments

    @property
    def is_multiplied(self) -> bool:
        """Whether a layer of the call may be multiplied: not if it is all of it, and only matrix products take it."""
        return self.node is None or _name(self.node) not in ("relu", "gelu") or not _is_for_matrices(self.node)

    def takes_int4(self, dtype: torch.dtype) -> bool:
        """Whether products of this type may take the call's weight of int4 (`quirks.lacks_dynamic_int4_in_float32`)."""
        if dtype is not torch.float32 or self.node is None or not lacks_dynamic_int4_in_float32():
            return True
        return not any(is_symbolic(size) for user in self.node.users for size in user.meta["val"].shape)

    def fixed_sizes(self) -> int:
        """How many dynamic sizes torch takes for numbers or for each other, as it does once they were compared."""
        return 0 if self._shape_env is None else len(self._shape_env.replacements)

    def weights(self, tensor: torch.Tensor, role: str = "weights", stored_as: Any = None) -> Any:
        """A tensor as `trt.Weights` of the next layer to be added, without a copy where it is dense and on the CPU.

        `stored_as`: TensorRT's type of quantised numbers, of which int4 has two in a byte.
        """
        if tensor.dtype not in DTYPES and stored_as is None:
            raise ConversionError(f"a {tensor.dtype} constant has no TensorRT type")
        held, number = tensor.detach().resolve_neg().cpu().contiguous(), None
        if self.lowered.tape is not None:
            held, number = self._own_copy(self.lowered.tape, held)
        self._unnamed[self.network.num_layers, role] = Weight(held, self.origins.of(tensor), number)
        count = held.numel() * (2 if stored_as is not None and tensor.dtype is torch.uint8 else 1)
        return trt.Weights(stored_as or DTYPES[held.dtype], held.data_ptr(), count)

    def _own_copy(self, tape: Tape, held: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A weight as the network's own, which stays as it is when the module's changes, and its number on the tape.

        Weights that were one tensor are one copy, which TensorRT knows by one name.
        """
        number, place = tape.weight(held)
        with unrecorded():
            copy = self._copies.get(place)
            if copy is None or not torch.equal(as_bytes(copy), as_bytes(held)):
                copy = self._copies[place] = held.clone()
        return copy, number

    def name_weights(self) -> None:
        """Record the weights of layers that now have their names."""
        for (index, role), weight in self._unnamed.items():
            if index < self.network.num_layers:  # TensorRT has not refused the layer
                self.lowered.weights[f"{self.network.get_layer(index).name}:{role}"] = weight
        self._unnamed.clear()

    def as_dtype(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight in another dtype."""
        cast = tensor.to(dtype)
        if cast.dtype is not tensor.dtype:
            self.origins.derive(cast, tensor, f"cast to {bare_name(dtype)}")
        return cast

    def constrain(self, claim: sympy.Basic) -> None:
        """Check a claim about sizes at every call."""
        self.lowered.interface = self.lowered.interface.constrained(claim, self.symbols)

    def track(self, tensor: Any, sizes: Sizes) -> Any:
        """Remember the symbolic sizes of a tensor; returns the tensor."""
        self.sizes[id(tensor)] = (tensor, tuple(sizes))
        return tensor
