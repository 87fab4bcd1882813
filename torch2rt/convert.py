"""The one call that most users need."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.backend import FLAVOUR, VERSION
from torch2rt.building import build, target
from torch2rt.lowering import lower
from torch2rt.module import TRTModule
from torch2rt.tracing import trace


def torch2rt(
    module: torch.nn.Module,
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
    compute_capabilities: Sequence[str] | None = None,
    optimization_level: int | None = None,
    tf32: bool | None = None,
    log_level: Any = None,
    keep_network: bool = True,
    cuda_graph: bool = False,
    progress: bool | None = None,
    configure: Callable[[Any], None] | None = None,
) -> TRTModule:
    """Convert a module to a TensorRT engine that is called like the module.

    - `inputs`: the positional arguments of an example call, a list or tuple (or one tensor). They may nest tensors in
      lists, tuples, dicts and dataclasses; numbers, strings, bools and `None` among them are constants of the engine.
      Tensor values do not matter, their dtypes, ranks and static sizes do. `kwargs`: the keyword arguments, likewise.
      What lies in memory as `torch.channels_last` or `torch.channels_last_3d` says, the engine will read so, without a
      copy; every input may have any strides, and is copied where they are not the engine's.
    - `min_shapes`, `opt_shapes`, `max_shapes`: the shapes to serve, one per input tensor: a list (flat, or nested like
      `inputs`; tensors of `kwargs` come last) or a dict by input name. Where min and max differ a dimension is dynamic;
      what is not given is the example's shape. `max_batch_size=n` is short for dimension 0 from 1 to n everywhere.
    - `input_names`, `output_names`: the engine's names, in the order of the tensors; one name may stand alone. By
      default, inputs are called as the parameters of `module.forward` are: `x`, `args_0` for the first of `*args`,
      `boxes_0` and `state_h` for the tensors in `boxes=[a]` and `state={"h": b}`. Outputs are `output_0` and so on.
    - `keep_network`: keep the TensorRT network, for `model_trt.network` and `model_trt.reference()`.
    - `cuda_graph`: replay each call as a CUDA graph; `model_trt.cuda_graph` says so later on.
    - `max_workspace_size`, `compute_capabilities`, `optimization_level`, `tf32`, `log_level`, `progress`, `configure`:
      as for `torch2rt.build`.

    Returns a `TRTModule`. Raises `InputError`, `TraceError`, `UnsupportedError` or `BuildError`; see `torch2rt.errors`.

    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [torch.randn(2, 3)], max_batch_size=8)
    >>> model_trt.reference()(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """
    graph = trace(
        module, inputs, kwargs=kwargs, input_names=input_names, output_names=output_names, min_shapes=min_shapes,
        opt_shapes=opt_shapes, max_shapes=max_shapes, max_batch_size=max_batch_size, progress=progress,
    )  # fmt: skip
    network = lower(graph)
    engine = build(
        network, max_workspace_size=max_workspace_size, compute_capabilities=compute_capabilities,
        optimization_level=optimization_level, tf32=tf32, progress=progress, log_level=log_level, configure=configure,
    )  # fmt: skip
    made_by = {"flavour": FLAVOUR, "version": VERSION, "target": target(compute_capabilities)}
    model_trt = TRTModule(engine, network.interface, network if keep_network else None, made_by)
    model_trt.cuda_graph = cuda_graph
    return model_trt
