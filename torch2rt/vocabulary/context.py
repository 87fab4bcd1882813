"""What a converter is given: the network under construction, and what was recorded of the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
import torch

from torch2rt.backend.tensorrt import DTYPES, trt
from torch2rt.errors import ConversionError
from torch2rt.graph import graph_meta
from torch2rt.network import Network
from torch2rt.sizes import Symbols

Sizes = tuple[Any, ...]  # ints, and SymInts where a size is dynamic


@dataclasses.dataclass(frozen=True, eq=False)
class Complex:
    """The value of a complex tensor: TensorRT has none, so a float32 tensor for each part."""

    real: Any
    imag: Any


class Context:
    """What a converter is given beside torch's arguments.

    `network` is the TensorRT network under construction and `out` the recorded result of the call: a fake tensor with
    the result's dtype and (symbolic) shape, or a tuple of them; `device` is where the module was traced; `nan` is what
    was asked of `lower`. The rest belongs to the vocabulary.
    """

    def __init__(self, lowered: Network, graph: torch.fx.GraphModule) -> None:
        self.lowered = lowered
        self.nan = lowered.nan
        self.network = lowered.definition
        self.out: Any = None
        self.symbols: Symbols = graph_meta(graph).symbols
        placeholders = (n for n in graph.graph.nodes if n.op == "placeholder")
        self.device = next((n.meta["val"].device for n in placeholders), None)
        self.inputs: list[Any] = []  # network inputs, in interface order
        self.sizes: dict[int, tuple[Any, Sizes]] = {}  # by id of an ITensor: the tensor and its sizes
        self.bytes: set[int] = set()  # ids of the int32 tensors that stand for uint8 ones
        self.memo: dict[Any, Any] = {}
        self.inline: Callable[..., list[Any]]  # lowers a subgraph on given values, and returns its results
        self.arguments: dict[str, Any] = {}  # of a call on complex numbers: by the names of its converter for real ones
        self.again: Callable[..., Any]  # that converter's result, with some arguments replaced by real ones
        self.apply: Callable[..., Any]  # the result of another call's converter, on real values

    def weights(self, tensor: torch.Tensor, role: str = "weights") -> Any:
        """A tensor as `trt.Weights` of the next layer to be added, without a copy where it is dense and on the CPU."""
        if tensor.dtype not in DTYPES:
            raise ConversionError(f"a {tensor.dtype} constant has no TensorRT type")
        held = tensor.detach().resolve_neg().cpu().contiguous()
        self.lowered.weights[self.network.num_layers, role] = held
        return trt.Weights(DTYPES[held.dtype], held.data_ptr(), held.numel())

    def constrain(self, claim: sympy.Basic) -> None:
        """Check a claim about sizes at every call."""
        self.lowered.interface = self.lowered.interface.constrained(claim, self.symbols)

    def track(self, tensor: Any, sizes: Sizes) -> Any:
        """Remember the symbolic sizes of a tensor; returns the tensor."""
        self.sizes[id(tensor)] = (tensor, tuple(sizes))
        return tensor
