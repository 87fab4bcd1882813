"""The one call that most users need."""

from __future__ import annotations

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
from torch2rt.errors import InputError
from torch2rt.graph import graph_meta
from torch2rt.interface import check_profiles
from torch2rt.lowering import lower
from torch2rt.migration import from_torch2trt
from torch2rt.network import Network
from torch2rt.passes.copies import without_gpu_memory
from torch2rt.passes.options import Precision
from torch2rt.passes.order import Pass, chosen, run
from torch2rt.prepared import prepare
from torch2rt.runtime.graph_cache import GraphCache
from torch2rt.runtime.module import TRTModule
from torch2rt.tracing.coverage import MAX_VARIANTS
from torch2rt.tracing.regions import Variant
from torch2rt.tracing.trace import Traces, as_arguments, trace_variants

MERGE = ("values", "proof")


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
    multiple_of: Any = None,
    dynamic_shapes: Any = None,
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
    cuda_graph: bool | GraphCache = False,
    progress: bool | None = None,
    passes: Iterable[Pass] | None = None,
    precision: str | None = None,
    io_precision: str | None = None,
    keep_fp32: Any = (),
    force_low: Any = (),
    samples: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_method: str | None = None,
    calibration_cache: Any = None,
    keep_float: Any = (),
    tolerance: float | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    configure: Callable[[Any], None] | None = None,
    on_stage: Callable[[str, Any, float], None] = lambda name, result, seconds: None,
    **torch2trt: Any,
) -> TRTModule:
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
      what is not given is the example's shape. `opt_shapes`, which TensorRT tunes for, may be a list of several such
      sets: the engine then has an optimization profile for each, and a call runs in the one whose sizes are the nearest
      by their ratios. `torch2rt.record_shapes` proposes all three. `max_batch_size=n` is short for dimension 0 from 1
      to n everywhere.
      The module is traced at these shapes, also where they leave out the example's.
    - `multiple_of`: what dynamic sizes are multiples of, such as `{"x": (1, 1, 32, 32)}`, in the form of `min_shapes`.
      The module's Python need not be right for other sizes, and calls with them raise `InputError`.
    - `dynamic_shapes`: the same as `torch.export.export` takes it, by the names of forward's parameters or nested like
      the arguments: `{"x": {0: Dim("b", max=8), 2: 32 * Dim("h", min=1, max=16)}}`. Sizes of one `Dim` are equal, or
      derived from each other, at every call. What has no largest size there takes it from `max_shapes`.
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
    - `precision`: `"fp16"` or `"bf16"` computes in that type what is float32 in the module, as `torch.amp` does:
      products and what follows them; exponentials, powers, sums, norms and softmax stay in float32. By default, and
      with `"fp32"`, types are the module's. Parts that are half already stay as they are.
      `"int8"` computes convolutions and linear layers in int8 and the rest as `"fp16"` does; `"int8+bf16"` and
      `"int8+fp32"` say what the rest is in. A layer that cannot be quantised is not, and the report names it.
      `"auto"` is `"fp16"` with as few modules in float32 as it takes for `metric` to be at most `tolerance` (1e-3) on
      the example and `samples`: a function of two lists of outputs, of float16 and of float32, by default the largest
      distance in parts of an output's norm. The report has the modules and the metric for the numbers tried.
    - `calibration`: for int8, batches of inputs such as the engine will be given, each as `inputs`: a list, a generator
      or a `DataLoader`. A batch may be larger than the engine's. They say how large values become; what is larger
      saturates. `calibration_method` says what they are quantised to: `"entropy"` (the default), `"minmax"`,
      `"percentile"` (99.99 %) or `"mse"`.
    - `calibration_cache`: a file that keeps the result, and is read where it exists: JSON if its name ends with
      `.json`, else TensorRT's own format. `keep_float`: what is not quantised, as for `keep_fp32`.
    - `io_precision`: the type of the float32 inputs and outputs of a low precision: `"fp32"`, their own, by default.
    - `keep_fp32`, `force_low`: what stays in float32, and what does not: a list of module paths (`"encoder.3"` includes
      the modules in it), patterns (`"encoder.*.mlp"`), classes of modules, torch functions (`torch.add` includes the
      method), and functions of a `torch.fx.Node` that return whether its call is meant.
    - `samples`: a list of further inputs, each as `inputs` or one tensor. The traced calls run on them and on the
      example once in float32. A call stays in float32 where float16 cannot hold its values there, with a factor of 2
      to spare, and `model_trt.report` names it. `[]` measures nothing.
    - `**torch2trt`: torch2trt's other keywords, such as `fp16_mode=True`; `torch2rt.migration` says what each does.
    - `cuda_graph`: replay calls whose shapes come back as CUDA graphs; `model_trt.cuda_graph` says so later on. A
      `torch2rt.GraphCache` says how many are kept.
    - `max_workspace_size`, `compute_capabilities`, `optimization_level`, `tf32`, `log_level`, `progress`, `configure`:
      as for `torch2rt.build`.
    - `on_stage`: called after each stage with its name, its result and the seconds that it took: `"trace"` with the
      `torch.fx.GraphModule`, `"lower"` with the network, `"build"` with the `torch2rt.Engine`; for each variant.

    Returns a `TRTModule`. Raises `InputError`, `TraceError`, `UnsupportedError`, `BuildError`, or `AccuracyError` where
    it does not compute what the module does; see `torch2rt.errors`.

    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [torch.randn(2, 3)], max_batch_size=8)
    >>> model_trt.reference()(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """
    check_mode(verify)
    asked, iterations = from_torch2trt(
        torch2trt,
        dict(
            precision=precision,
            io_precision=io_precision,
            keep_fp32=keep_fp32,
            force_low=force_low,
            samples=samples,
            calibration=calibration,
            calibration_method=calibration_method,
            calibration_cache=calibration_cache,
            keep_float=keep_float,
            tolerance=tolerance,
            metric=metric,
        ),
    )
    precise = Precision(**asked)
    ordered = chosen(passes, float64)
    if merge not in MERGE:
        raise InputError(f"{merge=} is not one of {', '.join(map(repr, MERGE))}.")
    most = whole_number("max_variants", max_variants, 1) or MAX_VARIANTS
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    ranges: dict[str, Any] = dict(
        min_shapes=min_shapes, opt_shapes=opt_shapes, max_shapes=max_shapes, max_batch_size=max_batch_size
    )

    def lowered(graph: torch.fx.GraphModule) -> Network:
        return lower(run(graph, ordered), nan=nan, passes=[])

    start = time.perf_counter()
    ranges |= dict(shapes=shapes, multiple_of=multiple_of, dynamic_shapes=dynamic_shapes)
    with Traces(module, inputs, kwargs, input_names, output_names, **ranges, progress=progress) as traces:
        by_values = SameValues(traces.module, traces.leaves, lowered)
        variants = trace_variants(traces, most, by_values=by_values if merge == "values" else None)
    seconds = (time.perf_counter() - start) / len(variants)
    options = dict(
        max_workspace_size=max_workspace_size,
        compute_capabilities=compute_capabilities,
        optimization_level=optimization_level,
        tf32=tf32,
        log_level=log_level,
        configure=_timing(configure, iterations),
    )
    precise = precise.for_engines(len(variants))
    check_profiles([graph_meta(variant.graph).interface for variant in variants])
    parts: list[TRTModule] = []
    networks: list[Network] = []
    for variant in variants:
        on_stage("trace", variant.graph, seconds)
        also = [shapes for region, shapes in by_values.compared if any(region is r for r in variant.regions)]
        tensors = graph_meta(variant.graph).interface.tensors(*as_arguments(inputs, kwargs))
        made = prepare(variant.graph, ordered, precise, module, tensors, progress, len(variants) > 1)
        ready = run(made.graph, made.passes)
        network = _stage(on_stage, "lower", lower, ready, nan=nan, passes=[])
        network.assumptions += made.notes
        if keep_network:
            network.traced, network.lowered = without_gpu_memory(variant.graph, ready)
        verifying = Verifying(
            made.module,
            made.graph,
            network,
            made.tensors,
            verify,
            tf32=tf32,
            build=functools.partial(build, **options, progress=False),
            passes=made.passes,
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
        own = networks[0].interface
        specs = [replace(spec, dtype=mine.dtype) for spec, mine in zip(traces.specs, own.inputs, strict=True)]
        whole = replace(own, inputs=specs, constraints=[])
        model_trt = TRTModule(joined([part.built for part in parts if part.built], whole, described), networks)
    elif described[0].notes:
        model_trt.report.variants.append(str(described[0]))
    if not keep_network:
        model_trt.drop_network()
    model_trt.cuda_graph = cuda_graph
    return model_trt


def _timing(configure: Callable[[Any], None] | None, iterations: int | None) -> Callable[[Any], None] | None:
    """`configure`, with how often the builder times a kernel."""
    if iterations is None:
        return configure

    def both(config: Any) -> None:
        config.avg_timing_iterations = iterations
        if configure is not None:
            configure(config)

    return both


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
