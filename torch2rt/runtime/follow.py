"""Notices at each call of a converted module whether the module that it came from has changed."""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch2rt.recipes.tensors import Attribute


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the tensors of a module were like when they were last looked at.

    Their memory is held, so that no other tensor has the address of one that was given other memory since.
    """

    tensors: list[torch.Tensor]
    memory: list[torch.UntypedStorage]
    is_written: Callable[[], bool]
    addresses: list[int]
    indices: list[int]
    attributes: list[Attribute]
    containers: list[dict[str, Any]]
    contained: list[list[Any]]
    events: int

    @classmethod
    def of(
        cls, tensors: list[torch.Tensor], attributes: list[Attribute], module: torch.nn.Module | None, events: int
    ) -> _Seen:
        addresses = [x.data_ptr() for x in tensors]
        memory = [x.untyped_storage() for x in tensors]
        indices = list(range(len(tensors)))
        # Lists of modules tell nobody what is inserted or deleted; all other modules are assigned.
        changing = [] if module is None else [m._modules for m in module.modules() if hasattr(m, "__delitem__")]
        held = attributes, changing, _values(changing)
        return cls(tensors, memory, _watched(tensors), addresses, indices, *held, events)


class _Saving(torch.autograd.Function):
    """A node that saves tensors for a backward pass that never comes."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return one.clone()


def _watched(tensors: list[torch.Tensor]) -> Callable[[], bool]:
    """Tells whether torch has counted a write to one of some tensors since now.

    Autograd refuses to give out saved tensors that were written to, and compares the counters of all of them in one
    call, in half the time that reading them one by one takes. As it holds the tensors, reading their addresses is twice
    as fast, too. Where a write to a tensor that is tried is not seen in this way (under `saved_tensors_hooks` and
    transforms), the counters are read one by one.
    """
    one_by_one = functools.partial(_differ, tensors, [x._version for x in tensors])
    try:
        with torch.inference_mode(False), torch.enable_grad():
            one, tried = torch.ones((), requires_grad=True), torch.zeros(())
            saved, trial = _Saving.apply(one, *tensors), _Saving.apply(one, tried)
            tried.add_(1)
        if not _is_refused(trial.grad_fn) or _is_refused(saved.grad_fn):
            return one_by_one
    except (RuntimeError, AttributeError):
        return one_by_one
    return functools.partial(_is_refused, saved.grad_fn, saved)


def _is_refused(node: Any, result: Any = None) -> bool:
    """Whether autograd refuses to give out what a node has saved; it is twice as fast while the node's result lives."""
    try:
        node.saved_tensors  # noqa: B018
    except RuntimeError:
        return True
    return False


def _differ(tensors: list[torch.Tensor], versions: list[int]) -> bool:
    return list(map(_version, tensors)) != versions


class Follow:
    """Calls `update` before a call of a converted module, where the module's tensors may have changed since the last.

    - `tensors`: those that it depends on, as they are now, and `attributes` where those are that are no parameters or
      buffers. `update`: gives the engine their values.

    These are looked at: the tensors' version counters and addresses, whether an optimizer of one of them has made a
    step (the fused ones leave the version counters alone), whether a parameter, buffer, module or tensor was replaced,
    and whether a module was put into a container, such as a `Sequential`, or taken out. `model_trt.changed()` also sees
    what is written through `.data`, by other programs, or by `F.batch_norm` to statistics without a count of batches,
    attributes that are no tensors, parameters that were removed (`module.bias = None`), and what was put into
    `module._parameters`, `_buffers` or `_modules`.

    The tensors are held, so that `torch.utils.swap_tensors` refuses them, and their memory until the next call.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        tensors: Callable[[], list[torch.Tensor]],
        attributes: Callable[[], list[Attribute]],
        update: Callable[[], Any],
    ) -> None:
        self._module, self._tensors, self._attributes, self._update = weakref.ref(module), tensors, attributes, update
        self._events = 0
        self._owners: set[int] = set()
        me = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (follow := me()) is not None:
                held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
                follow._events += any(id(tensor) in held for tensor in follow._seen.tensors)

        def registered(owner: torch.nn.Module, *_: Any) -> None:
            if (follow := me()) is not None:
                follow._events += id(owner) in follow._owners

        hooks: list[Any] = [
            register_optimizer_step_post_hook(stepped),
            torch_module.register_module_parameter_registration_hook(registered),
            torch_module.register_module_buffer_registration_hook(registered),
            torch_module.register_module_module_registration_hook(registered),
        ]
        weakref.finalize(self, _remove, hooks)
        self._seen = self._look()

    def _look(self) -> _Seen:
        module = self._module()
        self._owners = set() if module is None else {id(owner) for owner in module.modules()}
        tensors, attributes = ([], []) if module is None else (self._tensors(), self._attributes())
        return _Seen.of(tensors, attributes, module, self._events)

    def __call__(self) -> None:
        """Update the converted module if anything may have changed."""
        seen = self._seen
        if (
            self._events != seen.events
            or seen.is_written()
            or not _are_at(seen.tensors, seen.addresses, seen.indices)  # type: ignore[arg-type]
            or _values(seen.containers) != seen.contained
            or seen.attributes
            and not _are_held(seen.attributes)
        ):
            self._seen = self._updated()

    def _updated(self) -> _Seen:
        """What the tensors were like before an update: what is written meanwhile is for the next call to see.

        Where an update has made other networks, these may depend on other tensors, which are looked at then.
        """
        while True:
            seen = self._look()
            if not (seen.tensors or seen.attributes):
                return seen
            self._update()
            if self._module() is None or list(map(id, self._tensors())) == list(map(id, seen.tensors)):
                return seen


def _values(containers: list[dict[str, Any]]) -> list[list[Any]]:
    return list(map(list, map(dict.values, containers)))


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _are_held(attributes: list[Attribute]) -> bool:
    """Whether tensors are where they were."""
    try:
        return all(holder[key] is value for _, holder, key, value in attributes)
    except LookupError:
        return False


def _are_at_slowly(tensors: list[torch.Tensor], addresses: list[int], indices: list[int]) -> bool:
    return [x.data_ptr() for x in tensors] == addresses


_version = operator.attrgetter("_version")  # twice as fast as a loop in Python
_are_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", _are_at_slowly)
