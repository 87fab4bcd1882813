"""What an engine, its reference, and modules made of several of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from torch2rt.arguments import whole_number
from torch2rt.errors import InputError
from torch2rt.interface import Input, Interface, Shape
from torch2rt.runtime.graph_cache import DEFAULT, GraphCache
from torch2rt.runtime.recomputed import Recomputed
from torch2rt.structure import unflatten


class Loaded(Protocol):
    """What `load` gives: the module's engines on one GPU."""

    @property
    def device(self) -> torch.device | None:
        """The GPU."""

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for tensors that fit, in the order of the interface."""


class Converted(torch.nn.Module):
    """A module with a calling convention.

    `recomputed` gives inputs that need it a gradient, where a conversion was asked for it (`backward="recompute"`).
    """

    recomputed: Recomputed | None = None

    def _interface(self) -> Interface:
        """The calling convention; raises `EngineError` where there is none."""
        raise NotImplementedError

    @property
    def input_names(self) -> list[str]:
        """The engine's inputs, in the order of the tensors in a call."""
        return [spec.name for spec in self._interface().inputs]

    @property
    def output_names(self) -> list[str]:
        """The engine's outputs."""
        return list(self._interface().outputs)

    def warm_up(self, shapes: Any = None, *, contexts: int = 1) -> None:
        """Do before traffic comes what first calls do: load engines, make execution contexts, capture CUDA graphs.

        It calls the module with zeros on its GPU, by default the current one, and on the current stream there, as often
        as it takes for a graph to be captured if `cuda_graph` is set, and waits for that. Where weights can be changed
        in an engine, it is given those that it has, which makes TensorRT compile what the first refit would wait for.

        - `shapes`: a list with the shapes of one call after the other, each a list (flat, or nested like the inputs) or
          a dict by input name. By default those that the engines are tuned for.
        - `contexts`: on how many streams calls will be made at once: above 1, as many execution contexts are made.

        Raises `InputError` for shapes that are not served, and `EngineError` where the engine cannot run here.

        >>> model_trt.warm_up([[(1, 3, 224, 224)], [(8, 3, 224, 224)]], contexts=4)     # doctest: +SKIP
        """
        count = whole_number("contexts", contexts, 1) or 1
        interface = self._interface()
        if shapes is None:
            calls = [call for part in self._parts() for call in part.profiles]
        elif isinstance(shapes, (list, tuple)):
            calls = [interface.shapes(call) for call in shapes]
        else:
            raise InputError(f"{shapes=} is no list of the shapes of calls, such as [[(1, 3)], [(8, 3)]].")
        for call in calls:
            interface.check(call, [spec.dtype for spec in interface.inputs])
        graph = getattr(self, "cuda_graph", False)
        cache = graph if isinstance(graph, GraphCache) else DEFAULT
        device = getattr(self, "device", None) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._warm_up_refits()
        for call in calls:
            kept = []  # so that each call brings other addresses, as calls will
            for _ in range(1 + cache.after if graph else 1):
                kept.append([_zeros(spec, shape, device) for spec, shape in zip(interface.inputs, call, strict=True)])
                args, kwargs = unflatten(interface.arguments, kept[-1])
                self(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        if count > 1:
            self._make_contexts(count)

    def _parts(self) -> Sequence[Interface]:
        """The calling conventions of the engines that serve the range together."""
        return [self._interface()]

    def _warm_up_refits(self) -> None:
        """Do what the first change of weights does."""

    def _make_contexts(self, count: int) -> None:
        """Have so many execution contexts of each engine that no stream uses yet."""


class Evaluated(Converted):
    """A module without engines, whose networks are evaluated with torch."""

    def outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The engine's outputs for its inputs, each in the order of the interface."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on the device of the inputs; raises `InputError` for what the engine would refuse."""
        if self.recomputed is not None and (result := self.recomputed(self, args, kwargs)) is not NotImplemented:
            return result
        interface = self._interface()
        tensors = interface.tensors(args, kwargs)
        return interface.wrap(self.outputs(tensors), [tuple(t.shape) for t in tensors])


def _zeros(spec: Input, shape: Shape, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=spec.dtype, device=device).contiguous(memory_format=spec.memory_format)
