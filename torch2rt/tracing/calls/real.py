"""Calls that depend on no input: they run for real while the module is traced, and their results are constants."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.tracing.calls.randomness import put_back, states
from torch2rt.tracing.memory.tensors import is_wrapped
from torch2rt.tracing.recorder import Recorder

NUMBERS = (bool, int, float, complex)


def run_for_real(recorder: Recorder, func: Target, args: Any, kwargs: Any, name: Target) -> Any:
    """The result of a call of real tensors, which `name` has made; a random one must not reach the graph.

    Symbolic sizes, which wrapped tensors may have inside, need torch's Python dispatcher. It runs decompositions
    instead of kernels, of which not all are right: that of a bilinear resize to a size that does not follow from
    the scale factor is not.
    """
    random, before = recorder.constants.why_forbidden((args, kwargs)), states((args, kwargs))
    is_real = not any(map(is_wrapped, tree_leaves((args, kwargs))))
    with torch._C._DisablePythonDispatcher() if is_real else contextlib.nullcontext():
        out = func(*args, **kwargs)
    if not all(map(torch.equal, before, states((args, kwargs)))):
        if recorder.fallback and not random:
            return out  # whoever asked will record it
        put_back(before, (args, kwargs))
        random = recorder.draws_numbers(qualified_name(name), name)
        recorder.has_left_out = True
    if random and not isinstance(out, torch.Tensor) and any(isinstance(x, NUMBERS) for x in tree_leaves(out)):
        raise TraceError(random)
    if random:
        recorder.constants.forbid(out, random)
    return out
