"""A conversion in a helper process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.background.job import Job
from torch2rt.background.module import BackgroundModule, check_on_ready, gpu_of
from torch2rt.errors import InputError
from torch2rt.runtime.saved import read_module, write_module

Function = TypeVar("Function", bound=Callable[..., Any])
RESULT = "module.t2rt"


def with_background(function: Function) -> Function:
    """`torch2rt()` with `background=True`: it is called in a helper process then, with the other arguments."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def convert(module: Any, inputs: Any, **options: Any) -> Any:
        background, on_ready = options.pop("background", False), options.pop("on_ready", None)
        check_on_ready(on_ready, background)
        if not background:
            return function(module, inputs, **options)
        signature.bind(module, inputs, **options)
        if options.get("on_stage") is not None:
            raise InputError(
                "on_stage= is given graphs and networks, which are in a helper process with background=True."
            )
        if options.get("state", "refuse") != "refuse":
            raise InputError("state= is not for background=True: the module and the engine would each keep their own.")
        if options.get("backward") is not None:
            raise InputError("backward= needs the module where the engine is, and background=True gives it to another.")
        if options.get("refittable") or options.get("follow"):
            raise InputError("refittable= and follow= are not for background=True: a helper has the engine's network.")
        if not callable(module) or not isinstance(module, torch.nn.Module):
            raise InputError(f"background=True runs the module meanwhile, which a {type(module).__name__} is not.")
        cuda_graph = options.pop("cuda_graph", False)
        options.setdefault("progress", False)
        job = Job(convert_to, convert, getattr(module, "_orig_mod", module), inputs, options)
        try:
            function(module, inputs, **options, background=True)  # which looks at the arguments
        except BaseException:
            job.close()
            raise
        make = functools.partial(_made, job, cuda_graph)
        gpu = gpu_of(module, tree_leaves((inputs, options.get("kwargs"))))
        return BackgroundModule(module, make, job.stop, on_ready, gpu)

    return convert  # type: ignore[return-value]


def convert_to(folder: Path, function: Callable[..., Any], module: Any, inputs: Any, options: dict[str, Any]) -> None:
    """What the helper does: convert, and write the result to a file."""
    write_module(function(module, inputs, **options), folder / RESULT)


def _made(job: Job, cuda_graph: Any = False) -> Any:
    """The module that a helper has converted."""
    converted = result_of(job)
    converted.cuda_graph = cuda_graph
    return converted


def result_of(job: Job) -> Any:
    """The module that a helper has made and written to `RESULT`."""
    try:
        job.run()
        return read_module(job.folder / RESULT)
    finally:
        job.close()
