"""One level down: a torch call without a converter, as the ATen operators that it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch2rt.errors import TraceError
from torch2rt.registry import Target, qualified_name
from torch2rt.tracing.in_place import out_of_place

if TYPE_CHECKING:
    from torch2rt.tracing.tracer import Tracer


SHAPES_IN_PLACE = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"})


class AtenRecorder(TorchDispatchMode):
    """Records the ATen operators that one torch call makes, opening those that have no converter themselves."""

    def __init__(self, tracer: Tracer, function: Target) -> None:
        super().__init__()
        self.tracer = tracer
        self.function = function

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer, kwargs = self.tracer, kwargs or {}
        if not tracer.is_traced((args, kwargs)):
            with unset_fake_temporarily():
                return tracer.constant(func, args, kwargs, self.function)
        if func.namespace == "prim" or not _returns_tensors(func):
            return func(*args, **kwargs)
        with unset_fake_temporarily(), _without_autocast((args, kwargs)):
            if (out := tracer.composed(func, args, kwargs)) is not NotImplemented:
                return out
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        if tracer.registry.find(func) is None:
            for decomposition in _decompositions(func):
                with self:
                    out = decomposition(*args, **kwargs)
                if out is not NotImplemented and _is_like(out, func, args, kwargs):
                    return out
        opening, tracer.opening = tracer.opening, [self.function]
        try:
            return tracer.record(func, args, kwargs)
        finally:
            tracer.opening = opening

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = self.tracer
        if (packet := func.overloadpacket.__name__) in SHAPES_IN_PLACE:
            same = getattr(getattr(torch.ops.aten, packet[:-1]), func._overloadname)
            tracer.storages.reshape(
                args[0], lambda: func(*args, **kwargs), lambda old: (same, (old, *args[1:]), kwargs)
            )
            return args[0]
        written, (target, *given) = out_of_place(func, args, kwargs)
        if not isinstance(written, torch.Tensor) or sum(a.is_write for a in func._schema.arguments) != 1:
            advice = tracer.registry.advice(self.function) or "It is not supported"
            raise TraceError(
                f"{tracer.places.here()}: {qualified_name(self.function)} writes through {func}. {advice}."
            )
        shadow = tracer.storages.shadow(written)
        args, kwargs = tracer.storages.with_shadows((args, kwargs))
        given = tracer.storages.with_shadows(given)
        with self:
            value = target(*given[0], **given[1])
        func(*args, **kwargs)
        tracer.storages.write(shadow, tracer.argument(value))
        return written


class StrayRecorder(TorchDispatchMode):
    """Records ATen operators that no torch function was seen to make, such as those inside of `torch.vmap`."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer, kwargs = self.tracer, kwargs or {}
        if tracer.fake_mode.enter_stack:
            return func(*args, **kwargs)
        modes = _get_current_function_mode_stack()
        with _pop_mode_temporarily() if modes and modes[-1] is tracer else nullcontext(), tracer.decisions.inside():
            return tracer.__torch_function__(func, types, args, kwargs)


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
