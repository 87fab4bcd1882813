"""Calls of which torch cannot say, without running them, what they return: they are recorded as they are.

Such are operators without a fake kernel, and functions whose own Python looks at values, as `F.gaussian_nll_loss` does
to refuse negative variances. A run on drawn values shows how many tensors a call returns, their types and their sizes.
Each size counts as one that depends on values. Where all runs agree on it, and no size of an argument is dynamic, it is
claimed to be that number, which every call of the converted module checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.passes.partitioning.effects import draws
from torch2rt.python_calls import PythonCall
from torch2rt.sizes import is_symbolic
from torch2rt.structure import as_bytes
from torch2rt.tracing.calls.data_dependence import reads_values
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.memory.tensors import memory_of
from torch2rt.tracing.values import Values

SIZE = 5  # that a dynamic size is taken for; another one than most numbers in modules
FILLS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t.fill_(1),
    lambda t: t.zero_(),
    lambda t: t.fill_(2),  # such as lengths, none of which may be 0
    lambda t: t.copy_(torch.arange(t.numel()).view(t.shape)),  # some calls take edges of intervals
    lambda t: t.normal_() if t.is_floating_point() or t.is_complex() else t.random_(0, 2),
)


def record_opaque(
    values: Values, func: Target, args: Any, kwargs: Any, error: TraceError, run: Target | None = None
) -> Any:
    """Record a call as it is, with a result as of runs of `run` on drawn values; raises `error` where none succeeds."""
    recorder = values.recorder
    is_unknown = reads_values(func) or isinstance(func, torch._ops.HigherOrderOperator)
    # packed weights, say, which are no tensors and which no code of a graph can name
    is_unknown |= any(isinstance(leaf, torch.ScriptObject) for leaf in tree_leaves((args, kwargs)))
    if is_unknown or not (shown := list(_runs(run or func, args, kwargs))):
        raise error
    spec, kinds = shown[0]
    if any(other != spec or _types(k) != _types(kinds) for other, k in shown[1:]):
        raise TraceError(
            f"{recorder.location.here()}: what {qualified_name(func)} returns depends on values."
        ) from error
    if not recorder.unbacked:
        raise TraceError(f"{error} (sizes may depend on values)") from error  # traced again, see `trace.Traces`
    is_static = not any(is_symbolic(s) for x in tree_leaves((args, kwargs)) for s in getattr(x, "shape", (x,)))
    claims, made = [], []
    with recorder.fake_tensors():
        for several in zip(*([kind for kind in kinds if kind] for _, kinds in shown), strict=True):
            shapes = [shape for shape, _, _ in several]
            _, dtype, device = several[0]
            sizes = [recorder.decisions.shape_env.create_unbacked_symint() for _ in shapes[0]]
            for size, seen in zip(sizes, zip(*shapes, strict=True), strict=True):
                torch._check(size >= 0)
                claims += [(size, seen[0])] * (is_static and len(set(seen)) == 1)
            made.append(torch.empty(sizes, dtype=dtype, device=device))
    out = tree_unflatten(_put(made, kinds), spec)
    given = tuple(made) if isinstance(func, PythonCall) else out
    node = recorder.node(func, values.argument(args), values.argument(kwargs), given)
    if recorder.generators is not None and draws(node):
        recorder.generators.note_draw(node)
    values.bind(given, node, (func, args, kwargs))
    with recorder.fake_tensors():
        for size, number in claims:
            torch._check(size == number)
    return out


def _types(kinds: list[Any]) -> list[Any]:
    return [kind and (len(kind[0]), kind[1]) for kind in kinds]


def _put(tensors: list[torch.Tensor], kinds: list[Any]) -> list[torch.Tensor | None]:
    """The leaves of a result: these tensors in their order, and `None` where the result has it."""
    rest = iter(tensors)
    return [next(rest) if kind else None for kind in kinds]


def _runs(func: Target, args: Any, kwargs: Any) -> Iterator[tuple[Any, list[Any]]]:
    """For each run that succeeds: how its tensors nest, and the shape, dtype and device of each, `None` for a `None`.

    Nothing for calls that write to their arguments, return views of them, or return other things than tensors.
    """
    devices = dict.fromkeys(["cpu", *(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))])
    for device in devices:
        found = []
        for fill in FILLS:
            try:
                with same_states(), torch.no_grad():
                    given = tree_map(lambda value: _given(value, fill, device), (args, kwargs))  # noqa: B023
                    tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
                    before = [as_bytes(t).clone() for t in tensors]  # some calls write without a word
                    out = func(*given[0], **given[1])
            except Exception:  # these values may not be such as the call takes
                continue
            leaves, spec = tree_flatten(out)
            memory, results = {memory_of(t) for t in tensors}, [x for x in leaves if x is not None]
            is_pure = all(torch.equal(as_bytes(t), old) for t, old in zip(tensors, before, strict=True))
            if not is_pure or not all(isinstance(x, torch.Tensor) for x in results):
                return
            if not results or any(x.layout is not torch.strided or memory_of(x) in memory for x in results):
                return
            where = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), "cpu")
            found.append((spec, [None if x is None else (tuple(x.shape), x.dtype, where) for x in leaves]))
        if found:
            yield from found
            return


def _given(value: Any, fill: Callable[[torch.Tensor], torch.Tensor], device: Any) -> Any:
    if is_symbolic(value):
        return SIZE
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor):
        shape = [SIZE if is_symbolic(size) else size for size in value.shape]
        return fill(torch.empty(shape, dtype=value.dtype, device=device))
    return value.detach().to(device).clone()
