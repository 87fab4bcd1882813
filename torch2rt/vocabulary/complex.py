"""Arithmetic on complex values as pairs of parts: TensorRT has no complex numbers.

Each verb takes and gives real values, those of the vocabulary; `None` is a part that is zero for sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.backend.tensorrt import trt
from torch2rt.vocabulary.context import Complex, Context
from torch2rt.vocabulary.movement import expand
from torch2rt.vocabulary.plain import dims
from torch2rt.vocabulary.pointwise import elementwise, unary
from torch2rt.vocabulary.tensors import cast, materialize

Pair = Sequence[Any]
EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation


def is_complex(x: Any) -> bool:
    return isinstance(x, (Complex, complex)) or (isinstance(x, torch.Tensor) and x.is_complex())


def parts(ctx: Context, x: Any) -> Pair:
    """The real and the imaginary part of any value."""
    if isinstance(x, Complex):
        return x.real, x.imag
    if isinstance(x, torch.Tensor) and x.is_complex():
        if ("parts", id(x)) not in ctx.memo:
            pair = torch.view_as_real(x.detach().resolve_conj().to(torch.complex64)).unbind(-1)
            ctx.memo["parts", id(x)] = (*pair, x)  # the tensor stays alive, so its id stays its own
        return ctx.memo["parts", id(x)][:2]
    if isinstance(x, complex):
        return x.real or None, x.imag or None
    return (cast(ctx, x, torch.float32) if isinstance(x, (torch.Tensor, trt.ITensor)) else x), None


def part(ctx: Context, x: Any, index: int) -> Any:
    """One part of an argument, in full: zeros for the imaginary part of a real tensor."""
    if x is None:
        return None
    if isinstance(x, (tuple, list)):
        return [part(ctx, item, index) for item in x]
    value = parts(ctx, x)[index]
    if value is None:
        return expand(ctx, 0.0, dims(ctx, x)) if isinstance(x, (torch.Tensor, trt.ITensor)) else 0.0
    return value


def filled(ctx: Context, real: Any, imag: Any) -> Complex:
    """A complex result of parts that broadcast to its sizes."""
    full = [materialize(ctx, 0.0 if x is None else x, torch.float32) for x in (real, imag)]
    return Complex(*(expand(ctx, x, ctx.out.shape) for x in full))


def negative(ctx: Context, x: Any) -> Any:
    if x is None:
        return None
    return unary(ctx, Unary.NEG, x) if isinstance(x, trt.ITensor) else -x


def plus(ctx: Context, a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else elementwise(ctx, EW.SUM, a, b, torch.float32)


def minus(ctx: Context, a: Any, b: Any) -> Any:
    return negative(ctx, b) if a is None else a if b is None else elementwise(ctx, EW.SUB, a, b, torch.float32)


def times(ctx: Context, a: Any, b: Any) -> Any:
    if isinstance(b, (int, float)) and b == 1:
        return a
    return b if isinstance(a, (int, float)) and a == 1 else elementwise(ctx, EW.PROD, a, b, torch.float32)


def product(ctx: Context, x: Pair, y: Pair, times: Callable[..., Any] = times) -> Pair:
    """(a + bi) (c + di) = (ac - bd) + (ad + bc) i, for anything that multiplies."""
    (a, b), (c, d) = x, y
    ac, bd, ad, bc = (None if v is None or w is None else times(ctx, v, w) for v, w in ((a, c), (b, d), (a, d), (b, c)))
    return minus(ctx, ac, bd), plus(ctx, ad, bc)


def quotient(ctx: Context, x: Pair, y: Pair) -> Pair:
    """Times the conjugate, over the square; the divisor is brought near 1, lest its square overflow or vanish."""
    c, d = y
    if d is None:
        return [None if v is None else elementwise(ctx, EW.DIV, v, c, torch.float32) for v in x]
    c, d = (materialize(ctx, 0.0 if v is None else v, torch.float32) for v in (c, d))
    size = elementwise(ctx, EW.MAX, unary(ctx, Unary.ABS, c), unary(ctx, Unary.ABS, d))
    c, d = (elementwise(ctx, EW.DIV, v, size) for v in (c, d))
    square = plus(ctx, times(ctx, c, c), times(ctx, d, d))
    result = product(ctx, x, (c, negative(ctx, d)))
    return [elementwise(ctx, EW.DIV, elementwise(ctx, EW.DIV, v, square), size) for v in result]


def from_polar(ctx: Context, length: Any, angle: Any) -> Pair:
    return [times(ctx, length, unary(ctx, turn, angle)) for turn in (Unary.COS, Unary.SIN)]
