"""What a user says about precision, as passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.errors import InputError
from torch2rt.passes.order import Pass
from torch2rt.passes.quantization.calibrated import Calibrated, look_at
from torch2rt.passes.quantization.formats import FORMATS, Format
from torch2rt.passes.quantization.gain import in_words, slower
from torch2rt.passes.quantization.histogram import METHODS
from torch2rt.passes.quantization.stored import unpack_weights
from torch2rt.passes.ranges import WithKeywords, as_samples, measure
from torch2rt.passes.search import Choice, Found, Metric, noted, search
from torch2rt.passes.selection import check_meant, items_of, select

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
IO_TYPES = {"fp32": torch.float32, **TYPES}
# What products are quantised to, and the type of what is not: "int8" and "int8+fp16" are one.
QUANTIZED = {
    f"{name}{suffix}": (format, dtype)
    for name, format in FORMATS.items()
    for suffix, dtype in {"": torch.float16, **{f"+{name}": dtype for name, dtype in IO_TYPES.items()}}.items()
}
PRECISIONS = ("fp32", *TYPES, *QUANTIZED, "auto")
TOLERANCE = 1e-3

SELECTIONS = ("keep_fp32", "force_low", "keep_float")

Samples = Callable[[torch.fx.GraphModule], list[list[torch.Tensor]]]


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
    smooth_quant: float | None = None
    bias_correction: bool = False
    quantize_attention: bool = False
    quantize_all: bool = False

    def __post_init__(self) -> None:
        for name in SELECTIONS:  # each of several engines reads them
            object.__setattr__(self, name, items_of(getattr(self, name)))
        if self.precision not in (None, *PRECISIONS):
            names = ", ".join(map(repr, ("fp32", *TYPES, *FORMATS, "auto")))
            raise InputError(
                f"precision={self.precision!r} is not one of {names}; what is not quantised is in float16, or as "
                "'int8+bf16' and 'int8+fp32' say."
            )
        if self.io_precision not in (None, *IO_TYPES):
            raise InputError(f"io_precision={self.io_precision!r} is not one of {', '.join(map(repr, IO_TYPES))}.")
        if self.calibration_method not in (None, *METHODS):
            methods = ", ".join(map(repr, METHODS))
            raise InputError(f"calibration_method={self.calibration_method!r} is not one of {methods}.")
        for name in ("samples", "calibration"):
            if (value := getattr(self, name)) is not None and not is_list(value):
                kind = type(value).__name__
                raise InputError(f"{name}= is a list of samples, each the inputs of a call, not a {kind}.")
        self._check_needless("int8 and fp8", self.calibrates, "calibration_method calibration_cache")
        self._check_needless(
            "int8 and fp8", self.calibrates, "calibration smooth_quant bias_correction quantize_attention quantize_all"
        )
        self._check_needless("quantised products", self.format is not None, "keep_float")
        self._check_needless("precision='auto'", self.precision == "auto", "tolerance metric")
        self._check_needless("a low precision", self.is_low or self.format is not None, "keep_fp32")
        self._check_needless("a low precision", self.is_low, "io_precision force_low samples")
        if self.is_low and IO_TYPES[self.io_precision or "fp32"] not in (torch.float32, self.low):
            raise InputError(f"io_precision={self.io_precision!r} and precision={self.precision!r} are two low types.")
        if self.calibrates and self.calibration is None and not self._reads_cache:
            raise InputError(
                f"precision={self.precision!r} needs calibration=: some batches of inputs such as the engine will be "
                "given. They say how large values become."
            )
        self._check_quantisation()

    def _check_quantisation(self) -> None:
        if self.calibration_method == "entropy" and self.format is FORMATS["fp8"]:
            raise InputError("calibration_method='entropy' is for int8. For fp8 it is 'minmax', 'percentile' or 'mse'.")
        strength = self.smooth_quant
        if strength is not None and (isinstance(strength, bool) or not 0 <= strength <= 1):
            raise InputError(f"smooth_quant={strength!r} is not a number from 0 to 1; 0.5 is usual.")
        if self.calibration_cache is not None and (strength is not None or self.bias_correction):
            name = "bias_correction" if strength is None else "smooth_quant"
            raise InputError(f"{name} looks at each channel, and calibration_cache= has none: give calibration= alone.")
        if self.calibration_cache is not None and self.quantize_attention:
            raise InputError(
                "quantize_attention looks at probabilities, and calibration_cache= has none: give calibration= alone."
            )

    def _check_needless(self, what: str, is_asked: bool, names: str) -> None:
        for name in () if is_asked else names.split():
            value = getattr(self, name)
            is_empty = isinstance(value, (tuple, list)) and not value
            if not (value is None or value is False or is_empty or value == "fp32"):
                raise InputError(f"{name} is for {what}; precision={self.precision!r} has none.")

    @property
    def format(self) -> Format | None:
        """What products are quantised to, if they are. `"auto"` quantises where it has calibration data."""
        if self.precision == "auto" and self.calibration is not None:
            return FORMATS["int8"]
        return QUANTIZED[self.precision][0] if self.precision in QUANTIZED else None

    @property
    def calibrates(self) -> bool:
        """Whether values are quantised too, whose ranges are then to be found."""
        return self.format is not None and self.format.is_whole

    @property
    def low(self) -> torch.dtype:
        """The floating-point type of products that are not quantised."""
        if self.precision in QUANTIZED:
            return QUANTIZED[self.precision][1]
        return {**TYPES, "auto": torch.float16}.get(self.precision or "", torch.float32)

    @property
    def is_low(self) -> bool:
        return self.low is not torch.float32

    @property
    def changes(self) -> bool:
        """Whether the graph computes in other types than the module."""
        return self.is_low or self.format is not None

    @property
    def io(self) -> torch.dtype | None:
        """The type that the engine's floating-point inputs and outputs have, if not the module's."""
        return self.low if self.is_low and IO_TYPES[self.io_precision or "fp32"] is self.low else None

    @property
    def _reads_cache(self) -> bool:
        return self.calibration_cache is not None and Path(self.calibration_cache).is_file()

    def with_keywords(self, keywords: Mapping[str, Any]) -> Precision:
        """The same, with further keyword arguments in each call of the data."""
        given = {name: getattr(self, name) for name in ("samples", "calibration")}
        data = {name: list(data) if isinstance(data, Iterator) else data for name, data in given.items()}
        more: dict[str, Any] = {
            name: WithKeywords(samples, keywords) for name, samples in data.items() if samples is not None
        }
        return dataclasses.replace(self, **more)

    def for_engines(self, graphs: Sequence[torch.fx.GraphModule], modules: Mapping[str, Any]) -> Precision:
        """The same for the engines of several graphs of one module, of which each looks at the data."""
        count = len(graphs)
        if count > 1:
            for name in SELECTIONS:
                check_meant(name, getattr(self, name), graphs, modules)
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
            graph = graph if self.format is None else unpack_weights(graph)
            keep, force, floats = (
                select(name, getattr(self, name), graph, modules, is_one_of_several) for name in SELECTIONS
            )
            floats |= keep
            slow = {n: why for n, why in self._slower(graph).items() if n not in floats and n not in force}
            floats |= slow
            texts = [] if self.format is None else in_words(slow, self.format)
            found = self._calibrated(graph, floats, examples, progress, is_one_of_several)
            if not self.is_low:
                return noted(found.quantized(floats), texts)
            samples = None if self.samples is None else as_samples(graph, self.samples, is_one_of_several)
            data, ranges = [*examples(graph), *(samples or [])], found.calibration.ranges
            if samples != [] and (samples is not None or self.low is torch.float16):
                ranges = measure(found.graph, data, ranges)
            chosen = Choice(found, self.low, ranges, keep=keep, force=force, floats=floats)
            searches: list[Found] = []
            if self.precision == "auto":
                tolerance = TOLERANCE if self.tolerance is None else self.tolerance
                chosen, searches = search(chosen, data, tolerance, self.metric)
            return noted(chosen.made(self.io), texts, searches)

        compute.__name__ = f"compute_in_{self.precision}"
        return [compute]

    def _slower(self, graph: torch.fx.GraphModule) -> dict[Node, str]:
        """The products that are not quantised because they are no faster then."""
        return {} if self.format is None or self.quantize_all else slower(graph, self.format, self.low)

    def _calibrated(
        self,
        graph: torch.fx.GraphModule,
        floats: Mapping[Node, str],
        examples: Samples,
        progress: bool | None,
        others: bool,
    ) -> Calibrated:
        if self.format is None:
            return Calibrated(graph)
        return look_at(
            graph,
            self.format,
            self.calibration,
            method=self.calibration_method,
            cache=self.calibration_cache,
            reads_cache=self._reads_cache,
            strength=self.smooth_quant,
            corrects=self.bias_correction,
            attention=self.quantize_attention,
            keep=floats,
            examples=examples,
            progress=progress,
            others=others,
        )


def is_list(value: Any) -> bool:
    """Whether a value may be a list of samples, as a list, a data set or a generator is."""
    iterates = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return iterates and not isinstance(value, (torch.Tensor, str, Mapping))
