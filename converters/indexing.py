import operator
from typing import Any

from torch2rt.vocabulary import (
    COUNTED,
    Context,
    MaskIndices,
    Selection,
    add,
    answer,
    assign,
    cast,
    check,
    composite,
    concat,
    converter,
    dims,
    dtype_of,
    expand,
    gather,
    iota,
    is_symbolic,
    is_traced,
    less,
    materialize,
    mul,
    narrow,
    permute,
    proven,
    refuse,
    require,
    reshape,
    same_size,
    select,
    slice_nd,
    torch,
    trt,
    wrap_dim,
)

Tensor, aten = torch.Tensor, torch.ops.aten
MASKS = (torch.bool, torch.uint8)


# One place, one range -------------------------------------------------------------------------------------------------


@converter(torch.select, Tensor.select)
def select_op(ctx: Context, input, dim, index):
    return reshape(ctx, narrow(ctx, input, dim, _position(ctx, index, dims(ctx, input)[dim]), 1), ctx.out.shape)


@converter(aten.slice.Tensor)
def slice_op(ctx: Context, input, dim=0, start=None, end=None, step=1):
    first = _start(ctx, slice(start, end, step), dims(ctx, input)[dim], ctx.out.shape[dim])
    return narrow(ctx, input, dim, first, ctx.out.shape[dim], step)


def _position(ctx: Context, index, size):
    """One index, counted from the front."""
    inside = torch.sym_max(index, -1 - index) < size
    require(ctx, inside, f"index {index} is out of range")
    if not is_symbolic(index):
        return index + size if index < 0 else index
    return index if proven(ctx, index >= 0) else index % size


def _start(ctx: Context, part, size, length):
    """Where a slice begins. The recorded length, made with sizes above 1 in mind, must be Python's for all sizes."""
    first = 0 if part.start is None else _clamped(ctx, part.start, size)
    last = size if part.stop is None else _clamped(ctx, part.stop, size)
    step = 1 if part.step is None else part.step
    expected = torch.sym_max((last - first + step - 1) // step, 0)
    require(ctx, length == expected, "the slice's length follows another rule for small sizes")
    return first


def _clamped(ctx: Context, bound, size):
    """A bound of a slice: Python lets it lie before the first element and after the last."""
    if proven(ctx, bound < 0):
        bound = bound + size
    else:
        check(proven(ctx, bound >= 0), "the slice's bound is negative for some of the dynamic sizes, not for others")
    if not proven(ctx, bound >= 0):
        bound = torch.sym_max(bound, 0)
    return bound if proven(ctx, bound <= size) else torch.sym_min(bound, size)


# Square brackets ------------------------------------------------------------------------------------------------------


@composite(Tensor.__getitem__)
def plain_getitem(input, index):
    index = _as_mask(index)
    if (first := _only_mask(index)) is not None:
        items = index if isinstance(index, tuple) else (index,)
        return Selection(input.clone(), items[first], first)
    x, plain = _plain_index(input, index)
    plain = _cut(x, plain)
    if plain is index:
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    return x[plain].clone() if any(map(_is_truth, items)) else x[plain]  # what is chosen by True is no view


@composite(Tensor.__setitem__)
def plain_setitem(input, index, value):
    """C++ takes integers that are sizes for constants, and computed ones without dimensions too."""
    if (spelled := _cut(input, _as_mask(index))) is not index:
        if plain_setitem(input, spelled, value) is NotImplemented:
            input[spelled] = value
        return None
    items = index if isinstance(index, tuple) else (index,)
    if type(value) is Selection:
        first = _only_mask(index)
        check(first is not None, COUNTED)
        return assign(input, items[first], first, value)
    if any(map(is_symbolic, items)):
        x, plain = _plain_index(input, index)
        x[plain] = value
        return None
    if any(isinstance(item, slice) and any(map(is_symbolic, (item.start, item.stop))) for item in items):
        _check_bounds(input, items)
    if any(map(_is_computed_number, items)):
        items = _spelled_out(items, input.dim())
        if any(not isinstance(item, Tensor) and item != slice(None) for item in items):
            input, items = _around(input, items)
        whole = [isinstance(item, slice) and item == slice(None) for item in items]
        check(
            all(w or isinstance(item, Tensor) for w, item in zip(whole, items, strict=True)),
            "a computed index without dimensions is not supported beside what is neither a number nor a tensor",
        )
        value = value.to(input.dtype) if isinstance(value, Tensor) else input.new_tensor(value)
        aten.index_put_.default(input, [None if w else item for w, item in zip(whole, items, strict=True)], value)
        return None
    masks = [i for i, item in enumerate(items) if isinstance(item, Tensor) and is_traced(item)]
    others = all(i in masks or isinstance(item, slice) and item == slice(None) for i, item in enumerate(items))
    if len(masks) == 1 and others and items[masks[0]].dtype is torch.bool and isinstance(value, Tensor) and value.dim():
        aten.index_put_.default(input, [None] * masks[0] + [items[masks[0]]], value)
        return None
    return NotImplemented


def _is_computed_number(item):
    return isinstance(item, Tensor) and is_traced(item) and not item.dim() and item.dtype not in MASKS


def _around(input, items):
    """A view of what all items but the computed numbers choose, and the items that are left."""
    tensors = [item for item in items if isinstance(item, Tensor)]
    check(
        all(map(_is_computed_number, tensors)),
        "a computed index without dimensions is not supported beside both tensors and others than ':'",
    )
    view = input[tuple(slice(None) if isinstance(item, Tensor) else item for item in items)]
    return view, [item if isinstance(item, Tensor) else slice(None) for item in items if not _is_number(item)]


@composite(torch.where)
def where_is_true(condition, *args, **kwargs):
    if args or kwargs or not is_traced(condition) or condition.dtype is not torch.bool or not condition.dim():
        return NotImplemented
    return tuple(MaskIndices(condition, dim) for dim in range(condition.dim()))


@composite(torch.nonzero, Tensor.nonzero)
def nonzero_as_tuple(input, *, as_tuple=False):
    return where_is_true(input) if as_tuple else NotImplemented


def _as_mask(index):
    """An index in which the tensors that `torch.where(mask)` returns are the mask again."""
    items = index if isinstance(index, tuple) else (index,)
    places = [i for i, item in enumerate(items) if type(item) is MaskIndices]
    if not places:
        return index
    mask = items[places[0]].mask
    whole = [items[i].axis for i in places] == [*range(mask.dim())] and places[-1] - places[0] == len(places) - 1
    check(whole and all(items[i].mask is mask and items[i].version == mask._version for i in places), COUNTED)
    return (*items[: places[0]], mask, *items[places[-1] + 1 :])


def _only_mask(index):
    """Where the one computed mask is, if there is nothing but whole dimensions before and behind it."""
    items = index if isinstance(index, tuple) else (index,)
    masks = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
    if len(masks) != 1 or not is_traced(items[masks[0]]):
        return None
    mask = items[masks[0]]
    others = [item for item in items if item is not mask]
    whole = all(isinstance(item, slice) and item == slice(None) for item in others)
    return masks[0] if whole and mask.dtype is torch.bool and mask.dim() else None


def _check_bounds(input, items):
    """Hold torch to Python's rule for slices: it takes one for the whole where it is that for sizes from 2 on."""
    masks = [item for item in items if isinstance(item, (list, bool)) or getattr(item, "dtype", None) is torch.bool]
    check(not masks, "a slice with dynamic bounds beside a mask is not supported; write to a view")
    for dim, part in enumerate(item for item in _spelled_out(items, input.dim()) if item is not None):
        if isinstance(part, slice) and any(map(is_symbolic, (part.start, part.stop))):
            size, step = input.shape[dim], 1 if part.step is None else part.step
            first = 0 if part.start is None else _within(part.start, size)
            last = size if part.stop is None else _within(part.stop, size)
            length = input.movedim(dim, 0)[part].shape[0]
            torch._check(length == torch.sym_max((last - first + step - 1) // step, 0))


def _within(bound, size):
    return torch.sym_min(torch.sym_max(torch.sym_ite(bound < 0, bound + size, bound), 0), size)


def _plain_index(input, index):
    """An index of numbers, slices and integer tensors only, and what is left to index once its sizes are selected."""
    nested = isinstance(index, list) and any(not isinstance(item, (int, float)) for item in index)
    check(not nested, "torch takes a list of other things than numbers for a tuple, or not; write a tuple or a tensor")
    items = index if isinstance(index, tuple) else (index,)
    plain = [part for item in items for part in _plain(input, item)]
    if any(map(_is_truth, items)):
        met = sum(_is_truth(item) or isinstance(item, Tensor) for item in (*items, *plain))
        check(met == 1, "True beside another True or an index tensor is not supported; index one after the other")
    if any(map(_is_single, plain)):
        plain = _spelled_out(plain, input.dim())
        at = [d for d, item in enumerate(item for item in plain if item is not None) if _is_single(item)]
        for d, item in zip(reversed(at), reversed([item for item in plain if _is_single(item)]), strict=True):
            if isinstance(item, Tensor):
                index = [slice(None)] * d + [item.reshape(1)]
                input, item = input[tuple(index)], 0
            input = input.select(d, item)
        return input, tuple(item for item in plain if not _is_single(item))
    same = len(plain) == len(items) and all(a is b for a, b in zip(plain, items, strict=True))
    return input, index if same else tuple(plain)


def _cut(x, index):
    """An index whose slices end within dynamic dimensions: Python cuts what lies beyond, whatever the size."""
    items = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(item, slice) and item != slice(None) for item in items):
        return index
    if any(item is not None and not isinstance(item, (slice, int)) and not _is_integers(item) for item in items):
        return index  # a mask takes several dimensions
    spelled = _spelled_out(items, x.dim())
    sizes = iter(x.shape)
    cut = [item if item is None else _cut_slice(item, next(sizes)) for item in spelled]
    return index if all(a is b for a, b in zip(spelled, cut, strict=True)) else tuple(cut)


def _is_integers(item):
    return item is Ellipsis or is_symbolic(item) or (isinstance(item, Tensor) and item.dtype not in MASKS)


def _cut_slice(part, size):
    if not isinstance(part, slice) or not is_symbolic(size):
        return part
    first, last = (None if bound is None else _within_proven(bound, size) for bound in (part.start, part.stop))
    if first is part.start and last is part.stop:
        return part
    if first is not None and answer(first <= (size if last is None else last)) is None:
        last = torch.sym_max(first, size if last is None else last)
    return slice(first, last, part.step)


def _within_proven(bound, size):
    """A bound of a slice that lies within, or the bound itself where torch's own rule is right for every size."""
    is_negative = answer(bound < 0)
    if is_negative is None:
        return _within(bound, size)
    if is_negative:
        return bound if answer(bound + size >= 0) else torch.sym_max(bound + size, 0)
    return bound if answer(bound <= size) else torch.sym_min(bound, size)


def _is_single(item):
    """Whether torch selects by this: a size, or a number that is computed."""
    return is_symbolic(item) or _is_computed_number(item)


def _plain(input, item):
    """One item of an index, as one or more plain ones."""
    if item is None or item is Ellipsis or is_symbolic(item) or type(item) is int:
        return [item]
    if isinstance(item, slice):
        bounds = [operator.index(b) if isinstance(b, Tensor) else b for b in (item.start, item.stop, item.step)]
        return [item if bounds == [item.start, item.stop, item.step] else slice(*bounds)]
    if isinstance(item, Tensor) and is_traced(item):
        check(
            item.dtype not in MASKS,
            "how many elements a computed mask selects depends on data; keep all and use torch.where or a product",
        )
        return [item]
    if _is_truth(item):
        check(bool(item), "False as an index leaves nothing")
        return [None]
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return [places.to(input.device) for places in item.bool().nonzero(as_tuple=True)]
    if isinstance(item, Tensor) and item.dim():
        return [item]
    if hasattr(item, "__index__") and not getattr(item, "ndim", 0):
        return [operator.index(item)]
    return _plain(input, torch.tensor(item, device=input.device))


def _is_truth(item):
    return isinstance(item, bool) or (isinstance(item, Tensor) and item.dtype is torch.bool and not item.dim())


@converter(Tensor.__getitem__)
def getitem(ctx: Context, input, index):
    """One slice for the numbers and ranges, one reshape for what appears and disappears, one gather for the tensors."""
    sizes = dims(ctx, input)
    items = _spelled_out(index if isinstance(index, tuple) else (index,), len(sizes))
    tensors = [None if item is None or isinstance(item, slice) else item for item in items if not _is_number(item)]
    places, first = _places(tensors)
    kept = list(ctx.out.shape)
    del kept[first : first + len(kept) + len(places) - len(tensors)]
    start: list[Any] = []
    length: list[Any] = []
    step: list[Any] = []
    shape: list[Any] = []
    for item in items:
        size = None if item is None else sizes[len(start)]
        if item is None:
            shape.append(kept.pop(0))
            continue
        if _is_number(item):
            start.append(_position(ctx, item, size))
            length.append(1)
        elif isinstance(item, slice):
            start.append(_start(ctx, item, size, kept[0]))
            length.append(kept[0])
            shape.append(kept.pop(0))
        else:
            start.append(0)
            length.append(size)
            shape.append(size)
        step.append(item.step if isinstance(item, slice) and item.step is not None else 1)
    x = reshape(ctx, slice_nd(ctx, input, start, length, step), shape)
    return index_op(ctx, x, tensors) if places else x


def _is_number(item):
    return isinstance(item, int) or is_symbolic(item)


def _spelled_out(items, ndim):
    """An index with a number, a slice or a tensor for each dimension."""
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    taken = sum(item is not None and item is not Ellipsis for item in items)
    return [*items[:at], *[slice(None)] * (ndim - taken), *items[at + 1 :]]


def _places(indices):
    """Which dimensions are indexed by tensors, and where torch puts the dimensions of the tensors in their stead."""
    places = [d for d, index in enumerate(indices) if index is not None]
    adjacent = bool(places) and places[-1] - places[0] == len(places) - 1
    return places, places[0] if adjacent else 0


@composite(
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index.Tensor_hacked_twin, aten._unsafe_index.Tensor_hacked_twin
)
def index_without_masks(input, indices):
    """A constant mask as the places that it selects."""
    is_mask = lambda i: i is not None and not is_traced(i) and i.dtype in (torch.bool, torch.uint8)  # noqa: E731
    parts = [i.bool().nonzero(as_tuple=True) if is_mask(i) else [i] for i in indices]
    return aten.index.Tensor(input, [place for part in parts for place in part])


@converter(aten.index.Tensor, aten._unsafe_index.Tensor)
def index_op(ctx: Context, input, indices):
    """Indexed dimensions become one, at the front if they are not neighbours, and a single gather reads it."""
    indices = [part for index in indices for part in _unmasked(ctx, index)]
    places, first = _places(indices)
    sizes = dims(ctx, input)
    rest = [d for d in range(len(sizes)) if d not in places]
    x = permute(ctx, input, [*rest[:first], *places, *rest[first:]])
    position, total = flat_position(ctx, [indices[d] for d in places], [sizes[d] for d in places])
    x = reshape(ctx, x, [*(sizes[d] for d in rest[:first]), total, *(sizes[d] for d in rest[first:])])
    return gather(ctx, x, position, first)


def _is_mask(ctx: Context, index):
    return dtype_of(index) in (torch.bool, torch.uint8) or id(index) in ctx.bytes


def _unmasked(ctx: Context, index):
    """An index tensor, or those for each dimension of a constant mask."""
    if index is None or not _is_mask(ctx, index):
        return [index]
    check(isinstance(index, Tensor), "how many elements a computed mask selects depends on data; use torch.where")
    return list(index.bool().nonzero(as_tuple=True))


def flat_position(ctx: Context, indices, sizes):
    """Where an index tensor for each of some dimensions points when these dimensions are one, and the size of that."""
    position, total = None, 1
    for index, size in zip(reversed(indices), reversed(sizes), strict=True):
        index = counted_from_front(ctx, index, size)
        index = index if same_size(total, 1) else _times(ctx, index, total)
        position = index if position is None else _plus(ctx, position, index)
        total = total * size
    return position, total


def counted_from_front(ctx: Context, index, size):
    """An index tensor without negative numbers."""
    if isinstance(index, Tensor):
        index = index.cpu()  # an index may live on the CPU, its neighbours on the GPU
        if not index.numel():
            return index.long()
        low, high = int(index.min()), int(index.max())
        for value in (low, high):
            inside = size > value if value >= 0 else size >= -value
            require(ctx, inside, f"index {value} is out of range for size {size}", at_calls=True)
        if low >= 0:
            return index.long()
        if not is_symbolic(size):
            return torch.where(index < 0, index + size, index).long()
    index = materialize(ctx, index)
    return select(ctx, less(ctx, index, 0), add(ctx, index, size), index)


def _plus(ctx: Context, a, b):
    return a + b if isinstance(a, Tensor) and isinstance(b, Tensor) else add(ctx, a, b)


def _times(ctx: Context, a, b):
    return a * b if isinstance(a, Tensor) and not is_symbolic(b) else mul(ctx, a, b)


# The same places, written ---------------------------------------------------------------------------------------------


@converter(torch.select_scatter, Tensor.select_scatter)
def select_scatter(ctx: Context, input, src, dim, index):
    dim = wrap_dim(dim, len(ctx.out.shape))
    part = [1 if d == dim else size for d, size in enumerate(ctx.out.shape)]
    return _replaced(ctx, input, reshape(ctx, src, part), dim, _position(ctx, index, ctx.out.shape[dim]), 1)


@converter(torch.slice_scatter, Tensor.slice_scatter)
def slice_scatter(ctx: Context, input, src, dim=0, start=None, end=None, step=1):
    size, length = ctx.out.shape[dim], dims(ctx, src)[dim]
    first = _start(ctx, slice(start, end, step), size, length)
    if step == 1:
        return _replaced(ctx, input, src, dim, first, length)
    order, back = _to_front(len(ctx.out.shape), dim)
    place = _plus(ctx, _times(ctx, iota(ctx, length), step), first)
    rows = _put_rows(ctx, permute(ctx, input, order), place, permute(ctx, cast(ctx, src, ctx.out.dtype), order))
    return permute(ctx, rows, back)


@converter(torch.diagonal_scatter, Tensor.diagonal_scatter)
def diagonal_scatter(ctx: Context, input, src, offset=0, dim1=0, dim2=1):
    """With rows and columns as one dimension, the diagonal is every (columns + 1)-th element."""
    order, back = _to_front(len(ctx.out.shape), dim1, dim2)
    x = permute(ctx, input, order)
    rows, columns, *rest = dims(ctx, x)
    start = offset if offset >= 0 else -offset * columns
    place = _plus(ctx, _times(ctx, iota(ctx, dims(ctx, src)[-1]), columns + 1), start)
    updates = permute(ctx, cast(ctx, src, ctx.out.dtype), [len(rest), *range(len(rest))])
    x = _put_rows(ctx, reshape(ctx, x, [rows * columns, *rest]), place, updates)
    return permute(ctx, reshape(ctx, x, [rows, columns, *rest]), back)


@converter(
    torch.index_put, Tensor.index_put, aten._unsafe_index_put, limits="no accumulate where a mask meets other indices"
)
def index_put(ctx: Context, input, indices, values, accumulate=False):
    """Indexed dimensions become one, in front, and a single scatter writes to it; a mask chooses without one."""
    values = cast(ctx, values, ctx.out.dtype)
    places, _ = _places(indices)
    mask = indices[places[0]] if places else None
    if len(places) == 1 and _is_mask(ctx, mask):
        merged = _under_mask(ctx, values, mask, places[0])
        if merged is not None:
            merged = add(ctx, input, merged, ctx.out.dtype) if accumulate else merged
            after = len(ctx.out.shape) - places[0] - len(dims(ctx, mask))
            return select(ctx, reshape(ctx, mask, [*dims(ctx, mask), *[1] * after]), merged, input, ctx.out.dtype)
    check(not accumulate, "adding where a mask and other indices meet is not supported")
    indices = [part for index in indices for part in _unmasked(ctx, index)]
    places, first = _places(indices)
    sizes = dims(ctx, input)
    order, back = _to_front(len(sizes), *places)
    rest = [sizes[d] for d in order[len(places) :]]
    place, total = flat_position(ctx, [indices[d] for d in places], [sizes[d] for d in places])
    shape = dims(ctx, place)
    updates = expand(ctx, values, [*rest[:first], *shape, *rest[first:]])
    updates = permute(ctx, updates, _to_front(len(rest) + len(shape), *range(first, first + len(shape)))[0])
    x = reshape(ctx, permute(ctx, input, order), [total, *rest])
    return permute(ctx, reshape(ctx, _put_rows(ctx, x, place, updates), [sizes[d] for d in order]), back)


def _under_mask(ctx: Context, values, mask, dim):
    """Values to choose from under a mask over the dimensions from `dim` on, if there is one for all it selects."""
    shape, masked = dims(ctx, values), len(dims(ctx, mask))
    after = len(ctx.out.shape) - dim - masked
    if len(shape) <= after:
        return values
    at = len(shape) - after - 1
    if not same_size(shape[at], 1):
        return None if isinstance(mask, Tensor) else refuse("how many values a computed mask takes depends on data")
    return reshape(ctx, values, [*shape[:at], *[1] * masked, *shape[at + 1 :]])


@composite(torch.index_put, Tensor.index_put, aten.index_put, aten.index_put.default)
def index_put_adding(input, indices, values, accumulate=False):
    """With indexed dimensions as one, in front, it is an `index_add`; under one computed mask, a `masked_scatter`."""
    places, first = _places(indices)
    if len(places) == 1 and indices[first].dtype is torch.bool and is_traced(indices[first]):
        return _masked_put(input, indices[first], first, values, accumulate)
    if not accumulate or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return NotImplemented
    order, back = _to_front(input.dim(), *places)
    x = input.permute(order)
    sizes, rest = x.shape[: len(places)], x.shape[len(places) :]
    place, total = 0, 1
    for d, size in zip(reversed(places), reversed(sizes), strict=True):
        place = place + torch.where(indices[d] < 0, indices[d] + size, indices[d]) * total
        total = total * size
    updates = values.expand(*rest[:first], *place.shape, *rest[first:])
    updates = updates.permute(_to_front(updates.dim(), *range(first, first + place.dim()))[0])
    rows = x.reshape(total, *rest).index_add(0, place.flatten(), updates.reshape(-1, *rest))
    return rows.reshape(x.shape).permute(back)


def _masked_put(input, mask, dim, values, accumulate):
    """A value, or a row of them, for each true element of a mask over the dimensions from `dim` on."""
    order, back = _to_front(input.dim(), *range(dim, dim + mask.dim()))
    x, after = input.permute(order), input.dim() - dim - mask.dim()
    if values.dim() <= after or same_size(values.shape[values.dim() - after - 1], 1):
        return NotImplemented
    rest = x.shape[mask.dim() :]
    rows = values.expand(*rest[:dim], values.shape[values.dim() - after - 1], *rest[dim:]).movedim(dim, 0)
    mask = mask.reshape(*mask.shape, *[1] * len(rest))
    result = (torch.zeros_like(x) if accumulate else x).masked_scatter(mask, rows)
    return (x + result if accumulate else result).permute(back)


@converter(torch.index_copy, Tensor.index_copy)
def index_copy(ctx: Context, input, dim, index, source):
    x, source = (materialize(ctx, v, ctx.out.dtype, 1) for v in (input, source))
    order, back = _to_front(len(dims(ctx, x)), dim)
    place = counted_from_front(ctx, index, dims(ctx, x)[dim])
    place = place.reshape(-1) if isinstance(place, Tensor) else reshape(ctx, place, [dims(ctx, source)[dim]])
    rows = _put_rows(ctx, permute(ctx, x, order), place, permute(ctx, source, order))
    return reshape(ctx, permute(ctx, rows, back), ctx.out.shape)


def _to_front(ndim, *moved):
    """An order of dimensions with some of them first, and the order that takes it back."""
    first = [wrap_dim(d, ndim) for d in moved]
    order = first + [d for d in range(ndim) if d not in first]
    return order, [order.index(d) for d in range(ndim)]


def _replaced(ctx: Context, x, part, dim, start, length):
    """`x` with `length` elements from `start` along one dimension taken from `part`."""
    size = dims(ctx, x)[dim]
    end = start + length
    before = [] if same_size(start, 0) else [narrow(ctx, x, dim, 0, start)]
    after = [] if same_size(end, size) else [narrow(ctx, x, dim, end, size - end)]
    return concat(ctx, [*before, cast(ctx, part, ctx.out.dtype), *after], dim)


def _put_rows(ctx: Context, x, place, rows):
    """`x` with the rows at the places in an index tensor replaced; if a constant names one twice, the last counts."""
    if isinstance(place, Tensor):
        last = {row: i for i, row in enumerate(place.flatten().tolist())}
        if len(last) < place.numel():
            rows = reshape(ctx, rows, [place.numel(), *dims(ctx, x)[1:]])
            rows, place = gather(ctx, rows, torch.tensor([*last.values()]), 0), torch.tensor([*last])
    x, rows = materialize(ctx, x), materialize(ctx, rows)
    layer = ctx.network.add_scatter(x, reshape(ctx, place, [*dims(ctx, place), 1]), rows, trt.ScatterMode.ND)
    result = ctx.track(layer.get_output(0), dims(ctx, x))
    if id(x) in ctx.bytes:
        ctx.bytes.add(id(result))
    return result
