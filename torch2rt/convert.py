"""The one call that most users need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.arguments import whole_number
from torch2rt.background.conversion import with_background
from torch2rt.conversion.conversion import Conversion
from torch2rt.conversion.fallback import Choice
from torch2rt.conversion.segmenting import Segmenting
from torch2rt.debug.verify import check_mode
from torch2rt.errors import BuildError, InputError, TraceError, UnsupportedError
from torch2rt.migration import from_torch2trt
from torch2rt.passes.options import Precision
from torch2rt.passes.order import Pass, chosen
from torch2rt.runtime.graph_cache import GraphCache
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.recomputed import Recomputed, check_backward
from torch2rt.runtime.stateful import Found, StatefulModule, find_state
from torch2rt.tracing.sizes.coverage import MAX_VARIANTS
from torch2rt.tracing.trace import as_arguments

MERGE = ("values", "proof")
STATES = ("refuse", "write", "explicit")


@with_background
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
    weight_budget: int | None = None,
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
    smooth_quant: float | None = None,
    bias_correction: bool = False,
    quantize_attention: bool = False,
    quantize_all: bool = False,
    configure: Callable[[Any], None] | None = None,
    fallback: bool | str = False,
    torch_executed: Iterable[Any] = (),
    min_segment_calls: int | None = None,
    max_sizes: int | tuple[int, int] | None = None,
    torch_segments: str | None = None,
    state: str = "refuse",
    backward: str | None = None,
    refittable: bool = False,
    follow: bool = False,
    background: bool = False,
    on_ready: Callable[[Any], None] | None = None,
    on_stage: Callable[[str, Any, float], None] = lambda name, result, seconds: None,
    **torch2trt: Any,
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
      `"int8"` computes convolutions and products with constant matrices in int8 and the rest as `"fp16"` does;
      `"int8+bf16"` and `"int8+fp32"` say what the rest is in. `"fp8"` (E4M3) does so with products only, and needs a
      GPU that has it. `"int8_weights"` and `"int4_weights"` keep the weights of products in int8, or in int4 with a
      scale for each 128 (or 64) numbers, and compute with them in the type of the rest. What cannot be quantised is
      not, and the report names it.
      `"auto"` is `"fp16"` with as few modules in float32 as it takes for `metric` to be at most `tolerance` (1e-3) on
      the example and `samples`: a function of two lists of outputs, of float16 and of float32, by default the largest
      distance in parts of an output's norm. With `calibration` it starts from `"int8"`, and keeps as few modules in
      float16 as it takes. The report has the modules and the metric for the numbers tried; the plan that
      `torch2rt.plan` returns has them as a table and a picture (`plan.precision.searches`).
    - `calibration`: for int8 and fp8, batches of inputs such as the engine will be given: a list, a generator or a
      `DataLoader`. Each is as `inputs`, or a dict of all arguments by the names of forward's parameters, and may be
      larger than the engine's. They say how large values become; what is larger saturates. `calibration_method` says
      what they are quantised to: `"entropy"` (the default of int8), `"minmax"` (that of fp8), `"percentile"` (99.99 %)
      or `"mse"`.
    - `smooth_quant`: for int8 and fp8, move scales of channels from the inputs of products into their weights
      (SmoothQuant), as much as a number from 0 to 1 says, such as 0.75: better for transformers. `bias_correction`:
      correct biases by what the rounding of weights adds in the mean, for convolutions. Both look at the batches.
    - `quantize_attention`: for int8 and fp8, quantise the two products of an attention, too, where TensorRT has a
      kernel for it. In int8, its probabilities are multiples of 1/127, which is little for attention to many tokens.
    - `quantize_all`: for int8 and fp8, quantise also what is no faster then: products and convolutions of fewer than 16
      inputs or outputs, of a single row, and products of weights of fewer than 2**18 numbers. By default these stay in
      the type of the rest, but for what `force_low` names, and the report and the plan name them.
    - `calibration_cache`: a file that keeps the result, and is read where it exists: JSON if its name ends with
      `.json`, else TensorRT's own format. `keep_float`: what is not quantised, as for `keep_fp32`.
    - `io_precision`: the type of the float32 inputs and outputs of a low precision: `"fp32"`, their own, by default.
    - `keep_fp32`, `force_low`: what stays in float32, and what does not: a list of module paths (`"encoder.3"` includes
      the modules in it), patterns (`"encoder.*.mlp"`), modules, classes of modules, torch functions (`torch.add`
      includes the method), and functions of a `torch.fx.Node` that return whether its call is meant. One that means no
      call raises `InputError`, which proposes near names.
    - `samples`: a list of further inputs, each as `inputs` or one tensor. The traced calls run on them and on the
      example once in float32. A call stays in float32 where float16 cannot hold its values there, with a factor of 2
      to spare, and `model_trt.report` names it. `[]` measures nothing.
    - `**torch2trt`: torch2trt's other keywords, such as `fp16_mode=True`; `torch2rt.migration` says what each does.
    - `cuda_graph`: replay calls whose shapes come back as CUDA graphs; `model_trt.cuda_graph` says so later on. A
      `torch2rt.GraphCache` says how many are kept.
    - `max_workspace_size`, `compute_capabilities`, `optimization_level`, `tf32`, `log_level`, `progress`,
      `weight_budget`, `configure`: as for `torch2rt.build`.
    - `fallback`: where TensorRT cannot take some calls, `True` leaves them to torch and makes engines of the others. It
      then returns a `PartitionedModule`, whose `report` has a line for each segment. By default such a module is
      refused, and the error says what `fallback=True` would do. `"measure"` also runs each engine on the GPU beside the
      torch calls that it is for, in eager and by `torch.compile`, at the opt shapes, and leaves to torch what is faster
      there; with `cuda_graph`, as CUDA graphs.
    - `torch_executed`: with `fallback`, what is to stay torch's in any case: functions as the graph calls them
      (`torch.nn.functional.relu`), paths of submodules (`"backbone.conv1"`) and classes of submodules.
    - `min_segment_calls`: with `fallback`, an engine of fewer calls is not worth its launch, so that they stay torch
      calls: 3 by default.
    - `max_sizes`: with `fallback`, the largest size that engines are built for where it depends on values, as does the
      number of elements that `torch.nonzero` finds; larger ones are an `InputError`. `(512, 8192)`: an engine of 512 is
      built again, once for twice as much, where a size is larger, up to 8192; a log line says so. By default engines
      are built for 1024, or what torch knows to be the most, and again for whatever comes. Torch makes the calls of
      such an engine where there is nothing, a size of 0, and where `keep_network=False` or a file has left no network.
    - `torch_segments`: with `fallback`, how torch makes its calls: `"eager"` (the default) or `"compile"`, through
      `torch.compile`, but for calls that draw random numbers or whose sizes depend on values. With
      `fallback="measure"` it says which of them is measured, by default both.
    - `state`: what becomes of a module that writes to its buffers, to tensors in its attributes, or to its inputs, or
      changes objects among these, such as transformers' caches. `"refuse"` raises `TraceError`. `"write"` returns a
      `StatefulModule`, which keeps the tensors in the same way, and writes to inputs. `"explicit"` makes them an
      argument, a dict `state` by name, and returns the result, the new ones in a dict, and in a list what inputs have
      become, tensors before objects. What is written to is seen in a run of the module on the example; it must keep its
      shapes, but in objects. `max_batch_size` has no meaning then: give `max_shapes`.
    - `backward`: what a call under autograd gives. `None`: results without gradients. `"recompute"`: inputs that need a
      gradient get it, by a run of the module itself in the backward pass, which stays in memory beside the engine.
      Parameters get none: they are the engine's. A loaded engine has no module, and so no gradients.
    - `refittable`: `model_trt.refit()` gives the engine the values that the module's parameters have by then. It needs
      `keep_network`, holds a copy of the weights, and merges paths by proof alone.
    - `follow`: `refittable`, and each call does so first if the module has changed: after a step of an optimizer,
      `load_state_dict`, or any write to a parameter but through `.data` or numpy. It does not notice removed
      parameters, hooks, and attributes that are no tensors, such as those of a merged adapter: call
      `refit(strict=False)` after these. `model_trt.changed()` names all of them.
    - `background`: `True` returns a `BackgroundModule` at once. Its calls run the module (as `torch.compile` has made
      it, if it has) until a helper process has built and verified the engine, and this one has made it ready. The
      module and the arguments are sent to the helper, the weights through shared memory; classes and functions of
      `__main__`, as in a notebook, are sent as code. What goes wrong there is in `model_trt.error`, and
      raised by `model_trt.wait()`. `on_ready`: called with the module when it is ready.
    - `on_stage`: called after each stage with its name, its result and the seconds that it took: `"trace"` with the
      `torch.fx.GraphModule`, `"lower"` with the network, `"build"` with the `torch2rt.Engine`; for each variant.

    Returns a `TRTModule`, a `PartitionedModule`, a `StatefulModule` or a `BackgroundModule`. Raises `InputError`,
    `TraceError`, `UnsupportedError`, `BuildError`, or `AccuracyError` where it does not compute what the module does;
    see `torch2rt.errors`.

    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [torch.randn(2, 3)], max_batch_size=8)
    >>> model_trt.reference()(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """
    check_mode(verify)
    check_backward(backward)
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
            smooth_quant=smooth_quant,
            bias_correction=bias_correction,
            quantize_attention=quantize_attention,
            quantize_all=quantize_all,
        ),
    )
    precise = Precision(**asked)
    ordered = chosen(passes, float64)
    choice = Choice.of(fallback, torch_executed, min_segment_calls, max_sizes, torch_segments, bool(cuda_graph))
    if merge not in MERGE:
        raise InputError(f"{merge=} is not one of {', '.join(map(repr, MERGE))}.")
    most = whole_number("max_variants", max_variants, 1) or MAX_VARIANTS
    if background:  # these arguments are in order, which is all that `with_background` asks of this process
        return None  # type: ignore[return-value]
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    stateful = _state(module, inputs, kwargs, state, max_batch_size, shapes)
    if stateful is not None:
        module, kwargs = stateful.module, {**(kwargs or {}), "state": stateful.values}
        precise = precise.with_keywords({"state": stateful.values})
        kept = [tuple(value.shape) for value in stateful.values.values()]
        min_shapes, opt_shapes, max_shapes = (
            [*given, *kept] if isinstance(given, (list, tuple)) else given
            for given in (min_shapes, opt_shapes, max_shapes)
        )
    if refittable or follow:
        _check_refittable(stateful, choice, keep_network, precision)
    conversion = Conversion(
        module,
        inputs,
        kwargs,
        names=dict(input_names=input_names, output_names=output_names),
        ranges=dict(
            min_shapes=min_shapes,
            opt_shapes=opt_shapes,
            max_shapes=max_shapes,
            max_batch_size=max_batch_size,
            multiple_of=multiple_of,
            dynamic_shapes=dynamic_shapes,
        ),
        shapes=shapes,
        passes=ordered,
        precise=precise,
        nan=nan,
        verify=verify,
        keep_network=keep_network,
        options=dict(
            max_workspace_size=max_workspace_size,
            compute_capabilities=compute_capabilities,
            optimization_level=optimization_level,
            tf32=tf32,
            log_level=log_level,
            weight_budget=weight_budget,
            configure=_timing(configure, iterations),
        ),
        progress=progress,
        on_stage=on_stage,
        in_segments=choice,
        refittable=refittable or follow,
    )
    converted: TRTModule | PartitionedModule | None = None
    refused: Exception | None = None
    if choice is None:
        converted = conversion.engines(most, merge)
    elif not choice.torch_executed and conversion.may_be_whole:
        try:
            converted = conversion.engines(most, merge)
        except (TraceError, UnsupportedError, BuildError) as error:
            refused = error
        if choice.measures and converted is not None:
            converted = Segmenting(conversion, choice).or_torch(converted)
    if converted is None:
        assert choice is not None
        converted = Segmenting(conversion, choice, refused).converted()
    if follow:
        converted.follow()
    if backward is not None:
        if stateful is not None:
            raise InputError(f"{backward=} is for modules without state, which a second run would change again.")
        converted.recomputed = Recomputed(module, draws=isinstance(converted, PartitionedModule))
    return _finished(converted, stateful, state, keep_network, cuda_graph)


def _check_refittable(stateful: Found | None, choice: Choice | None, keep_network: bool, precision: str | None) -> None:
    """Raise `InputError` for what cannot be refitted."""
    for name, is_given, why in (
        ("fallback=True", choice is not None, "the parts that stay torch's have the module's own parameters"),
        (f"{keep_network=}", not keep_network, "new weights are made for the network"),
        (f"{precision=}", precision == "auto", "which modules are in float32 was found with the weights"),
        ("state=", stateful is not None, "state is no weight"),
    ):
        if is_given:
            raise InputError(f"refittable and follow do not go with {name}: {why}.")


def _finished(model_trt: Any, stateful: Found | None, state: str, keep_network: bool, cuda_graph: Any) -> Any:
    """A converted module as it was asked for."""
    if not keep_network:
        model_trt.drop_network()
    model_trt.cuda_graph = cuda_graph
    if stateful is None or state == "explicit":
        return model_trt
    return StatefulModule(model_trt, stateful.values, stateful.module._written, stateful.objects)


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


def _timing(configure: Callable[[Any], None] | None, iterations: int | None) -> Callable[[Any], None] | None:
    """`configure`, with how often the builder times a kernel."""
    if iterations is None:
        return configure

    def both(config: Any) -> None:
        config.avg_timing_iterations = iterations
        if configure is not None:
            configure(config)

    return both
