"""What a user says about precision, as passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.passes.copies import copy_graph, finish
from torch2rt.passes.order import Pass
from torch2rt.passes.precision import mixed_precision
from torch2rt.passes.quantization import calibration_file
from torch2rt.passes.quantization.calibrate import calibrate
from torch2rt.passes.quantization.histogram import METHODS
from torch2rt.passes.quantization.quantize import observed, quantize
from torch2rt.passes.ranges import Ranges, as_samples, measure
from torch2rt.passes.search import Metric, search
from torch2rt.passes.selection import select

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
IO_TYPES = {"fp32": torch.float32, **TYPES}
INT8 = {"int8": torch.float16, "int8+bf16": torch.bfloat16, "int8+fp32": torch.float32}  # and what is not int8
PRECISIONS = ("fp32", *TYPES, *INT8, "auto")
TOLERANCE = 1e-3

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
    calibration: Iterable[Any] | None = None
    calibration_method: str | None = None
    calibration_cache: Any = None
    keep_float: Any = ()
    tolerance: float | None = None
    metric: Metric | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"precision={self.precision!r} is not one of {', '.join(map(repr, PRECISIONS))}.")
        if self.io_precision not in (None, *IO_TYPES):
            raise InputError(f"io_precision={self.io_precision!r} is not one of {', '.join(map(repr, IO_TYPES))}.")
        if self.calibration_method not in (None, *METHODS):
            methods = ", ".join(map(repr, METHODS))
            raise InputError(f"calibration_method={self.calibration_method!r} is not one of {methods}.")
        for name in ("samples", "calibration"):
            if (value := getattr(self, name)) is not None and not is_list(value):
                kind = type(value).__name__
                raise InputError(f"{name}= is a list of samples, each the inputs of a call, not a {kind}.")
        self._check_needless("int8", self.is_int8, "calibration calibration_method calibration_cache keep_float")
        self._check_needless("precision='auto'", self.precision == "auto", "tolerance metric")
        self._check_needless("a low precision", self.is_low or self.is_int8, "keep_fp32")
        self._check_needless("a low precision", self.is_low, "io_precision force_low samples")
        if self.is_low and IO_TYPES[self.io_precision or "fp32"] not in (torch.float32, self.low):
            raise InputError(f"io_precision={self.io_precision!r} and precision={self.precision!r} are two low types.")
        if self.is_int8 and self.calibration is None and not self._reads_cache:
            raise InputError(
                f"precision={self.precision!r} needs calibration=: some batches of inputs such as the engine will be "
                "given. They say how large values become."
            )

    def _check_needless(self, what: str, is_asked: bool, names: str) -> None:
        for name in () if is_asked else names.split():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (tuple, list)) and not value) and value != "fp32":
                raise InputError(f"{name} is for {what}; precision={self.precision!r} has none.")

    @property
    def is_int8(self) -> bool:
        return self.precision in INT8

    @property
    def low(self) -> torch.dtype:
        """The floating-point type of products that are not int8."""
        return {**TYPES, **INT8, "auto": torch.float16}.get(self.precision or "", torch.float32)

    @property
    def is_low(self) -> bool:
        return self.low is not torch.float32

    @property
    def changes(self) -> bool:
        """Whether the graph computes in other types than the module."""
        return self.is_low or self.is_int8

    @property
    def io(self) -> torch.dtype | None:
        """The type that the engine's floating-point inputs and outputs have, if not the module's."""
        return self.low if self.is_low and IO_TYPES[self.io_precision or "fp32"] is self.low else None

    @property
    def _reads_cache(self) -> bool:
        return self.calibration_cache is not None and Path(self.calibration_cache).is_file()

    def for_engines(self, count: int) -> Precision:
        """The same for so many engines of one module, of which each looks at the data."""
        if count > 1 and self.calibration_cache is not None:
            raise InputError(f"calibration_cache= is for one engine; the sizes that are asked for take {count}.")
        given = {name: getattr(self, name) for name in ("samples", "calibration")}
        once: dict[str, Any] = {
            name: list(data) for name, data in given.items() if count > 1 and isinstance(data, Iterator)
        }
        return dataclasses.replace(self, **once)

    def passes(
        self,
        modules: Mapping[str, Any],
        examples: Samples,
        progress: bool | None = None,
        is_one_of_several: bool = False,
    ) -> list[Pass]:
        """The passes that make a graph, after the default ones, compute as is asked.

        `modules` are the converted module's by their paths; `examples` gives the tensors of the example's inputs. Of
        data for several engines, each looks at that of sizes which it serves.
        """
        if not self.changes:
            return []

        def compute(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
            keep = select("keep_fp32", self.keep_fp32, graph, modules)
            force = select("force_low", self.force_low, graph, modules)
            ranges: Ranges = {}
            if self.is_int8:
                floats = {**select("keep_float", self.keep_float, graph, modules), **keep}
                found, ranges = self._calibrated(graph, progress, is_one_of_several)
                # by name, as a pass gives nodes of its own to the graph that it makes
                names = [{node.name: why for node, why in chosen.items()} for chosen in (keep, force)]
                graph = quantize(graph, found, floats)
                keep, force = ({n: chosen[n.name] for n in graph.graph.nodes if n.name in chosen} for chosen in names)
            if not self.is_low:
                return graph
            samples = None if self.samples is None else as_samples(graph, self.samples, is_one_of_several)
            if samples != [] and (samples is not None or self.low is torch.float16):
                ranges = measure(graph, [*examples(graph), *(samples or [])], ranges)
            if self.precision == "auto":
                graph, keep = self._searched(graph, [*examples(graph), *(samples or [])], keep, force, ranges)
            return mixed_precision(graph, self.low, keep=keep, force=force, ranges=ranges, io=self.io)

        compute.__name__ = f"compute_in_{self.precision}"
        return [compute]

    def _calibrated(
        self, graph: torch.fx.GraphModule, progress: bool | None, others: bool
    ) -> tuple[dict[str, float], Ranges]:
        """The largest values to quantise: of the cache if there is one, else of the calibration data."""
        nodes, method = observed(graph), self.calibration_method or "entropy"
        if self._reads_cache:
            return calibration_file.load(self.calibration_cache, graph, nodes), {}
        assert self.calibration is not None
        found, ranges = calibrate(graph, self.calibration, nodes, method, progress, others)
        if self.calibration_cache is not None:
            calibration_file.save(self.calibration_cache, graph, nodes, found, method)
        return found, ranges

    def _searched(
        self, graph: torch.fx.GraphModule, samples: list[list[torch.Tensor]], keep: Any, force: Any, ranges: Ranges
    ) -> tuple[torch.fx.GraphModule, dict[Node, str]]:
        """The graph, with what was found in its report, and the calls that stay in float32."""
        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        found = search(graph, self.low, samples, tolerance, self.metric, keep=keep, force=force, ranges=ranges)
        text = f"precision='auto': {found}, the tolerance {tolerance:g}"
        noted, meta = copy_graph(graph), graph_meta(graph)
        noted.meta["torch2rt"] = dataclasses.replace(meta, assumptions=(*meta.assumptions, text))
        names = {node.name: why for node, why in {**found.keep, **keep}.items()}
        return finish(noted), {node: names[node.name] for node in noted.graph.nodes if node.name in names}


def is_list(value: Any) -> bool:
    """Whether a value may be a list of samples, as a list, a data set or a generator is."""
    iterates = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return iterates and not isinstance(value, (torch.Tensor, str, Mapping))
