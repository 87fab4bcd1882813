"""Modules of TorchScript, made safe to trace."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch


def reloaded(module: torch.nn.Module) -> torch.nn.Module:
    """A frozen module as it would be after saving and loading it; any other module as it is.

    The calls in a frozen module's graph remember functions of the module that it was frozen from. When an operator
    raises an error, torch looks up their names, and the process crashes if that module is gone (torch 2.14, in
    `InterpreterStateImpl::callstack`). A loaded module does not remember them.
    """
    if not isinstance(module, torch.jit.ScriptModule) or hasattr(module, "training"):  # which freezing takes away
        return module
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@contextlib.contextmanager
def unfused(module: torch.nn.Module) -> Iterator[None]:
    """Let TorchScript run its modules call by call, for this thread.

    After some runs its executor fuses calls to kernels of its own, which on a GPU read the memory of what they are
    given. Fake tensors have none. What was fused before is forgotten, and fused again by later runs elsewhere.
    """
    for scripted in module.modules():
        if isinstance(scripted, torch.jit.ScriptModule):
            for name in scripted._c._method_names():
                scripted._c._get_method(name)._debug_flush_compilation_cache()
    with torch.jit.optimized_execution(False):
        yield
