"""What a user says about precision, as passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from torch2rt.errors import InputError
from torch2rt.passes.order import Pass
from torch2rt.passes.precision import mixed_precision
from torch2rt.passes.ranges import as_samples, measure
from torch2rt.passes.selection import select

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
IO_TYPES = {"fp32": torch.float32, **TYPES}
PRECISIONS = ("fp32", *TYPES)

Samples = Callable[[torch.fx.GraphModule], Iterable[list[torch.Tensor]]]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The arguments of `torch2rt()` about precision, which documents them.

    >>> [pass_.__name__ for pass_ in Precision("bf16").passes({}, lambda graph: [])]
    ['compute_in_bf16']
    """

    precision: str | None = None
    io_precision: str | None = None
    keep_fp32: Any = ()
    force_low: Any = ()
    samples: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"precision={self.precision!r} is not one of {', '.join(map(repr, PRECISIONS))}.")
        if self.io_precision not in (None, *IO_TYPES):
            raise InputError(f"io_precision={self.io_precision!r} is not one of {', '.join(map(repr, IO_TYPES))}.")
        if self.samples is not None and not is_list(self.samples):
            kind = type(self.samples).__name__
            raise InputError(f"samples= is a list of samples, each the inputs of a call, not a {kind}.")
        if not self.is_low:
            for name in ("io_precision", "keep_fp32", "force_low", "samples"):
                if getattr(self, name) not in (None, (), [], "fp32"):
                    raise InputError(f"{name} is for a low precision; precision={self.precision!r} has none.")
        elif IO_TYPES.get(self.io_precision or "fp32") not in (torch.float32, self.low):
            raise InputError(f"io_precision={self.io_precision!r} and precision={self.precision!r} are two low types.")

    @property
    def is_low(self) -> bool:
        """Whether anything changes."""
        return self.precision in TYPES

    @property
    def low(self) -> torch.dtype:
        return TYPES[self.precision or ""]

    @property
    def io(self) -> torch.dtype | None:
        """The type that the engine's floating-point inputs and outputs have, if not the module's."""
        return self.low if self.is_low and IO_TYPES.get(self.io_precision or "fp32") is self.low else None

    def passes(self, modules: Mapping[str, Any], examples: Samples) -> list[Pass]:
        """The passes that make a graph, after the default ones, compute as is asked.

        `modules` are the converted module's by their paths; `examples` gives the tensors of the example's inputs.
        """
        if not self.is_low:
            return []

        def compute(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
            keep = select("keep_fp32", self.keep_fp32, graph, modules)
            force = select("force_low", self.force_low, graph, modules)
            return mixed_precision(
                graph, self.low, keep=keep, force=force, ranges=self._ranges(graph, examples), io=self.io
            )

        compute.__name__ = f"compute_in_{self.precision}"
        return [compute]

    def _ranges(self, graph: torch.fx.GraphModule, examples: Samples) -> Any:
        """The ranges of values on the samples; without any, bfloat16 holds what float32 holds."""
        given = None if self.samples is None else list(self.samples)
        if given is None:
            return {} if self.low is torch.bfloat16 else measure(graph, examples(graph))
        return measure(graph, [*examples(graph), *as_samples(graph, given)]) if given else {}


def is_list(value: Any) -> bool:
    """Whether a value may be a list of samples, as a list, a data set or a generator is."""
    return hasattr(value, "__iter__") and not isinstance(value, (torch.Tensor, str, Mapping))
