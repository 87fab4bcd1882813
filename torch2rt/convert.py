"""The one call that most users need."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torch2rt.arguments import whole_number
from torch2rt.debug.same_values import SameValues
from torch2rt.debug.verify import Verifying, check_mode
from torch2rt.engine.build import build
from torch2rt.engine.joined import joined
from torch2rt.engine.variant import EngineVariant
from torch2rt.errors import BuildError, InputError, TraceError, UnsupportedError
from torch2rt.fallback import Choice, convert_in_segments, plan_in_words
from torch2rt.graph import graph_meta
from torch2rt.lowering import lower
from torch2rt.network import Network
from torch2rt.passes.order import Pass, chosen, run
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.segments import PartitionedModule
from torch2rt.runtime.stateful import Found, StatefulModule, find_state
from torch2rt.tracing.coverage import MAX_VARIANTS
from torch2rt.tracing.regions import Variant
from torch2rt.tracing.trace import Traces, as_arguments, trace, trace_variants

MERGE = ("values", "proof")
STATES = ("refuse", "write", "explicit")


def torch2rt(
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
    shapes: Any = None,
    max_variants: int = MAX_VARIANTS,
    merge: str = "values",
    max_workspace_size: int | None = None,
    compute_capabilities: Any = None,
    optimization_level: int | None = None,
    tf32: bool | None = None,
    nan: str = "keep",
    float64: str = "float32",
    log_level: Any = None,
    keep_network: bool = True,
    verify: bool | str = True,
    cuda_graph: bool = False,
    progress: bool | None = None,
    passes: Iterable[Pass] | None = None,
    configure: Callable[[Any], None] | None = None,
    fallback: bool = False,
    torch_executed: Iterable[Any] = (),
    min_segment_calls: int | None = None,
    max_sizes: int | None = None,
    state: str = "refuse",
    on_stage: Callable[[str, Any, float], None] = lambda name, result, seconds: None,
) -> TRTModule | PartitionedModule | StatefulModule:
    """Convert a module to a TensorRT engine that is called like the module.

    - `module`: in eval mode. What `torch.export.export`, `torch.jit.trace` and `torch.jit.script` make of one, too.
    - `inputs`: the positional arguments of an example call, a list or tuple (or one tensor). They may nest tensors in
      lists, tuples, dicts and dataclasses; numbers, strings, bools and `None` among them are constants of the engine.
      Their values are what `verify` compares on; for the engine their dtypes, ranks and static sizes matter. `kwargs`:
      the keyword arguments, likewise.
      What lies in memory as `torch.channels_last` or `torch.channels_last_3d` says, the engine will read so, without a
      copy; every input may have any strides, and is copied where they are not the engine's.
    - `min_shapes`, `opt_shapes`, `max_shapes`: the shapes to serve, one per input tensor: a list (flat, or nested like
      `inputs`; tensors of `kwargs` come last) or a dict by input name. Where min and max differ a dimension is dynamic;
      what is not given is the example's shape. `max_batch_size=n` is short for dimension 0 from 1 to n everywhere.
      The module is traced at these shapes, also where they leave out the example's.
    - `shapes`: a list of choices of shapes, each given as `max_shapes` is, to serve these and no others, such as
      `[{"x": (1, 3, 224, 224)}, {"x": (1, 3, 384, 384)}]`. The first is tuned for.
    - `max_variants`: where the module does something else for some of the sizes, as many engines may serve the range
      together, each with a copy of the weights; `TraceError` says what they would be if that is too few.
      `model_trt.report` lists them.
    - `merge`: what shows that one engine is right where the module takes two paths. `"values"`: where one of them is
      for a few sizes, such as a batch of 1, the graph of the other is run there, and compared with the module on drawn
      inputs; the report says so. `"proof"`: only that both paths make the same calls.
    - `input_names`, `output_names`: the engine's names, in the order of the tensors; one name may stand alone. By
      default, inputs are called as the parameters of `module.forward` are: `x`, `args_0` for the first of `*args`,
      `boxes_0` and `state_h` for the tensors in `boxes=[a]` and `state={"h": b}`. Outputs are `output_0` and so on.
    - `float64`: TensorRT has no float64. Where a float64 value reaches the outputs only through casts to float32 or
      less, the engine computes it in float32, and `model_trt.report` says so; `float64="refuse"` raises
      `UnsupportedError` instead.
    - `keep_network`: keep the TensorRT network, for `model_trt.network` and `model_trt.reference()`.
    - `verify`: compare with the module on the example inputs: the engine where there is a GPU that runs it, else the
      reference. `"range"` also compares at the min and max shapes and some sizes between them, with other values from
      the examples' range. `False` compares nothing. What was compared is in `model_trt.report`.
    - `nan`: `"keep"`, or `"ignore"` for a module that never meets a NaN, as for `torch2rt.lower`.
    - `passes`: what changes the traced graph before it is lowered; by default `torch2rt.passes.default(float64)`.
      `torch2rt.passes` says how to write one.
    - `cuda_graph`: replay each call as a CUDA graph; `model_trt.cuda_graph` says so later on.
    - `max_workspace_size`, `compute_capabilities`, `optimization_level`, `tf32`, `log_level`, `progress`, `configure`:
      as for `torch2rt.build`.
    - `fallback`: where TensorRT cannot take some calls, `True` leaves them to torch and makes engines of the others. It
      then returns a `PartitionedModule`, whose `report` has a line for each segment. By default such a module is
      refused, and the error says what `fallback=True` would do.
    - `torch_executed`: with `fallback`, what is to stay torch's in any case: functions as the graph calls them
      (`torch.nn.functional.relu`), paths of submodules (`"backbone.conv1"`) and classes of submodules.
    - `min_segment_calls`: with `fallback`, an engine of fewer calls is not worth its launch, so that they stay torch
      calls: 3 by default.
    - `max_sizes`: with `fallback`, the largest size that engines are built for where it depends on values, as does the
      number of elements that `torch.nonzero` finds: 1024 by default, or what torch knows to be the most. Calls with
      other sizes run such a segment with torch.
    - `state`: what becomes of a module that writes to its buffers, to tensors in its attributes, or to its inputs.
      `"refuse"` raises `TraceError`. `"write"` returns a `StatefulModule`, which keeps the tensors in the same way, and
      writes to inputs. `"explicit"` makes them an argument, a dict `state` by name, and returns the result, the new
      ones in a dict, and what was written to inputs in a list. What is written to is seen in a run of the module on the
      example; it must keep its shapes. `max_batch_size` has no meaning then: give `max_shapes`.
    - `on_stage`: called after each stage with its name, its result and the seconds that it took: `"trace"` with the
      `torch.fx.GraphModule`, `"lower"` with the network, `"build"` with the `torch2rt.Engine`.

    Returns a `TRTModule`, or a `PartitionedModule`, or a `StatefulModule`. Raises `InputError`, `TraceError`,
    `UnsupportedError`, `BuildError`, or `AccuracyError` where it does not compute what the module does; see
    `torch2rt.errors`.

    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [torch.randn(2, 3)], max_batch_size=8)
    >>> model_trt.reference()(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """
    check_mode(verify)
    ordered = chosen(passes, float64)
    choice = Choice.of(fallback, torch_executed, min_segment_calls, max_sizes)
    if merge not in MERGE:
        raise InputError(f"{merge=} is not one of {', '.join(map(repr, MERGE))}.")
    most = whole_number("max_variants", max_variants, 1) or MAX_VARIANTS
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    stateful = _state(module, inputs, kwargs, state, max_batch_size, shapes)
    if stateful is not None:
        module, kwargs = stateful.module, {**(kwargs or {}), "state": stateful.values}
        kept = [tuple(value.shape) for value in stateful.values.values()]
        min_shapes, opt_shapes, max_shapes = (
            [*given, *kept] if isinstance(given, (list, tuple)) else given
            for given in (min_shapes, opt_shapes, max_shapes)
        )
    ranges = dict(min_shapes=min_shapes, opt_shapes=opt_shapes, max_shapes=max_shapes, max_batch_size=max_batch_size)
    options = dict(
        max_workspace_size=max_workspace_size,
        compute_capabilities=compute_capabilities,
        optimization_level=optimization_level,
        tf32=tf32,
        log_level=log_level,
        configure=configure,
    )

    def lowered(graph: torch.fx.GraphModule) -> Network:
        try:
            return lower(run(graph, ordered), nan=nan, passes=[])
        except UnsupportedError as error:
            if choice is not None:
                raise
            raise UnsupportedError(f"{error}\n{plan_in_words(graph, error, ordered)}", error.calls) from error.__cause__

    def engines() -> TRTModule:
        start = time.perf_counter()
        with Traces(
            module, inputs, kwargs, input_names, output_names, **ranges, shapes=shapes, progress=progress
        ) as traces:
            by_values = SameValues(traces.module, traces.leaves, lowered)
            variants = trace_variants(traces, most, by_values=by_values if merge == "values" else None)
        seconds = (time.perf_counter() - start) / len(variants)
        parts: list[TRTModule] = []
        networks: list[Network] = []
        for variant in variants:
            on_stage("trace", variant.graph, seconds)
            also = [shapes for region, shapes in by_values.compared if any(region is r for r in variant.regions)]
            network = _stage(on_stage, "lower", lowered, variant.graph)
            verifying = Verifying(
                module,
                variant.graph,
                network,
                network.interface.tensors(*as_arguments(inputs, kwargs)),
                verify,
                tf32=tf32,
                build=functools.partial(build, **options, progress=False),
                passes=ordered,
                also=also,
            )
            meanwhile = verifying.while_building
            engine = _stage(on_stage, "build", build, network, **options, progress=progress, meanwhile=meanwhile)
            parts.append(TRTModule(engine, network))
            verifying.finish(parts[-1])
            networks.append(network)
        model_trt = parts[0]
        described = list(map(_described, range(len(parts)), parts, variants))
        if len(variants) > 1:
            whole = replace(networks[0].interface, inputs=traces.specs, constraints=[])
            model_trt = TRTModule(joined([part.built for part in parts if part.built], whole, described), networks)
        elif described[0].notes:
            model_trt.report.variants.append(str(described[0]))
        return model_trt

    def segments(choice: Choice) -> PartitionedModule:
        if shapes is not None:
            raise InputError(
                "shapes= is for modules that TensorRT can take as a whole. Give min_shapes and max_shapes."
            )
        stage = functools.partial(_stage, on_stage)
        names = dict(input_names=input_names, output_names=output_names)
        graph = stage(
            "trace", trace, module, inputs, kwargs=kwargs, **names, **ranges, progress=progress, fallback=True
        )
        refused: UnsupportedError | None = None
        try:
            lowered(graph)
        except UnsupportedError as error:
            refused = error
        tensors = graph_meta(graph).interface.tensors(*as_arguments(inputs, kwargs))
        how = dict(passes=ordered, nan=nan, verify=verify, options=options, progress=progress, stage=stage)
        return convert_in_segments(module, graph, tensors, choice, refused, **how)  # type: ignore[arg-type]

    converted: TRTModule | PartitionedModule | None = None
    if choice is None:
        converted = engines()
    elif not choice.torch_executed:
        with contextlib.suppress(TraceError, UnsupportedError, BuildError):
            converted = engines()
    if converted is None:
        assert choice is not None
        converted = segments(choice)
    return _finished(converted, stateful, state, keep_network, cuda_graph)


def _finished(model_trt: Any, stateful: Found | None, state: str, keep_network: bool, cuda_graph: bool) -> Any:
    """A converted module as it was asked for."""
    if not keep_network:
        model_trt.drop_network()
    model_trt.cuda_graph = cuda_graph
    if stateful is None or state == "explicit":
        return model_trt
    return StatefulModule(model_trt, stateful.values, stateful.module._written)


def _state(module: Any, inputs: Any, kwargs: Any, state: str, max_batch_size: Any, shapes: Any) -> Found | None:
    """The state of a module, if it has one that is asked for."""
    if state not in STATES:
        raise InputError(f"{state=} is not one of {', '.join(map(repr, STATES))}.")
    if state == "refuse" or not isinstance(module, torch.nn.Module):
        return None
    found = find_state(module, *as_arguments(inputs, kwargs))
    if found is not None and max_batch_size is not None:
        raise InputError(f"{max_batch_size=} would make dimensions of the module's state dynamic. Give max_shapes.")
    if found is not None and shapes is not None:
        raise InputError("shapes= does not name those of the module's state. Give min_shapes and max_shapes.")
    return found


def _described(index: int, part: TRTModule, variant: Variant) -> EngineVariant:
    """An engine as one of several."""
    engine = part.built
    assert engine is not None
    size = len(engine.data)
    return EngineVariant(index, engine.interface, variant.text, variant.line, tuple(variant.notes), size)


def _stage(
    report: Callable[[str, Any, float], None], name: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The result of one stage, which is reported with its name and its seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    report(name, result, time.perf_counter() - start)
    return result
