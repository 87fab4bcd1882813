"""A conversion in a helper process."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.backend.cuda import beside_captures
from torch2rt.background.example import Example
from torch2rt.background.job import Job
from torch2rt.background.module import BackgroundModule, check_on_ready, gpu_of
from torch2rt.background.sent import Sent
from torch2rt.errors import InputError
from torch2rt.runtime.saved import read_module, write_module
from torch2rt.structure import flatten, unflatten
from torch2rt.tracing.trace import as_arguments

Function = TypeVar("Function", bound=Callable[..., Any])
RESULT, EXAMPLE = "module.t2rt", "example"


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
        plain = getattr(module, "_orig_mod", module)
        inputs, options["kwargs"] = _copied(inputs, options.get("kwargs"))
        job = Job(convert_to, convert, plain, inputs, options)
        sent = Sent(plain, job.numbers)
        job.received = sent.received
        try:
            function(module, inputs, **options, background=True)  # which looks at the arguments
        except BaseException:
            job.close()
            raise
        example = Example(plain, inputs, options["kwargs"])
        make = functools.partial(_made, job, cuda_graph, example, sent, bool(options.get("verify", True)))
        gpu = gpu_of(module, tree_leaves((inputs, options["kwargs"])))
        return BackgroundModule(module, make, job.stop, on_ready, gpu, sent)

    return convert  # type: ignore[return-value]


def convert_to(folder: Path, function: Callable[..., Any], module: Any, inputs: Any, options: dict[str, Any]) -> None:
    """What the helper does: convert, and write the result to a file."""
    write_module(function(module, inputs, **options), folder / RESULT)
    Example(module, inputs, options["kwargs"]).write(folder / EXAMPLE)


def _made(job: Job, cuda_graph: Any, example: Example, sent: Sent, verifies: bool) -> Any:
    """The module that a helper has converted; one that has changed since is for others to refuse."""

    def check() -> None:
        with beside_captures() if torch.cuda.is_initialized() else contextlib.nullcontext():
            if (file := job.folder / EXAMPLE).exists():
                found = torch.load(file, weights_only=True)
                sent.written_by_calls = frozenset(found["written"])
                if verifies and not sent.changed(example.module):
                    example.check(found)

    converted = result_of(job, check)
    converted.cuda_graph = cuda_graph
    return converted


def result_of(job: Job, check: Callable[[], None] = lambda: None) -> Any:
    """The module that a helper has made and written to `RESULT`."""
    try:
        job.run()
        check()
        return read_module(job.folder / RESULT)
    finally:
        job.close()


def _copied(inputs: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments with copies of their tensors: the caller may write to their own before the helper has read them."""
    args, named = as_arguments(inputs, kwargs)
    leaves, form = flatten((args, named), torch.is_tensor, "inputs")
    copies = {id(x): x.detach().clone() for x in leaves}
    args, named = unflatten(form, [copies[id(x)] for x in leaves])
    return args, named
