import operator
from typing import Any

from torch2rt.vocabulary import (
    COUNTED,
    Context,
    MaskIndices,
    Selection,
    add,
    answer,
    check,
    composite,
    converter,
    dims,
    dtype_of,
    gather,
    is_symbolic,
    is_traced,
    less,
    materialize,
    mul,
    narrow,
    permute,
    proven,
    require,
    reshape,
    same_size,
    select,
    slice_nd,
    torch,
)

Tensor, aten = torch.Tensor, torch.ops.aten
MASKS = (torch.bool, torch.uint8)


# One place, one range -------------------------------------------------------------------------------------------------


@converter(torch.select, Tensor.select)
def select_op(ctx: Context, input, dim, index):
    return reshape(ctx, narrow(ctx, input, dim, position_of(ctx, index, dims(ctx, input)[dim]), 1), ctx.out.shape)


@converter(aten.slice.Tensor)
def slice_op(ctx: Context, input, dim=0, start=None, end=None, step=1):
    first = start_of(ctx, slice(start, end, step), dims(ctx, input)[dim], ctx.out.shape[dim])
    return narrow(ctx, input, dim, first, ctx.out.shape[dim], step)


def position_of(ctx: Context, index, size):
    """One index, counted from the front."""
    inside = torch.sym_max(index, -1 - index) < size
    require(ctx, inside, f"index {index} is out of range")
    if not is_symbolic(index):
        return index + size if index < 0 else index
    return index if proven(ctx, index >= 0) else index % size


def start_of(ctx: Context, part, size, length):
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
    index = as_mask(index)
    if (first := only_mask(index)) is not None:
        items = index if isinstance(index, tuple) else (index,)
        return Selection(input.clone(), items[first], first)
    x, plain = plain_index(input, index)
    plain = cut(x, plain)
    if plain is index:
        return NotImplemented
    items = index if isinstance(index, tuple) else (index,)
    return x[plain].clone() if any(map(_is_truth, items)) else x[plain]  # what is chosen by True is no view


def is_computed_number(item):
    return isinstance(item, Tensor) and is_traced(item) and not item.dim() and item.dtype not in MASKS


@composite(torch.where)
def where_is_true(condition, *args, **kwargs):
    if args or kwargs or not is_traced(condition) or condition.dtype is not torch.bool or not condition.dim():
        return NotImplemented
    return tuple(MaskIndices(condition, dim) for dim in range(condition.dim()))


@composite(torch.nonzero, Tensor.nonzero)
def nonzero_as_tuple(input, *, as_tuple=False):
    return where_is_true(input) if as_tuple else NotImplemented


def as_mask(index):
    """An index in which the tensors that `torch.where(mask)` returns are the mask again."""
    items = index if isinstance(index, tuple) else (index,)
    places = [i for i, item in enumerate(items) if type(item) is MaskIndices]
    if not places:
        return index
    mask = items[places[0]].mask
    whole = [items[i].axis for i in places] == [*range(mask.dim())] and places[-1] - places[0] == len(places) - 1
    check(whole and all(items[i].mask is mask and items[i].version == mask._version for i in places), COUNTED)
    return (*items[: places[0]], mask, *items[places[-1] + 1 :])


def only_mask(index):
    """Where the one computed mask is, if there is nothing but whole dimensions before and behind it."""
    items = index if isinstance(index, tuple) else (index,)
    masks = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
    if len(masks) != 1 or not is_traced(items[masks[0]]):
        return None
    mask = items[masks[0]]
    others = [item for item in items if item is not mask]
    whole = all(isinstance(item, slice) and item == slice(None) for item in others)
    return masks[0] if whole and mask.dtype is torch.bool and mask.dim() else None


def check_bounds(input, items):
    """Hold torch to Python's rule for slices: it takes one for the whole where it is that for sizes from 2 on."""
    masks = [item for item in items if isinstance(item, (list, bool)) or getattr(item, "dtype", None) is torch.bool]
    check(not masks, "a slice with dynamic bounds beside a mask is not supported; write to a view")
    for dim, part in enumerate(item for item in spelled_out(items, input.dim()) if item is not None):
        if isinstance(part, slice) and any(map(is_symbolic, (part.start, part.stop))):
            size, step = input.shape[dim], 1 if part.step is None else part.step
            first = 0 if part.start is None else _within(part.start, size)
            last = size if part.stop is None else _within(part.stop, size)
            length = input.movedim(dim, 0)[part].shape[0]
            torch._check(length == torch.sym_max((last - first + step - 1) // step, 0))


def _within(bound, size):
    if is_symbolic(bound):
        bound = torch.sym_ite(bound < 0, bound + size, bound)
    elif bound < 0:
        bound = bound + size
    return torch.sym_min(torch.sym_max(bound, 0), size)


def plain_index(input, index):
    """An index of numbers, slices and integer tensors only, and what is left to index once its sizes are selected."""
    nested = isinstance(index, list) and any(not isinstance(item, (int, float)) for item in index)
    check(not nested, "torch takes a list of other things than numbers for a tuple, or not; write a tuple or a tensor")
    items = index if isinstance(index, tuple) else (index,)
    plain = [part for item in items for part in _plain(input, item)]
    if any(map(_is_truth, items)):
        met = sum(_is_truth(item) or isinstance(item, Tensor) for item in (*items, *plain))
        check(met == 1, "True beside another True or an index tensor is not supported; index one after the other")
    if any(map(_is_single, plain)):
        plain = spelled_out(plain, input.dim())
        at = [d for d, item in enumerate(item for item in plain if item is not None) if _is_single(item)]
        for d, item in zip(reversed(at), reversed([item for item in plain if _is_single(item)]), strict=True):
            if isinstance(item, Tensor):
                index = [slice(None)] * d + [item.reshape(1)]
                input, item = input[tuple(index)], 0
            input = input.select(d, item)
        return input, tuple(item for item in plain if not _is_single(item))
    same = len(plain) == len(items) and all(a is b for a, b in zip(plain, items, strict=True))
    return input, index if same else tuple(plain)


def cut(x, index):
    """An index whose slices end within dynamic dimensions: Python cuts what lies beyond, whatever the size."""
    items = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(item, slice) and item != slice(None) for item in items):
        return index
    if any(item is not None and not isinstance(item, (slice, int)) and not _is_integers(item) for item in items):
        return index  # a mask takes several dimensions
    spelled = spelled_out(items, x.dim())
    sizes = iter(x.shape)
    cut = [item if item is None else _cut_slice(item, next(sizes)) for item in spelled]
    return index if all(a is b for a, b in zip(spelled, cut, strict=True)) else tuple(cut)


def _is_integers(item):
    return item is Ellipsis or is_symbolic(item) or (isinstance(item, Tensor) and item.dtype not in MASKS)


def _cut_slice(part, size):
    if not isinstance(part, slice) or not any(map(is_symbolic, (size, part.start, part.stop))):
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
    return is_symbolic(item) or is_computed_number(item)


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
    items = spelled_out(index if isinstance(index, tuple) else (index,), len(sizes))
    tensors = [None if item is None or isinstance(item, slice) else item for item in items if not is_number(item)]
    places, first = indexed_dims(tensors)
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
        if is_number(item):
            start.append(position_of(ctx, item, size))
            length.append(1)
        elif isinstance(item, slice):
            start.append(start_of(ctx, item, size, kept[0]))
            length.append(kept[0])
            shape.append(kept.pop(0))
        else:
            start.append(0)
            length.append(size)
            shape.append(size)
        step.append(item.step if isinstance(item, slice) and item.step is not None else 1)
    x = reshape(ctx, slice_nd(ctx, input, start, length, step), shape)
    return index_op(ctx, x, tensors) if places else x


def is_number(item):
    return isinstance(item, int) or is_symbolic(item)


def spelled_out(items, ndim):
    """An index with a number, a slice or a tensor for each dimension."""
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    taken = sum(item is not None and item is not Ellipsis for item in items)
    return [*items[:at], *[slice(None)] * (ndim - taken), *items[at + 1 :]]


def indexed_dims(indices):
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
    indices = [part for index in indices for part in unmasked(ctx, index)]
    places, first = indexed_dims(indices)
    sizes = dims(ctx, input)
    rest = [d for d in range(len(sizes)) if d not in places]
    x = permute(ctx, input, [*rest[:first], *places, *rest[first:]])
    position, total = flat_position(ctx, [indices[d] for d in places], [sizes[d] for d in places])
    x = reshape(ctx, x, [*(sizes[d] for d in rest[:first]), total, *(sizes[d] for d in rest[first:])])
    return gather(ctx, x, position, first)


def is_mask(ctx: Context, index):
    return dtype_of(index) in (torch.bool, torch.uint8) or id(index) in ctx.bytes


def unmasked(ctx: Context, index):
    """An index tensor, or those for each dimension of a constant mask."""
    if index is None or not is_mask(ctx, index):
        return [index]
    check(isinstance(index, Tensor), "how many elements a computed mask selects depends on data; use torch.where")
    return list(index.bool().nonzero(as_tuple=True))


def flat_position(ctx: Context, indices, sizes):
    """Where an index tensor for each of some dimensions points when these dimensions are one, and the size of that."""
    position, total = None, 1
    for index, size in zip(reversed(indices), reversed(sizes), strict=True):
        index = counted_from_front(ctx, index, size)
        index = index if same_size(total, 1) else times(ctx, index, total)
        position = index if position is None else plus(ctx, position, index)
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


def plus(ctx: Context, a, b):
    return a + b if isinstance(a, Tensor) and isinstance(b, Tensor) else add(ctx, a, b)


def times(ctx: Context, a, b):
    return a * b if isinstance(a, Tensor) and not is_symbolic(b) else mul(ctx, a, b)
