"""One conversion: trace, passes, lower, build, wrap; of a module that TensorRT takes as a whole, or in parts."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.backend.quirks import builds_refittable
from torch2rt.backend.tensorrt import DTYPES
from torch2rt.conversion.earlier import NotWhole
from torch2rt.conversion.fallback import Choice, plan_in_words
from torch2rt.conversion.prepared import Prepared, prepare
from torch2rt.conversion.structure_keys import of_module, structure_key
from torch2rt.debug.same_values import SameValues
from torch2rt.debug.verify import Verifying
from torch2rt.engine import engine_cache
from torch2rt.engine.build import build
from torch2rt.engine.engine import Engine
from torch2rt.engine.joined import joined
from torch2rt.engine.report import Report
from torch2rt.engine.variant import EngineVariant
from torch2rt.engine.weights import differing
from torch2rt.errors import InputError, Torch2RTError, TraceError, UnsupportedError
from torch2rt.graph import graph_meta
from torch2rt.input_ranges import check_profiles
from torch2rt.interface import Input
from torch2rt.lowering import lower, lower_with_values
from torch2rt.network import Network
from torch2rt.passes.copies import forget, to_be_kept
from torch2rt.passes.options import Precision
from torch2rt.passes.order import Pass, run
from torch2rt.passes.partitioning.effects import draws
from torch2rt.recipes.tape import Tape, recording
from torch2rt.runtime.live import Live
from torch2rt.runtime.module import TRTModule
from torch2rt.tracing.sizes.regions import Variant
from torch2rt.tracing.source_lines import modules_of
from torch2rt.tracing.trace import Traces, as_arguments, trace_variants
from torch2rt.tracing.whole_calls import has_graph_breaks

Late = Callable[[], Network]


@dataclasses.dataclass(frozen=True)
class Traced:
    """The graphs of a conversion.

    - `specs`: the inputs with the ranges that are served. `compared`: where paths were merged by values.
    - `precise`: the precision of each. `seconds`: what each took. `tape`: on which the traces were recorded.
    """

    variants: Sequence[Variant]
    specs: Sequence[Input]
    compared: Sequence[tuple[Any, Any]]
    precise: Precision
    seconds: float
    tape: Tape | None
    has_number_makers: bool


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The arguments of `torch2rt.torch2rt`, read and checked.

    - `names`, `ranges`: those that tracing takes, by name; `options`: those of `torch2rt.build`.
    - `passes`: before those that `precise` asks for.
    - `in_segments`: what is asked of a partition; without, errors end with what `fallback=True` would do.
    - `refittable`: whether the weights can be changed. `plain_numbers`: whether `int(size)` is no size.
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
    in_segments: Choice | None
    refittable: bool = False
    plain_numbers: bool = False

    @property
    def may_be_whole(self) -> bool:
        """Whether TensorRT has the types of all inputs, and the user has broken the graph nowhere."""
        if isinstance(self.module, torch.nn.Module) and has_graph_breaks(self.module):
            return False
        leaves = tree_leaves(as_arguments(self.inputs, self.kwargs))
        return all(leaf.dtype in DTYPES for leaf in leaves if isinstance(leaf, torch.Tensor))

    def engines(self, max_variants: int, merge: str) -> TRTModule:
        """The module as one engine, or as several that cover its range together."""
        traced = self._traced(max_variants, merge)
        try:
            return self._engines(traced, max_variants, merge)
        except UnsupportedError as error:
            if not traced.has_number_makers:
                raise
            try:  # TensorRT may take no size, but a number
                return dataclasses.replace(self, plain_numbers=True).engines(max_variants, merge)
            except (TraceError, UnsupportedError):
                raise error from None

    def _engines(self, traced: Traced, max_variants: int, merge: str) -> TRTModule:
        parts: list[TRTModule] = []
        found: list[Network | Late] = []
        for variant in traced.variants:
            self.on_stage("trace", variant.graph, traced.seconds)
            part, network = self._engine(traced, variant)
            parts.append(part)
            found.append(network)
        networks = [network for network in found if isinstance(network, Network)]
        engines = [part.plan for part in parts]
        described = list(map(_described, range(len(parts)), engines, traced.variants))
        if len(parts) > 1:
            own = engines[0].interface
            specs = [dataclasses.replace(s, dtype=mine.dtype) for s, mine in zip(traced.specs, own.inputs, strict=True)]
            whole = dataclasses.replace(own, inputs=specs, constraints=[])
            model_trt = TRTModule(joined(engines, whole, described), networks)
            if any(part.is_stale for part in parts):
                model_trt.needs_weights()
        else:
            model_trt = parts[0]
            if described[0].notes:
                model_trt.report.variants[:] = [str(described[0])]
        if len(networks) < len(parts) and self.keep_network:
            model_trt.lower_later(lambda: [n if isinstance(n, Network) else n() for n in found])
        if traced.tape is not None:
            same = dataclasses.replace(self, module=torch.nn.Module())  # the module may go before its engine
            again = functools.partial(same._networks, max_variants, merge)
            build_again = functools.partial(same._built_again, model_trt.plan)
            model_trt.make_live(Live(self.module, networks, again, build_again, self.precise.calibrates))
        return model_trt

    def _traced(self, max_variants: int, merge: str) -> Traced:
        """The graphs that serve the range of the module together."""
        start, tape = time.perf_counter(), self._tape()
        asked = dict(kwargs=self.kwargs, **self.names, **self.ranges, shapes=self.shapes, progress=self.progress)
        with recording(tape), Traces(self.module, self.inputs, **asked, plain_numbers=self.plain_numbers) as traces:
            by_values = SameValues(traces.module, traces.leaves, self._lowered)
            # what the values of some weights show is not true of others
            is_by_values = merge == "values" and tape is None
            variants = trace_variants(traces, max_variants, by_values=by_values if is_by_values else None)
        seconds = (time.perf_counter() - start) / len(variants)
        precise = self.precise.for_engines([variant.graph for variant in variants], modules_of(self.module))
        check_profiles([graph_meta(variant.graph).interface for variant in variants])
        has_number_makers = bool(traces.number_makers)
        return Traced(variants, traces.specs, by_values.compared, precise, seconds, tape, has_number_makers)

    def _tape(self) -> Tape | None:
        """What records how weights are made of the module's tensors, if that is asked for."""
        if not self.refittable:
            return None
        module = getattr(self.module, "_orig_mod", self.module)
        if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
            raise InputError("refittable=True is for modules written in Python, and this one has TorchScript modules.")
        tape = Tape(module)
        if tape.unknown:
            names = ", ".join(sorted(tape.unknown))
            raise InputError(
                f"refittable=True is for dense tensors: {names} is sparse, quantised, on no device, or was made in "
                "inference mode, in which torch counts no writes."
            )
        return tape

    def _networks(
        self, max_variants: int, merge: str, module: torch.nn.Module, calibration: Any = None
    ) -> list[Network]:
        """The networks of another module of the same kind, or of this one as it is now, with other calibration data."""
        again = dataclasses.replace(self, module=module, progress=False, on_stage=lambda name, result, seconds: None)
        if calibration is not None:
            precise = dataclasses.replace(self.precise, calibration=calibration, calibration_cache=None)
            again = dataclasses.replace(again, precise=precise)
        traced = again._traced(max_variants, merge)
        return [again._network(traced, variant, *again._ready(traced, variant)) for variant in traced.variants]

    def _built_again(self, first: Engine, networks: list[Network]) -> Engine:
        """The engine of networks that have other weights than those that the first one was built of."""
        engines = [build(network, **self.options, progress=False) for network in networks]
        if not first.variants:
            return dataclasses.replace(engines[0], report=first.report)
        sized = [
            dataclasses.replace(variant, size=len(engine.data))
            for variant, engine in zip(first.variants, engines, strict=True)
        ]
        return dataclasses.replace(joined(engines, first.interface, sized), report=first.report)

    def _ready(self, traced: Traced, variant: Variant) -> tuple[Prepared, torch.fx.GraphModule]:
        """A traced graph after its passes, and what it is compared with."""
        tensors, is_one_of_several = self.tensors(variant.graph), len(traced.variants) > 1
        how = (self.passes, traced.precise, self.module, tensors, self.progress, is_one_of_several)
        with recording(traced.tape):
            made = prepare(variant.graph, *how)
            return made, run(made.graph, made.passes)

    def _network(self, traced: Traced, variant: Variant, made: Prepared, ready: torch.fx.GraphModule) -> Network:
        """The network of a graph after its passes."""
        tape = traced.tape
        try:
            with recording(tape):
                network = self.stage("lower", _lower, ready, self.nan, tape)
        except UnsupportedError as error:
            if self.in_segments is not None:
                if len(traced.variants) > 1 or variant.regions or _is_only_for_engines(variant.graph, error):
                    raise
                raise NotWhole(variant.graph, None if self.precise.changes else error) from error
            plan = plan_in_words(variant.graph, error, self.passes)
            raise UnsupportedError(f"{error}\n{plan}", error.calls) from error.__cause__
        network.assumptions += made.notes
        if self.keep_network:
            network.keep_graphs(*to_be_kept(variant.graph, ready))
        if tape is not None and network.recipes is not None:
            network.structure = structure_key(ready, tape, network)
        return network

    def _engine(self, traced: Traced, variant: Variant) -> tuple[TRTModule, Network | Late]:
        """One engine, verified at the example and where paths were merged by values, and its network.

        Where the engine was built before, and nothing needs the network, it is made when it is asked for.
        """
        try:
            return self._engine_of(traced, variant)
        finally:
            forget(variant.graph)

    def _engine_of(self, traced: Traced, variant: Variant) -> tuple[TRTModule, Network | Late]:
        made, ready = self._ready(traced, variant)
        if self.in_segments is not None and not self.precise.changes:
            choice, graph = self.in_segments, variant.graph
            if choice.earlier(graph, self.module, self.passes, self.nan, self.options).refused is not None:
                raise NotWhole(variant.graph)
        network = None if traced.tape is None else self._network(traced, variant, made, ready)
        start = time.perf_counter()
        file, of_any_weights = self._file(ready), self._file_of_any_weights(ready, network, traced.tape)
        kept, has_other_weights = engine_cache.read(file), False
        if kept is None and network is not None and (any_weights := engine_cache.read(of_any_weights)) is not None:
            if (weights := differing(any_weights, [network])) is not None:
                kept, has_other_weights, file = any_weights, any(weights), of_any_weights
        if kept is not None and not has_other_weights and engine_cache.is_verified(kept.report, self.verify):
            if kept.report.verified is not None:
                kept.report.verified.notes.append(engine_cache.EARLIER)
            self.on_stage("build", kept, time.perf_counter() - start)
            return TRTModule(kept, network), network or self._late(variant, made, ready, file)
        if network is None:
            network = self._network(traced, variant, made, ready)
        also = [shapes for region, shapes in traced.compared if any(region is r for r in variant.regions)]
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
        if kept is None:
            how = dict(self.options, progress=self.progress, meanwhile=verifying.while_building)
            how["refittable"] = self.refittable
            model_trt = TRTModule(self.stage("build", build, network, **how), network)
        else:
            report = Report(assumptions=list(network.assumptions), needs=list(kept.report.needs))
            model_trt = TRTModule(dataclasses.replace(kept, report=report), network)
            if has_other_weights:
                model_trt.needs_weights()
            self.on_stage("build", kept, time.perf_counter() - start)
            verifying.while_building()
        verifying.finish(model_trt)
        built = model_trt.plan
        if kept is None:
            engine_cache.write(of_any_weights if "refittable" in built.made_by else file, built)
        elif not has_other_weights and built.report.verified is not None:
            engine_cache.write(file, built)
        return model_trt, network

    def _file_of_any_weights(
        self, ready: torch.fx.GraphModule, network: Network | None, tape: Tape | None
    ) -> Path | None:
        """The file of an engine that differs from that of a network in no more than weights, which can be changed."""
        if tape is None or network is None or not builds_refittable():
            return None
        return engine_cache.file_of(ready, self.options, self.nan, True, of_module(tape), "any", network.structure)

    def _file(self, ready: torch.fx.GraphModule) -> Path | None:
        return engine_cache.file_of(ready, self.options, self.nan, self.refittable)

    def _late(self, variant: Variant, made: Prepared, ready: torch.fx.GraphModule, file: Path | None) -> Late:
        """Makes the network of an engine that was built before."""
        keyed = functools.partial(engine_cache.file_of, ready, self.options, self.nan, self.refittable)
        nan, notes, graph = self.nan, made.notes, variant.graph

        def network() -> Network:
            if keyed() != file:
                raise Torch2RTError(f"The module is not as it was when it was converted. {engine_cache.AGAIN}")
            network = lower(ready, nan=nan, passes=[])
            network.assumptions += notes
            network.keep_graphs(*to_be_kept(graph, ready))
            return network

        return network

    def _lowered(self, graph: torch.fx.GraphModule) -> Network:
        return lower(run(graph, self.passes), nan=self.nan, passes=[])

    def tensors(self, graph: torch.fx.GraphModule) -> list[torch.Tensor]:
        """The example's tensors, in the order of a graph's inputs."""
        return graph_meta(graph).interface.tensors(*as_arguments(self.inputs, self.kwargs))

    def stage(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of one stage, which is reported with its name and its seconds."""
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.on_stage(name, result, time.perf_counter() - start)
        return result


def _described(index: int, engine: Engine, variant: Variant) -> EngineVariant:
    """An engine as one of several."""
    size = len(engine.data)
    return EngineVariant(index, engine.interface, variant.text, variant.line, tuple(variant.notes), size)


def _is_only_for_engines(graph: torch.fx.GraphModule, error: UnsupportedError) -> bool:
    """Whether a trace with fallback is another one: it has calls that engines need not, and draws as torch does."""
    refused = (node for node in graph.graph.nodes if node.name in error.calls)
    return graph_meta(graph).has_left_out or any(map(draws, refused))


def _lower(graph: torch.fx.GraphModule, nan: str, tape: Tape | None) -> Network:
    return lower_with_values(graph, nan=nan, passes=[], tape=tape)[0]
