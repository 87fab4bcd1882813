import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    add,
    cast,
    check,
    composite,
    converter,
    dtype_of,
    equal,
    expand,
    factory,
    iota,
    is_integral,
    is_symbolic,
    is_traced,
    materialize,
    mul,
    require,
    reshape,
    torch,
)
from torch2rt.vocabulary.complex import is_complex

Tensor, aten, prims = torch.Tensor, torch.ops.aten, torch.ops.prims

factory(
    torch.zeros,
    torch.zeros_like,
    Tensor.new_zeros,
    torch.ones,
    torch.ones_like,
    Tensor.new_ones,
    torch.full,
    torch.full_like,
    Tensor.new_full,
    torch.empty,
    torch.empty_like,
    Tensor.new_empty,
    torch.empty_strided,
    Tensor.new_empty_strided,
    torch.empty_permuted,
    torch.arange,
    torch.linspace,
    torch.eye,
    Tensor.new_tensor,
)


# One value everywhere -------------------------------------------------------------------------------------------------


@converter(
    torch.zeros,
    torch.zeros_like,
    Tensor.new_zeros,
    aten.zero,
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
    torch.empty_permuted,
    prims.empty_strided,
)
def zeros(ctx: Context, *args, **kwargs):
    return _filled(ctx, 0)


@converter(torch.ones, torch.ones_like, Tensor.new_ones)
def ones(ctx: Context, *args, **kwargs):
    return _filled(ctx, 1)


@converter(torch.full, Tensor.new_full, torch.full_like)
def full(ctx: Context, *args, fill_value=None, **kwargs):
    return _filled(ctx, args[-1] if fill_value is None else fill_value)


@converter(torch.fill, aten.fill)
def fill(ctx: Context, input, value):
    return _filled(ctx, value)


@converter(torch.scalar_tensor)
def scalar_tensor(ctx: Context, s, **kwargs):
    return _filled(ctx, s)


@converter(aten.copy)
def copy(ctx: Context, input, src, non_blocking=False):
    return _filled(ctx, src)


def _filled(ctx: Context, value):
    return expand(ctx, materialize(ctx, value, ctx.out.dtype), ctx.out.shape)


@composite(torch.full)
def full_of_tensor(size, fill_value, *, dtype=None, **kwargs):
    if not isinstance(fill_value, Tensor) or not is_traced(fill_value):
        return NotImplemented
    kinds = {torch.bool: torch.bool} if fill_value.dtype is torch.bool else {}
    plain = torch.get_default_dtype() if fill_value.is_floating_point() else kinds.get(fill_value.dtype, torch.int64)
    return fill_value.to(dtype or plain).expand(size).clone()


@composite(torch.full_like, Tensor.new_full)
def full_like_of_tensor(input, *args, dtype=None, **kwargs):
    given = [*args, *(kwargs[k] for k in ("size", "fill_value") if k in kwargs)]
    size, value = given[:-1], given[-1]
    if not isinstance(value, Tensor) or not is_traced(value):
        return NotImplemented
    return value.to(dtype or input.dtype).expand(size[0] if size else input.shape).clone()


# Rows of numbers ------------------------------------------------------------------------------------------------------


@converter(torch.arange)
def arange(ctx: Context, start=0, end=None, step=1, **kwargs):
    return _progression(ctx, 0 if end is None else start, step)  # one number alone is the end


@converter(prims.iota)
def iota_op(ctx: Context, length, *, start, step, dtype, device, requires_grad):
    return _progression(ctx, start, step)


def _progression(ctx: Context, start, step):
    (length,) = ctx.out.shape
    require(ctx, length >= 0, "the range ends before it starts")
    dtype = ctx.out.dtype if ctx.out.dtype in (torch.int32, torch.int64) else torch.float32
    x = cast(ctx, iota(ctx, length), dtype)
    x = x if step == 1 else mul(ctx, x, step, dtype)
    x = add(ctx, x, start, dtype) if is_symbolic(start) or start != 0 else x
    return cast(ctx, x, ctx.out.dtype)


@composite(torch.linspace)
def linspace(start, end, steps, *, dtype=None, device=None, **kwargs):
    """Counted from both ends, as torch does, so that the last number is `end` itself."""
    if not any(map(is_traced, (start, end, steps))):
        return NotImplemented
    if dtype is None:
        plain = torch.get_default_dtype()
        dtype = plain.to_complex() if any(map(is_complex, (start, end))) else plain
    device = next((v.device for v in (start, end) if isinstance(v, Tensor)), device)
    if is_integral(dtype):
        return _integers(start, end, steps, device).to(dtype)
    i = torch.arange(steps, dtype=torch.float32, device=device)
    step = (end - start) / torch.sym_max(steps - 1, 1)
    return torch.where(i < torch.sym_max(steps // 2, 1), start + step * i, end - step * (steps - 1 - i)).to(dtype)


def _integers(start, end, steps, device):
    """Evenly spaced numbers without their fractions, by exact arithmetic, where torch's rounds in float64."""
    start, end = (v.long() if isinstance(v, Tensor) else torch.sym_int(v) for v in (start, end))
    count = torch.sym_max(steps - 1, 1)
    total = start * count + (end - start) * torch.arange(steps, device=device)
    return torch.div(total, count, rounding_mode="trunc")


@composite(torch.logspace)
def logspace(start, end, steps, base=10.0, **kwargs):
    if not any(map(is_traced, (start, end, steps, base))):
        return NotImplemented
    dtype = kwargs.get("dtype")
    check(dtype is None or not is_integral(dtype), "powers rounded to integers are not supported; make them floats")
    return torch.pow(base, torch.linspace(start, end, steps, **kwargs))


@converter(torch.eye)
def eye(ctx: Context, n, m=None, **kwargs):
    rows, columns = ctx.out.shape
    row = reshape(ctx, iota(ctx, rows), [rows, 1])
    return cast(ctx, equal(ctx, row, iota(ctx, columns)), ctx.out.dtype)


@composite(F.one_hot)
def one_hot(input, num_classes=-1):
    if not is_symbolic(num_classes) and num_classes < 0:
        return NotImplemented
    check(input.dtype is torch.int64, "it takes int64")
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()


# Python's numbers -----------------------------------------------------------------------------------------------------


@composite(torch.tensor, torch.as_tensor, torch.asarray)
def tensor(data, dtype=None, device=None, **kwargs):
    """Nested lists of numbers, sizes and 0-d tensors, put together one by one."""
    if not isinstance(data, (list, tuple)) and not is_symbolic(data):
        return NotImplemented
    leaves, shape = _leaves(data)
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), device)
    dtype = dtype or _kind(leaves)
    parts = [
        leaf.reshape(()).to(dtype) if isinstance(leaf, Tensor) else torch.full((), leaf, dtype=dtype, device=device)
        for leaf in leaves
    ]
    return torch.stack(parts).reshape(shape)


@composite(Tensor.new_tensor)
def new_tensor(input, data, *, dtype=None, device=None, **kwargs):
    if not any(map(is_traced, _leaves(data)[0])):
        return NotImplemented
    return torch.tensor(data, dtype=dtype or input.dtype, device=device or input.device)


def _leaves(data):
    """The numbers in a nested list, and the list's shape."""
    if not isinstance(data, (list, tuple)):
        return [data], []
    parts = [_leaves(item) for item in data]
    return [leaf for leaves, _ in parts for leaf in leaves], [len(data), *(parts[0][1] if parts else [])]


def _kind(leaves):
    """The dtype that torch gives to numbers, which ranks only bools below integers below floats."""
    kinds = {dtype_of(leaf) for leaf in leaves}
    if any(kind.is_floating_point for kind in kinds):
        return torch.get_default_dtype()
    return torch.bool if kinds == {torch.bool} else torch.int64
