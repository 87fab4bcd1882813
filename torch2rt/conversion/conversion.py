"""One conversion: trace, passes, lower, build, wrap; of a module that TensorRT takes as a whole, or in parts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.conversion.fallback import Choice, convert_in_segments, plan_in_words
from torch2rt.conversion.prepared import prepare
from torch2rt.debug.same_values import SameValues
from torch2rt.debug.verify import Verifying
from torch2rt.engine.build import build
from torch2rt.engine.joined import joined
from torch2rt.engine.variant import EngineVariant
from torch2rt.errors import InputError, UnsupportedError
from torch2rt.graph import graph_meta
from torch2rt.input_ranges import check_profiles
from torch2rt.lowering import lower
from torch2rt.network import Network
from torch2rt.passes.copies import without_gpu_memory
from torch2rt.passes.options import Precision
from torch2rt.passes.order import Pass, run
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.tracing.sizes.regions import Variant
from torch2rt.tracing.trace import Traces, as_arguments, trace, trace_variants


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The arguments of `torch2rt.torch2rt`, read and checked.

    - `names`, `ranges`: those that tracing takes, by name; `options`: those of `torch2rt.build`.
    - `passes`: before those that `precise` asks for.
    - `says_plan`: whether errors end with what `fallback=True` would do.
    """

    module: torch.nn.Module
    inputs: Any
    kwargs: Mapping[str, Any] | None
    names: Mapping[str, Any]
    ranges: Mapping[str, Any]
    shapes: Any
    passes: Sequence[Pass]
    precise: Precision
    nan: str
    verify: bool | str
    keep_network: bool
    options: Mapping[str, Any]
    progress: bool | None
    on_stage: Callable[[str, Any, float], None]
    says_plan: bool

    def engines(self, max_variants: int, merge: str) -> TRTModule:
        """The module as one engine, or as several that cover its range together."""
        start = time.perf_counter()
        asked = dict(kwargs=self.kwargs, **self.names, **self.ranges, shapes=self.shapes, progress=self.progress)
        with Traces(self.module, self.inputs, **asked) as traces:
            by_values = SameValues(traces.module, traces.leaves, self._lowered)
            variants = trace_variants(traces, max_variants, by_values=by_values if merge == "values" else None)
        seconds = (time.perf_counter() - start) / len(variants)
        precise = self.precise.for_engines(len(variants))
        check_profiles([graph_meta(variant.graph).interface for variant in variants])
        parts: list[TRTModule] = []
        networks: list[Network] = []
        for variant in variants:
            self.on_stage("trace", variant.graph, seconds)
            also = [shapes for region, shapes in by_values.compared if any(region is r for r in variant.regions)]
            part, network = self._engine(variant.graph, precise, also, len(variants) > 1)
            parts.append(part)
            networks.append(network)
        described = list(map(_described, range(len(parts)), parts, variants))
        if len(variants) > 1:
            own = networks[0].interface
            specs = [
                dataclasses.replace(spec, dtype=mine.dtype) for spec, mine in zip(traces.specs, own.inputs, strict=True)
            ]
            whole = dataclasses.replace(own, inputs=specs, constraints=[])
            return TRTModule(joined([part.built for part in parts if part.built], whole, described), networks)
        if described[0].notes:
            parts[0].report.variants.append(str(described[0]))
        return parts[0]

    def segments(self, choice: Choice) -> PartitionedModule:
        """The module as engines and torch calls."""
        if self.shapes is not None:
            raise InputError("shapes= is for modules that TensorRT takes as a whole. Give min_shapes and max_shapes.")
        if self.precise.changes:
            raise InputError(
                "precision= is for modules that TensorRT takes as a whole, and some calls of this one stay torch "
                "calls. Convert its parts with torch2rt.convert_submodules, each in its own precision."
            )
        asked = dict(kwargs=self.kwargs, **self.names, **self.ranges, progress=self.progress)
        graph = self._stage("trace", trace, self.module, self.inputs, **asked, fallback=True)
        if graph_meta(graph).interface.asked_profiles[1:]:
            raise InputError("Several sets of opt_shapes are for modules that TensorRT takes as a whole. Give one.")
        refused: UnsupportedError | None = None
        try:
            self._lowered(graph)
        except UnsupportedError as error:
            refused = error
        return convert_in_segments(
            self.module,
            graph,
            self._tensors(graph),
            choice,
            refused,
            passes=self.passes,
            nan=self.nan,
            verify=self.verify,
            options=self.options,
            progress=self.progress,
            stage=self._stage,
        )

    def _engine(
        self, graph: torch.fx.GraphModule, precise: Precision, also: Sequence[Any], is_one_of_several: bool
    ) -> tuple[TRTModule, Network]:
        """One engine, and the network that it is of, verified at the example and at the shapes `also`."""
        tensors = self._tensors(graph)
        made = prepare(graph, self.passes, precise, self.module, tensors, self.progress, is_one_of_several)
        ready = run(made.graph, made.passes)
        try:
            network = self._stage("lower", lower, ready, nan=self.nan, passes=[])
        except UnsupportedError as error:
            if not self.says_plan:
                raise
            plan = plan_in_words(graph, error, self.passes)
            raise UnsupportedError(f"{error}\n{plan}", error.calls) from error.__cause__
        network.assumptions += made.notes
        if self.keep_network:
            network.keep_graphs(*without_gpu_memory(graph, ready))
        verifying = Verifying(
            made.module,
            made.graph,
            network,
            made.tensors,
            self.verify,
            tf32=self.options["tf32"],
            build=functools.partial(build, **self.options, progress=False),
            passes=made.passes,
            also=also,
        )
        how = dict(self.options, progress=self.progress, meanwhile=verifying.while_building)
        model_trt = TRTModule(self._stage("build", build, network, **how), network)
        verifying.finish(model_trt)
        return model_trt, network

    def _lowered(self, graph: torch.fx.GraphModule) -> Network:
        return lower(run(graph, self.passes), nan=self.nan, passes=[])

    def _tensors(self, graph: torch.fx.GraphModule) -> list[torch.Tensor]:
        return graph_meta(graph).interface.tensors(*as_arguments(self.inputs, self.kwargs))

    def _stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of one stage, which is reported with its name and its seconds."""
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.on_stage(name, result, time.perf_counter() - start)
        return result


def _described(index: int, part: TRTModule, variant: Variant) -> EngineVariant:
    """An engine as one of several."""
    engine = part.built
    assert engine is not None
    size = len(engine.data)
    return EngineVariant(index, engine.interface, variant.text, variant.line, tuple(variant.notes), size)
