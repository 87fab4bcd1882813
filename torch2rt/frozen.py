"""Modules of `torch.jit.freeze`, made safe to trace."""

from __future__ import annotations

import io

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
