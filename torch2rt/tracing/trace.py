"""Trace: run a module once on fake tensors and write down the torch calls it makes, as a `torch.fx` graph.

`trace` prepares the inputs, and chooses the sizes that stand for the dynamic ones; `tracer.py` is the run itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from torch2rt.arguments import given_names, whole_number
from torch2rt.errors import InputError, Torch2RTError, TraceError
from torch2rt.graph import graph_meta
from torch2rt.input_ranges import check_listed, check_profiles, describe_inputs, listed_shapes
from torch2rt.interface import Input, Interface, Shape, with_size
from torch2rt.progress import Spinner
from torch2rt.promises import asked, without_ends
from torch2rt.size_choices import samples
from torch2rt.sizes import truths
from torch2rt.structure import flatten
from torch2rt.tracing.calls.randomness import are_equal, states_elsewhere
from torch2rt.tracing.calls.refusals import RefusedError
from torch2rt.tracing.patches.memos import uncached
from torch2rt.tracing.patches.number_types import symbolic_numbers
from torch2rt.tracing.patches.size_texts import HASHED_SIZES
from torch2rt.tracing.patches.size_types import files_that_ask, plain_types
from torch2rt.tracing.patches.torchscript import reloaded, unfused
from torch2rt.tracing.recorder import UnseenTensorError
from torch2rt.tracing.signature import keyword_names, tensor_names
from torch2rt.tracing.sizes.coverage import MAX_VARIANTS, cover
from torch2rt.tracing.sizes.guards import Decisions, TooNestedError
from torch2rt.tracing.sizes.hints import most_telling, shapes_to_try
from torch2rt.tracing.sizes.regions import IsSame, Variant, false_assumptions, not_empty
from torch2rt.tracing.sizes.same_calls import same_calls
from torch2rt.tracing.traced_run import run_traced, runs
from torch2rt.tracing.tracer import Tracer


def trace(
    module: torch.nn.Module | torch.export.ExportedProgram,
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: str | Sequence[str] | None = None,
    output_names: str | Sequence[str] | None = None,
    min_shapes: Any = None,
    opt_shapes: Any = None,
    max_shapes: Any = None,
    max_batch_size: int | None = None,
    multiple_of: Any = None,
    dynamic_shapes: Any = None,
    progress: bool | None = None,
    fallback: bool = False,
) -> torch.fx.GraphModule:
    """Record the torch calls that `module(*inputs, **kwargs)` makes.

    The arguments are those of `torch2rt.torch2rt`; `progress` shows a spinner with the module that is being traced, by
    default where stderr is a terminal. `fallback` also records what only torch can run, such as calls that draw random
    numbers, of which `lower` makes no network. The graph has one placeholder per input tensor and one output, a
    flat tuple; running it on real tensors does what the module does. Every node carries `meta["val"]` (fake tensors
    with symbolic sizes), `meta["module"]` (module path) and `meta["source"]` (the user's `file:line`); the graph module
    carries `meta["torch2rt"]`, with the interface of the engine to be; `torch2rt.graph` documents all of it.

    Raises `InputError` for inputs that TensorRT cannot take, `TraceError` where the module's Python depends on tensor
    values or decides something about a dynamic size that does not hold for its whole range.

    >>> graph = trace(torch.nn.ReLU(), [torch.randn(2, 3)], max_batch_size=4)
    >>> [node.op for node in graph.graph.nodes]
    ['placeholder', 'call_function', 'output']
    """
    ranges = (min_shapes, opt_shapes, max_shapes, max_batch_size)
    promised = dict(multiple_of=multiple_of, dynamic_shapes=dynamic_shapes)
    with Traces(
        module, inputs, kwargs, input_names, output_names, *ranges, progress, **promised, fallback=fallback
    ) as traces:
        graphs = traces.over_range()
        if traces.may_be_empty:
            raise InputError("In one graph a dynamic size starts at 1, not at 0: torch2rt() makes an engine for 0.")
        if splits := graph_meta(graphs[0]).splits:
            try:
                (variant,) = cover(traces, graphs, 1, [same_calls])
            except Exception:
                raise splits[0].error from None
            return variant.graph
        check_profiles([graph_meta(graphs[0]).interface])
        return graphs[0]


def trace_variants(traces: Traces, max_variants: int = MAX_VARIANTS, by_values: IsSame | None = None) -> list[Variant]:
    """The graphs that serve the range of a module together; one if one is right for the whole range.

    `by_values` says whether two paths that make other calls compute the same, as for `coverage.cover`.
    """
    same = [same_calls, *([by_values] if by_values else [])]
    try:
        graphs = traces.over_range()
    except TraceError:
        if traces.listed is None:
            raise
        graphs = []  # no graph takes symbolic sizes
    if traces.listed is None and not graph_meta(graphs[0]).splits and not traces.may_be_empty:
        alone = [Variant(graphs[0], [])]
        if not false_assumptions(graph_meta(graphs[0])):
            return alone
        try:  # what torch takes for granted of sizes from 2 on is false for others
            return cover(traces, graphs, max_variants, same, traces.listed)
        except Exception:
            return alone  # lowering says what is wrong
    return cover(traces, graphs, max_variants, same, traces.listed)


class Traces:
    """The traces of one module, at any sizes; a context, in which a trace may have changed something for the next one.

    - `specs`: the inputs with the ranges that are to be served.
    - `listed`: the choices of shapes that are to be served, where only some are.
    - `number_makers`: the globals of code in which `int(size)` and `float(size)` are sizes, not numbers; with
      `plain_numbers` of none.
    """

    @torch.inference_mode(False)  # it may load the module again, see `__enter__`
    def __init__(
        self,
        module: torch.nn.Module | torch.export.ExportedProgram,
        inputs: Any,
        kwargs: Mapping[str, Any] | None = None,
        input_names: str | Sequence[str] | None = None,
        output_names: str | Sequence[str] | None = None,
        min_shapes: Any = None,
        opt_shapes: Any = None,
        max_shapes: Any = None,
        max_batch_size: int | None = None,
        progress: bool | None = None,
        shapes: Any = None,
        multiple_of: Any = None,
        dynamic_shapes: Any = None,
        fallback: bool = False,
        plain_numbers: bool = False,
    ) -> None:
        from torch2rt.backend.tensorrt import DTYPES

        if isinstance(module, torch.export.ExportedProgram):
            module = module.module()
        if not isinstance(module, torch.nn.Module):
            raise InputError(
                f"Expected a torch.nn.Module or a torch.export.ExportedProgram to convert, got {type(module).__name__}."
            )
        self.leaves, self.arguments = flatten(as_arguments(inputs, kwargs), torch.is_tensor, "inputs")
        self.module = reloaded(getattr(module, "_orig_mod", module))  # what torch.compile has wrapped
        names = given_names("input_names", input_names)
        names = tensor_names(self.module.forward, self.arguments) if names is None else names
        max_batch_size = whole_number("max_batch_size", max_batch_size, 1)
        self.listed: list[list[Shape]] | None = None
        if shapes is not None:
            given = min_shapes, opt_shapes, max_shapes, max_batch_size
            self.listed = listed_shapes(shapes, self.leaves, self.arguments, names, given)
            min_shapes, max_shapes = (
                [tuple(map(end, *each)) if len(each) > 1 else each[0] for each in zip(*self.listed)]
                for end in (min, max)
            )
            opt_shapes = self.listed[0]
        promised = None
        if dynamic_shapes is not None:
            promised = asked(dynamic_shapes, self.module.forward, *as_arguments(inputs, kwargs))
        ranges = (min_shapes, opt_shapes, max_shapes, max_batch_size)
        relations = promised if self.listed is None else without_ends(promised)
        self.specs: list[Input] = describe_inputs(
            self.leaves, self.arguments, names, *ranges, None if fallback else DTYPES, multiple_of, relations
        )
        if self.listed is not None:
            check_listed(self.listed, self.specs, self.leaves, promised)
        self.parameters = keyword_names(self.module.forward)
        self.output_names = output_names
        self.spinner = Spinner("trace", progress)
        self.record_operators = any(isinstance(m, torch.jit.ScriptModule) for m in self.module.modules())
        self.past_caches = 0  # 1: functools' caches are passed over; 2: sizes are keys of tables, too
        self.fallback, self.unbacked = fallback, False
        self.plain_numbers = plain_numbers
        self.number_makers: list[dict[str, Any]] = []
        self.type_askers = files_that_ask(module) if any(spec.dynamic for spec in self.specs) else []
        self._decisions: Decisions | None = None  # of the latest trace
        self._with_plain_numbers: list[dict[str, Any]] = []
        self.stack = ExitStack()

    @property
    def may_be_empty(self) -> bool:
        """Whether a dynamic size may be 0."""
        return not_empty(self.specs) != self.specs

    def __enter__(self) -> Traces:
        self.stack.enter_context(torch.inference_mode(False))  # whose tensors have no write counters
        self.stack.enter_context(unfused(self.module))
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()

    def at(self, specs: Sequence[Input], shapes: Sequence[Shape]) -> torch.fx.GraphModule:
        """The graph for inputs of these ranges, traced at these sizes; claims that narrow the ranges are its splits."""
        while True:
            try:
                before = states_elsewhere()
                graph = self._without_plain_numbers(specs, shapes)
                if states_elsewhere() != before and not are_equal(graph, self._run(specs, shapes)):
                    raise TraceError(
                        "The module draws numbers from Python's random or numpy.random, and does something else each "
                        "time. An engine draws no random numbers. Pass the noise to the module as an input."
                    )
                return graph
            except Exception as error:
                if not self._can_try_again(error):
                    raise

    def _can_try_again(self, error: Exception) -> bool:
        """Whether a trace failed for what can be changed for the next one, which is done."""
        again = False
        unseen = isinstance(error, UnseenTensorError) or "TorchScript interpreter" in str(error)
        if unseen and not self.record_operators:  # watching all that torch runs makes tracing slower by half
            self.record_operators = again = True
        if "unhashable type: non-nested SymInt" in str(error) and self.past_caches < 2:
            self.stack.enter_context(HASHED_SIZES if self.past_caches else uncached())
            self.past_caches, again = self.past_caches + 1, True
        if self.fallback and not self.unbacked and isinstance(error, TraceError) and "depend" in str(error):
            self.unbacked = again = True  # perhaps torch can go on with sizes that depend on values
        return again

    def _without_plain_numbers(self, specs: Sequence[Input], shapes: Sequence[Shape]) -> torch.fx.GraphModule:
        """A trace in which `int(size)` is a size, where the module can do with one."""
        try:
            graph = self._run(specs, shapes)
        except Exception:
            if not (makers := self._new_number_makers()):
                raise
            self.number_makers += makers
            return self._without_plain_numbers(specs, shapes)
        if not (makers := self._new_number_makers()):
            return graph
        self.number_makers += makers
        try:
            return self._without_plain_numbers(specs, shapes)
        except Exception:
            self.number_makers = [scope for scope in self.number_makers if not _is_one_of(scope, makers)]
            self._with_plain_numbers += makers
            return graph

    def _new_number_makers(self) -> list[dict[str, Any]]:
        if self.plain_numbers:
            return []
        known = [*self.number_makers, *self._with_plain_numbers]
        found = self._decisions.number_makers if self._decisions is not None else []
        return [scope for scope in found if not _is_one_of(scope, known)]

    def _run(self, specs: Sequence[Input], shapes: Sequence[Shape]) -> torch.fx.GraphModule:
        with symbolic_numbers(self.number_makers), plain_types(self.type_askers):
            return self._traced(specs, shapes)

    def _traced(self, specs: Sequence[Input], shapes: Sequence[Shape]) -> torch.fx.GraphModule:
        tracers = [self._tracer(specs)]
        self._decisions = tracers[0].recorder.decisions
        with self.spinner.turning(lambda: tracers[0].recorder.location.latest):
            run = lambda: run_traced(self.module, tracers[-1], self.leaves, shapes, self.output_names, self.accepts)  # noqa: E731
            graph, generators = run(), tracers[0].recorder.generators
            if generators is None or not generators.sets_constants:
                return graph
            tracers.append(self._tracer(specs))
            try:
                is_same = are_equal(graph, run())
            finally:
                for tracer in reversed(tracers):
                    if tracer.recorder.generators is not None:
                        tracer.recorder.generators.give_back()
        if not is_same:
            raise TraceError(
                "The module draws from a generator in another state at each call. Keep the generator in an attribute "
                "of the module, so that its numbers are those that the module would draw. (Or another thread has drawn "
                "random numbers meanwhile: convert again.)"
            )
        return graph

    def _tracer(self, specs: Sequence[Input]) -> Tracer:
        interface = Interface(specs, self.arguments, self.parameters)
        return Tracer(self.module, interface, self.record_operators, self.fallback, self.unbacked)

    def refusal(self, shapes: Sequence[Shape]) -> BaseException | None:
        """The error that the module itself raises with these shapes."""
        static = [replace(spec, min=shape, opt=shape, max=shape) for spec, shape in zip(self.specs, shapes)]
        tracer = self._tracer(static)
        try:
            with self.spinner.turning(lambda: tracer.recorder.location.latest):
                run_traced(self.module, tracer, self.leaves, shapes, None, lambda shapes: True)
        except RefusedError as error:
            return error.__cause__
        except Torch2RTError as error:  # of what cannot be converted: perhaps the module runs
            zeros = [x.new_zeros(shape) for x, shape in zip(self.leaves, shapes, strict=True)]
            return None if runs(self.module, self.arguments, zeros) else error
        return None

    def accepts(self, shapes: Sequence[Shape]) -> bool:
        """Whether the module runs with these shapes."""
        return self.refusal(shapes) is None

    def over_range(self) -> list[torch.fx.GraphModule]:
        """A graph that is right for the whole range, or else those for parts of it that the sizes to try lead to.

        Raises the most telling error where none leads to a graph.
        """
        specs = not_empty(self.specs)
        failures: list[Exception] = []
        parts: list[torch.fx.GraphModule] = []
        claims: list[set[Any]] = []
        for shapes in shapes_to_try(specs, self.leaves):
            try:
                graph = self.at(specs, shapes)
                if self._leave_out_small(graph):
                    return self.over_range()
                if not (splits := graph_meta(graph).splits):
                    return [graph]
                parts.append(graph)
                if {split.decision.claim for split in splits} in claims:
                    break  # other sizes take the same path
                claims.append({split.decision.claim for split in splits})
            except TooNestedError:
                raise
            except Exception as error:  # perhaps only for these sizes
                failures.append(error)
        if parts:
            return parts
        failure = most_telling(failures)
        if isinstance(failure, RefusedError) and not failure.of_types:
            own = self.refusal([tuple(leaf.shape) for leaf in self.leaves])
            if own is not None and not runs(self.module, self.arguments, self.leaves):
                raise own  # whatever the sizes
        raise failure

    def _leave_out_small(self, graph: torch.fx.GraphModule) -> bool:
        """Leave out small sizes at which the module reads a place that is not there, as `x[5]`: calls are refused."""
        meta = graph_meta(graph)
        before = list(self.specs)
        for claim in (split.decision.claim for split in meta.splits if split.decision.of_place):
            if len(claim.free_symbols) != 1:
                continue
            (symbol,) = claim.free_symbols
            dim = meta.symbols[symbol]
            sizes = np.array(samples(dim.sizes))
            served = sizes[truths(claim, {symbol: sizes})]
            spec = self.specs[dim.input]
            if self.listed is not None or not len(served) or not sizes[0] < served[0] <= spec.opt[dim.axis]:
                continue
            opts = [other.opt for other in self.specs]
            ends = [with_size(spec.opt, dim.axis, int(n)) for n in (sizes[0], sizes[sizes < served[0]][-1])]
            if not any(self.accepts([*opts[: dim.input], end, *opts[dim.input + 1 :]]) for end in ends):
                self.specs[dim.input] = replace(spec, min=with_size(spec.min, dim.axis, int(served[0])))
        return self.specs != before


def as_arguments(inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call by position and by name, where one that is no list or tuple stands for itself."""
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,), dict(kwargs or {})


def _is_one_of(scope: dict[str, Any], scopes: Sequence[dict[str, Any]]) -> bool:
    return any(scope is other for other in scopes)
