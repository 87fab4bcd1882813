"""A conversion in segments, engines and torch calls, and whether torch alone is faster."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torch2rt.conversion.conversion import Conversion
from torch2rt.conversion.earlier import NotWhole
from torch2rt.conversion.fallback import Choice, convert_in_segments, fitting, in_torch, torch_calls, why_not_whole
from torch2rt.conversion.measuring import Measured, measured
from torch2rt.conversion.prepared import Prepared, prepare
from torch2rt.debug.inputs import first_calls
from torch2rt.errors import InputError, UnsupportedError
from torch2rt.passes.copies import to_be_kept
from torch2rt.passes.options import Precision
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.structure import unflatten
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.trace import as_arguments, trace

M = TypeVar("M", TRTModule, PartitionedModule)


class Segmenting:
    """A conversion in segments: its traced graph, the graph in the types that are asked for, what is refused of it.

    `refused` is why the module is not one engine, where that was tried. Raises `InputError` for arguments that only
    modules have which TensorRT takes as a whole, and what tracing raises.
    """

    def __init__(self, conversion: Conversion, choice: Choice, refused: Exception | None = None) -> None:
        self.conversion, self.choice = conversion, choice
        if conversion.shapes is not None:
            raise InputError("shapes= is for modules that TensorRT takes as a whole. Give min_shapes and max_shapes.")
        if isinstance(refused, NotWhole):
            self.graph, self.error = refused.graph, refused.error
        else:
            asked = dict(kwargs=conversion.kwargs, **conversion.names, **conversion.ranges)
            asked.update(progress=conversion.progress, fallback=True)
            self.graph = conversion.stage("trace", trace, conversion.module, conversion.inputs, **asked)
            self.error = None
        tensors = conversion.tensors(self.graph)
        self.made = Prepared(self.graph, conversion.passes, conversion.module, tensors)
        if conversion.precise.changes:
            self.error = self._why_not_whole()
            self.made = in_low_precision(
                self.made, conversion.precise, choice, self.error, conversion.nan, conversion.progress
            )
            self.error = self._why_not_whole()

    def converted(self) -> PartitionedModule:
        """The module as engines and torch calls, the faster ones where that is measured."""
        model_trt = self._converted()
        return self.or_torch(model_trt) if self.choice.measures and model_trt.engines else model_trt

    def or_torch(self, model_trt: M) -> M | PartitionedModule:
        """What was converted, or torch's calls alone where these were measured to be faster."""
        found = self._measured(model_trt)
        if found.is_faster_in_torch:
            return self._converted(found)
        model_trt.report.measured.insert(0, f"whole: {found}")
        return model_trt

    def _converted(self, slow: Measured | None = None) -> PartitionedModule:
        conversion, made = self.conversion, self.made
        earlier = self.choice.earlier(made.graph, conversion.module, made.passes, conversion.nan, conversion.options)
        if self.error is None and earlier.refused is None and slow is None and not conversion.precise.changes:
            self.error = self._why_not_whole()
        model_trt = convert_in_segments(
            made.module,
            made.graph,
            made.tensors,
            self.choice,
            self.error,
            earlier,
            passes=made.passes,
            nan=conversion.nan,
            verify=conversion.verify,
            options=conversion.options,
            progress=conversion.progress,
            stage=conversion.stage,
            slow=slow,
        )
        model_trt.report.assumptions += made.notes
        object.__setattr__(model_trt, "traced", to_be_kept(self.graph)[0])  # a graph is a module, but no part of it
        if slow is not None:
            model_trt.report.measured = [f"whole: {slow}"]
        return model_trt

    def _why_not_whole(self) -> UnsupportedError | None:
        return why_not_whole(self.made.graph, self.made.passes, self.conversion.nan)

    def _measured(self, model_trt: TRTModule | PartitionedModule) -> Measured:
        """What whole calls take, as they will be made: converted, and with torch calls alone."""
        interface = model_trt._interface()
        tensors = interface.tensors(*as_arguments(self.conversion.inputs, self.conversion.kwargs))
        tensors = first_calls(interface, tensors, is_slow=False)[0].tensors  # at shapes that are served
        args, kwargs = unflatten(interface.arguments, tensors)

        def calls(module: TRTModule | PartitionedModule) -> Callable[..., Any]:
            module.cuda_graph = self.choice.graphs
            return lambda *_: module(*args, **kwargs)

        def by_torch(compiles: bool) -> Callable[..., Any]:
            passes = fitting(self.made.graph, self.made.passes)
            return calls(in_torch(self.made.graph, self.choice, passes, self.conversion.nan, compiles))

        ways = {way: functools.partial(by_torch, way) for way in self.choice.ways}
        found = measured(calls(model_trt), ways, tensors)
        model_trt.cuda_graph = False
        return found


def in_low_precision(
    made: Prepared,
    precise: Precision,
    choice: Choice,
    error: UnsupportedError | None,
    nan: str,
    progress: bool | None = None,
) -> Prepared:
    """The graph in the types that are asked for, but for the calls that stay torch calls.

    `error` is what lowering has refused of the whole graph.
    """
    passes = fitting(made.graph, made.passes)
    kept = torch_calls(made.module, made.graph, choice, error, passes, nan)

    def stays_torch(node: torch.fx.Node) -> bool:
        return node.meta.get("origin") in kept

    precise = dataclasses.replace(precise, keep_fp32=(*precise.keep_fp32, *([stays_torch] if kept else [])))
    with same_states():  # torch's calls may draw random numbers
        made = prepare(made.graph, passes, precise, made.module, made.tensors, progress)
    for node in made.graph.graph.nodes:
        node.meta["origin"] = node.name
    return made
