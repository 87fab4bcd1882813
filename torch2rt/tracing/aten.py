"""One level down: a torch call without a converter, as the ATen operators that it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch2rt.callables import Target, qualified_name
from torch2rt.errors import TraceError
from torch2rt.tracing.calls.in_place import out_of_place, written_arguments, written_copies
from torch2rt.tracing.calls.real import run_for_real
from torch2rt.tracing.recorder import Recorder
from torch2rt.tracing.values import Values

# Runs the body that torch2rt has of a call, and returns `NotImplemented` where it has none.
Composed = Callable[[Target, tuple[Any, ...], dict[str, Any]], Any]
SHAPES_IN_PLACE = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"})


class AtenRecorder(TorchDispatchMode):
    """Records the ATen operators that one torch call makes, opening those that have no converter themselves."""

    def __init__(self, values: Values, function: Target, composed: Composed) -> None:
        super().__init__()
        self.values, self.recorder = values, values.recorder
        self.function, self.composed = function, composed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        is_random = recorder.fallback and torch.Tag.nondeterministic_seeded in func.tags
        if not self.values.is_traced((args, kwargs)) and not is_random:
            with unset_fake_temporarily():
                return run_for_real(recorder, func, args, kwargs, self.function)
        if func.namespace == "prim" or not (_returns_tensors(func) or func._schema.is_mutable):
            return func(*args, **kwargs)
        with unset_fake_temporarily(), _without_autocast((args, kwargs)):
            if (out := self.composed(func, args, kwargs)) is not NotImplemented:
                return out
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        if recorder.registry.find(func) is None and not is_random:  # others would draw other numbers
            for decomposition in _decompositions(func):
                with self:
                    out = decomposition(*args, **kwargs)
                if out is not NotImplemented and _is_like(out, func, args, kwargs):
                    return out
        before, recorder.open_calls = recorder.open_calls, [self.function]
        try:
            return self.values.record(func, args, kwargs)
        finally:
            recorder.open_calls = before

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        storages, constants = self.values.storages, self.values.written_constants
        if (packet := func.overloadpacket.__name__) in SHAPES_IN_PLACE:
            same = getattr(getattr(torch.ops.aten, packet[:-1]), func._overloadname)
            storages.reshape(args[0], lambda: func(*args, **kwargs), lambda old: (same, (old, *args[1:]), kwargs))
            return args[0]
        written, (target, *given) = out_of_place(func, args, kwargs)
        if written is None and self.recorder.fallback:
            return self._write_copies(func, args, kwargs)
        if not isinstance(written, torch.Tensor) or sum(a.is_write for a in func._schema.arguments) != 1:
            advice = self.recorder.registry.advice(self.function) or "It is not supported"
            raise TraceError(
                f"{self.recorder.location.here()}: {qualified_name(self.function)} writes through {func}. {advice}."
            )
        written_to = constants.writable(written)
        args, kwargs = constants.replaced((args, kwargs))
        given = constants.replaced(given)
        with self:
            value = target(*given[0], **given[1])
        func(*args, **kwargs)
        storages.write(written_to, self.values.argument(value))
        return written

    def _write_copies(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operator that writes and has no other form, with copies of what it writes to."""
        storages, constants = self.values.storages, self.values.written_constants
        written = written_arguments(func, args, kwargs)
        if not all(isinstance(tensor, torch.Tensor) for tensor in written):
            raise TraceError(
                f"{self.recorder.location.here()}: {func} writes to a list of tensors, which is not supported."
            )
        targets = [constants.writable(tensor) for tensor in written]
        args, kwargs = constants.replaced((args, kwargs))
        new = self.values.record(written_copies, (func, *args), kwargs)
        with self.recorder.fake_tensors():  # the write itself, so that torch refuses what eager refuses
            func(*args, **kwargs)
        for target, value in zip(targets, new, strict=False):
            storages.write(target, self.values.argument(value))
        returns = func._schema.returns
        if not returns:
            return None
        if all(r.alias_info is not None for r in returns):
            return written[0] if len(returns) == 1 else tuple(written)
        rest = tuple(new[len(targets) :])
        return rest[0] if len(returns) == 1 else rest


class OperatorRecorder(TorchDispatchMode):
    """Records ATen operators that no torch function was seen to make, such as those inside of `torch.vmap`.

    It gives them to `mode`, the torch function mode that records the module's calls.
    """

    def __init__(self, recorder: Recorder, mode: TorchFunctionMode) -> None:
        super().__init__()
        self.recorder, self.mode = recorder, mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder, mode, kwargs = self.recorder, self.mode, kwargs or {}
        if recorder.fake_mode.enter_stack:
            return func(*args, **kwargs)
        modes = _get_current_function_mode_stack()
        with _pop_mode_temporarily() if modes and modes[-1] is mode else nullcontext(), recorder.decisions.in_torch():
            return mode.__torch_function__(func, types, args, kwargs)


@contextmanager
def _without_autocast(arguments: Any) -> Iterator[None]:
    """Below an operator, autocast has cast the tensors that it casts."""
    with ExitStack() as stack:
        for device in {t.device.type for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@functools.cache
def _core_decompositions() -> Mapping[Any, Callable[..., Any]]:
    return core_aten_decompositions()


def _decompositions(func: Any) -> list[Callable[..., Any]]:
    """Ways to write an ATen operator in terms of others, the one that stays closest to it first."""
    tables: tuple[Mapping[Any, Any], ...] = (_core_decompositions(), decomposition_table)
    found = [table[func] for table in tables if func in table]
    return [*found[:1], func.decompose, *found[1:]] if _core_decompositions().get(func) else [func.decompose, *found]


def _is_like(out: Any, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a decomposition has the results of its operator: torch's for attention returns another second one."""
    if len(func._schema.returns) < 2:
        return True
    kind = lambda x: (x.dim(), x.dtype) if isinstance(x, torch.Tensor) else None  # noqa: E731
    return [*map(kind, out)] == [*map(kind, func(*args, **kwargs))]


def _returns_tensors(func: Any) -> bool:
    return any("Tensor" in str(r.type) for r in func._schema.returns)
