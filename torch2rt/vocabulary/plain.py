"""What converters ask in plain Python: refusals, dimensions, dtypes, sizes and claims about them. No layer is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torch2rt.backend.tensorrt import TORCH_DTYPES, trt
from torch2rt.errors import ConversionError
from torch2rt.size_choices import counterexample
from torch2rt.sizes import expression, is_symbolic
from torch2rt.vocabulary.context import Context

Value = Any  # a TensorRT tensor, a torch tensor, a number or a symbolic size


# Refusing ------------------------------------------------------------------------------------------------------------


def refuse(reason: str) -> NoReturn:
    """Say why this call cannot be converted; the call, its arguments and its place are added by the caller."""
    raise ConversionError(reason)


def check(condition: bool, reason: str) -> None:
    """`refuse` unless the condition holds."""
    if not condition:
        refuse(reason)


# Dimensions ----------------------------------------------------------------------------------------------------------


def wrap_dim(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + max(ndim, 1) if dim < 0 else dim


def axes(dim: int | Sequence[int] | None, ndim: int) -> int:
    """TensorRT's bitmask for one, several or (with `None` or an empty list) all dimensions."""
    if dim is None or dim == [] or dim == ():
        return (1 << ndim) - 1
    return sum({1 << wrap_dim(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)})


def ntuple(value: Any, n: int) -> tuple[Any, ...]:
    """A number, or a sequence of one, repeated to `n`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * n if len(values) == 1 else values


# Dtypes --------------------------------------------------------------------------------------------------------------


def dtype_of(x: Value) -> torch.dtype:
    """The torch dtype of a value."""
    if isinstance(x, trt.ITensor):
        return TORCH_DTYPES[x.dtype]
    if isinstance(x, torch.Tensor):
        return x.dtype
    if isinstance(x, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(x, (int, torch.SymInt)) else torch.get_default_dtype()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What torch sums and composes values of a type in: float32 for half precision, int32 for bytes and bools."""
    return _WIDE.get(dtype, dtype)


_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.bool: torch.int32,
}


def is_integral(dtype: torch.dtype) -> bool:
    """Whether a dtype is of whole numbers, bool among them."""
    return not dtype.is_floating_point and not dtype.is_complex


# Sizes, and claims about them ----------------------------------------------------------------------------------------


def dims(ctx: Context, x: Value) -> tuple[Any, ...]:
    """The sizes of a value: ints, and `SymInt`s where dynamic."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    if not isinstance(x, trt.ITensor):
        return ()
    if id(x) in ctx.sizes:
        return ctx.sizes[id(x)][1]
    shape = tuple(x.shape)
    if -1 in shape:
        refuse(f"torch2rt does not know the dynamic sizes of an intermediate tensor of shape {shape}")
    return shape


def broadcast_sizes(*shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes of a broadcast result; a dynamic size gives way to a static one other than 1."""
    result = []
    for sizes in zip(*shapes, strict=True):
        static = [s for s in sizes if not is_symbolic(s) and s != 1]
        dynamic = [s for s in sizes if is_symbolic(s)]
        result.append((static or dynamic or [1])[0])
    return tuple(result)


def is_traced(value: Any) -> bool:
    """In a composite: whether a value is computed from the module's inputs, or a dynamic size."""
    return isinstance(value, FakeTensor) or is_symbolic(value)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every size of the inputs."""
    return expression(a) == expression(b) if is_symbolic(a) or is_symbolic(b) else a == b


def proven(ctx: Context, claim: Any) -> bool:
    """Whether a claim about sizes, such as `size > 1`, holds for every size that the engine serves."""
    return counterexample(expression(claim), ctx.symbols) is None


def largest(ctx: Context, size: Any) -> int:
    """The largest value of a size over the sizes that the engine serves, or a bound above it."""
    if not is_symbolic(size):
        return int(size)
    upper = bound_sympy(expression(size), {s: ValueRanges(dim.min, dim.max) for s, dim in ctx.symbols.items()}).upper
    check(upper.is_Integer, f"{size} has no bound")
    return int(upper)


def require(ctx: Context, claim: Any, reason: str, at_calls: bool = False) -> None:
    """Refuse if a claim about sizes fails for one that is served.

    What cannot be decided, and how the sizes of several dimensions must relate, is checked at every call; with
    `at_calls` so is what torch raises an error for at some sizes, if it does not at the opt ones.
    """
    expr = expression(claim)
    wrong = counterexample(expr, ctx.symbols)
    interface = ctx.lowered.interface
    is_checked = interface.holds_at_opt if at_calls else interface.is_relation
    if isinstance(wrong, dict) and not is_checked(expr, ctx.symbols):
        refuse(f"{reason}, for {', '.join(f'{dim} = {size}' for dim, size in wrong.items())}")
    check(wrong is None or bool(expr.free_symbols), reason)
    if wrong:
        ctx.constrain(expr)


def tie(ctx: Context, a: Any, b: Any) -> None:
    """Check at every call that two sizes are equal."""
    claim = sympy.Eq(expression(a), expression(b))
    check(bool(claim.free_symbols), f"a size of {a} meets one of {b}")
    if counterexample(claim, ctx.symbols) is None:
        return
    ctx.constrain(claim)
