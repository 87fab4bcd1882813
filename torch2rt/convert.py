"""The one call that most users need."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.debug.verify import Verifying, check_mode
from torch2rt.engine.build import build
from torch2rt.lowering import lower
from torch2rt.passes.order import Pass, chosen, run
from torch2rt.runtime.graph_cache import GraphCache
from torch2rt.runtime.module import TRTModule
from torch2rt.tracing.trace import as_arguments, trace


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
    configure: Callable[[Any], None] | None = None,
    on_stage: Callable[[str, Any, float], None] = lambda name, result, seconds: None,
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
    - `cuda_graph`: replay calls whose shapes come back as CUDA graphs; `model_trt.cuda_graph` says so later on. A
      `torch2rt.GraphCache` says how many are kept.
    - `max_workspace_size`, `compute_capabilities`, `optimization_level`, `tf32`, `log_level`, `progress`, `configure`:
      as for `torch2rt.build`.
    - `on_stage`: called after each stage with its name, its result and the seconds that it took: `"trace"` with the
      `torch.fx.GraphModule`, `"lower"` with the network, `"build"` with the `torch2rt.Engine`.

    Returns a `TRTModule`. Raises `InputError`, `TraceError`, `UnsupportedError`, `BuildError`, or `AccuracyError` where
    it does not compute what the module does; see `torch2rt.errors`.

    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [torch.randn(2, 3)], max_batch_size=8)
    >>> model_trt.reference()(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """
    check_mode(verify)
    ordered = chosen(passes, float64)
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    stage = functools.partial(_stage, on_stage)
    graph = stage(
        "trace",
        trace,
        module,
        inputs,
        kwargs=kwargs,
        input_names=input_names,
        output_names=output_names,
        min_shapes=min_shapes,
        opt_shapes=opt_shapes,
        max_shapes=max_shapes,
        max_batch_size=max_batch_size,
        progress=progress,
    )
    network = stage("lower", lambda: lower(run(graph, ordered), nan=nan, passes=[]))
    options = dict(
        max_workspace_size=max_workspace_size,
        compute_capabilities=compute_capabilities,
        optimization_level=optimization_level,
        tf32=tf32,
        log_level=log_level,
        configure=configure,
    )
    tensors = network.interface.tensors(*as_arguments(inputs, kwargs))
    verifying = Verifying(
        module,
        graph,
        network,
        tensors,
        verify,
        tf32=tf32,
        build=functools.partial(build, **options, progress=False),
        passes=ordered,
    )
    engine = stage("build", build, network, **options, progress=progress, meanwhile=verifying.while_building)
    model_trt = TRTModule(engine, network)
    verifying.finish(model_trt)
    if not keep_network:
        model_trt.drop_network()
    model_trt.cuda_graph = cuda_graph
    return model_trt


def _stage(
    report: Callable[[str, Any, float], None], name: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The result of one stage, which is reported with its name and its seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    report(name, result, time.perf_counter() - start)
    return result
