"""Torch's callables: what a user calls them, and which of them are one function."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

Target = Callable[..., Any]


NOT_WRITES = frozenset(
    """
        requires_grad_ detach_ share_memory_ t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_
        resize_as_ set_ as_strided_ rename_
    """.split()
)
OWNERS = (torch.Tensor, torch, torch._C._nn, torch.special, torch.nn.functional)
_BEHIND = torch._C._VariableFunctions  # also as torch._VF
OTHERWISE = {  # names that `torch.ops.prims` has for functions of torch
    "erf_inv": "erfinv",
    "bessel_i0": "i0",
    "bessel_i0e": "special_i0e",
    "bessel_i1": "special_i1",
    "bessel_i1e": "special_i1e",
    "erfcx": "special_erfcx",
    "ndtri": "special_ndtri",
}


def operator_of(target: Target) -> Target:
    """What a call of a target is recorded as: for an operator made by `torch.library.custom_op`, torch's own object."""
    return target._opoverload.overloadpacket if isinstance(target, torch.library.CustomOpDef) else target


def writable(target: Target) -> Target:
    """What a graph's code can call: for a function behind a Python function of the same name, its operator.

    Such is the one behind `torch.tensordot`, which code can only call `torch.tensordot`, too. Operators give lists
    where functions give tuples, so those of several tensors stay functions.
    """
    if not isinstance(target, types.BuiltinFunctionType) or getattr(_BEHIND, target.__name__, None) is not target:
        return target
    if getattr(torch, target.__name__, target) is target:
        return target
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{target.__name__}")
    gives_lists = any("[]" in str(result.type) or "List" in str(result.type) for s in schemas for result in s.returns)
    return target if gives_lists else getattr(torch.ops.aten, target.__name__)


def candidates(target: Target) -> Iterable[Target]:
    yield target
    if isinstance(target, torch._ops.OpOverload):
        yield target.overloadpacket
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return
    namespace, _, name = target._qualified_op_name.partition("::")
    if namespace == "prims":
        name = OTHERWISE.get(name, name)
    if namespace in ("aten", "prims"):
        module, _, rest = name.partition("_")
        for owner in (torch, torch.Tensor, torch._C._nn, _BEHIND):
            if (same := getattr(owner, name, None)) is not None:
                yield same
        if rest and module in ("linalg", "special", "fft"):
            if (same := getattr(getattr(torch, module), rest, None)) is not None:
                yield same


_PUBLIC = {
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch": torch,
    "torch.fft": torch.fft,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
}


def named(*names: str) -> list[Target]:
    """All callables of these names: torch's function, the method, the special function and the primitive."""
    owners = (torch, torch.Tensor, torch.special, torch.ops.prims)
    return list(dict.fromkeys(getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)))


def qualified_name(target: Target) -> str:
    """How a user would write a callable, such as `torch.Tensor.add` or `torch.nn.functional.relu`."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    name = getattr(target, "__name__", repr(target))
    if isinstance(target, types.MethodWrapperType):  # the getter of a property such as Tensor.T
        return f"torch.Tensor.{target.__self__.__name__}"  # type: ignore[attr-defined]
    for prefix, owner in _PUBLIC.items():
        for spelling in (name, name.partition("_")[2]):  # torch.fft.fft calls itself fft_fft
            if spelling and getattr(owner, spelling, None) is target:
                return f"{prefix}.{spelling}"
    if (public := _by_other_names().get(id(target))) is not None:
        return public
    module = getattr(target, "__module__", None)
    return f"{module}.{name}" if module else name


@functools.cache
def _by_other_names() -> dict[int, str]:
    """Public names of callables that call themselves something else, as `F.logsigmoid` does log_sigmoid."""
    return {
        id(value): f"{prefix}.{name}"
        for prefix, owner in reversed(_PUBLIC.items())
        for name, value in vars(owner).items()
        if callable(value) and not name.startswith("_")
    }


def functional(target: Target) -> Target | None:
    """The out-of-place counterpart of an in-place callable, or `None` where there is none."""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten":  # of another library, we know no more than the name
            return None
        packet = target.overloadpacket.__name__
        same = getattr(torch.ops.aten, packet[:-1], None) if packet.endswith("_") else None
        return getattr(same, target._overloadname, None) if same is not None else None
    name = getattr(target, "__name__", "")
    if name in NOT_WRITES:
        return None
    if name.startswith("__i") and name.endswith("__") and name != "__invert__":
        name = "__" + name[3:]
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    else:
        return None
    owner = next((o for o in OWNERS if getattr(o, target.__name__, None) is target), None)
    same = getattr(owner, name, None)
    return same if callable(same) else None
