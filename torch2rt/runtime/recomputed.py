"""Run: gradients for the inputs of a converted module, by running the module itself again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from torch2rt.errors import InputError
from torch2rt.structure import flatten, unflatten
from torch2rt.tracing.calls.randomness import put_states, states


class Recomputed:
    """The module that a converted one was made from, for the gradients of its inputs; its parameters get none.

    `draws`: whether its calls draw random numbers, which must be the same again.
    """

    def __init__(self, module: torch.nn.Module, draws: bool = False) -> None:
        self.module, self.draws = module, draws

    def __call__(self, converted: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `converted(*args, **kwargs)` with gradients; `NotImplemented` if no input needs any."""
        if not torch.is_grad_enabled():
            return NotImplemented
        leaves, spec = flatten((args, kwargs), torch.is_tensor, "inputs")
        if not any(leaf.requires_grad for leaf in leaves):
            return NotImplemented
        kept: list[Any] = []

        def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            given, named = unflatten(spec, tensors)
            outputs, structure = flatten(converted(*given, **named), torch.is_tensor, "result")
            kept.append(structure)
            return outputs

        outputs = _Recompute.apply(self, run, spec, *leaves)
        return unflatten(kept[0], outputs)

    def __reduce__(self) -> Any:
        return type(None), ()  # a file does not hold the module

    def __deepcopy__(self, memo: dict[int, Any]) -> Recomputed:
        return self  # with the same module, as two engines may be made from one


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recomputed: Recomputed, run: Any, spec: Any, *leaves: torch.Tensor) -> Any:
        ctx.recomputed, ctx.spec = recomputed, spec
        ctx.states = states(()) if recomputed.draws else None
        ctx.save_for_backward(*leaves)
        outputs = run(list(leaves))
        ctx.mark_non_differentiable(*(x for x in outputs if not (x.is_floating_point() or x.is_complex())))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed, strict=True)]
        args, kwargs = unflatten(ctx.spec, leaves)
        now = states(())
        if ctx.states is not None:
            put_states(ctx.states)
        try:
            with torch.enable_grad():
                result = ctx.recomputed.module(*args, **kwargs)
        finally:
            put_states(now)
        outputs = flatten(result, torch.is_tensor, "result")[0]
        pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, grads, strict=True) if x.requires_grad and g is not None]
        inputs = [x for x in leaves if x.requires_grad]
        if not pairs:
            return (None,) * (3 + len(leaves))
        found = iter(torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        return (None, None, None, *(next(found) if x.requires_grad else None for x in leaves))


def check_backward(backward: Any) -> None:
    """Raise `InputError` for what is no way to get gradients."""
    if backward not in (None, "recompute"):
        raise InputError(f"{backward=} is neither None nor 'recompute'.")
