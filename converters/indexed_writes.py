from torch2rt.converters.indexing import (
    as_mask,
    check_bounds,
    counted_from_front,
    cut,
    flat_position,
    indexed_dims,
    is_computed_number,
    is_mask,
    is_number,
    only_mask,
    plain_index,
    plus,
    position_of,
    spelled_out,
    start_of,
    times,
    unmasked,
)

from torch2rt.vocabulary import (
    COUNTED,
    Context,
    Selection,
    add,
    assign,
    cast,
    check,
    composite,
    concat,
    converter,
    dims,
    expand,
    gather,
    iota,
    is_symbolic,
    is_traced,
    materialize,
    narrow,
    permute,
    refuse,
    reshape,
    same_size,
    select,
    torch,
    trt,
    wrap_dim,
)

Tensor, aten = torch.Tensor, torch.ops.aten


@composite(Tensor.__setitem__)
def plain_setitem(input, index, value):
    """C++ takes integers that are sizes for constants, and computed ones without dimensions too."""
    if (spelled := cut(input, as_mask(index))) is not index:
        if plain_setitem(input, spelled, value) is NotImplemented:
            input[spelled] = value
        return None
    items = index if isinstance(index, tuple) else (index,)
    if type(value) is Selection:
        first = only_mask(index)
        check(first is not None, COUNTED)
        return assign(input, items[first], first, value)
    if any(map(is_symbolic, items)):
        x, plain = plain_index(input, index)
        x[plain] = value
        return None
    if any(isinstance(item, slice) and any(map(is_symbolic, (item.start, item.stop))) for item in items):
        check_bounds(input, items)
    if any(map(is_computed_number, items)):
        items = spelled_out(items, input.dim())
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


def _around(input, items):
    """A view of what all items but the computed numbers choose, and the items that are left."""
    tensors = [item for item in items if isinstance(item, Tensor)]
    check(
        all(map(is_computed_number, tensors)),
        "a computed index without dimensions is not supported beside both tensors and others than ':'",
    )
    view = input[tuple(slice(None) if isinstance(item, Tensor) else item for item in items)]
    return view, [item if isinstance(item, Tensor) else slice(None) for item in items if not is_number(item)]


@converter(torch.select_scatter, Tensor.select_scatter)
def select_scatter(ctx: Context, input, src, dim, index):
    dim = wrap_dim(dim, len(ctx.out.shape))
    part = [1 if d == dim else size for d, size in enumerate(ctx.out.shape)]
    return _replaced(ctx, input, reshape(ctx, src, part), dim, position_of(ctx, index, ctx.out.shape[dim]), 1)


@converter(torch.slice_scatter, Tensor.slice_scatter)
def slice_scatter(ctx: Context, input, src, dim=0, start=None, end=None, step=1):
    size, length = ctx.out.shape[dim], dims(ctx, src)[dim]
    first = start_of(ctx, slice(start, end, step), size, length)
    if step == 1:
        return _replaced(ctx, input, src, dim, first, length)
    order, back = _to_front(len(ctx.out.shape), dim)
    place = plus(ctx, times(ctx, iota(ctx, length), step), first)
    rows = _put_rows(ctx, permute(ctx, input, order), place, permute(ctx, cast(ctx, src, ctx.out.dtype), order))
    return permute(ctx, rows, back)


@converter(torch.diagonal_scatter, Tensor.diagonal_scatter)
def diagonal_scatter(ctx: Context, input, src, offset=0, dim1=0, dim2=1):
    """With rows and columns as one dimension, the diagonal is every (columns + 1)-th element."""
    order, back = _to_front(len(ctx.out.shape), dim1, dim2)
    x = permute(ctx, input, order)
    rows, columns, *rest = dims(ctx, x)
    start = offset if offset >= 0 else -offset * columns
    place = plus(ctx, times(ctx, iota(ctx, dims(ctx, src)[-1]), columns + 1), start)
    updates = permute(ctx, cast(ctx, src, ctx.out.dtype), [len(rest), *range(len(rest))])
    x = _put_rows(ctx, reshape(ctx, x, [rows * columns, *rest]), place, updates)
    return permute(ctx, reshape(ctx, x, [rows, columns, *rest]), back)


@converter(
    torch.index_put, Tensor.index_put, aten._unsafe_index_put, limits="no accumulate where a mask meets other indices"
)
def index_put(ctx: Context, input, indices, values, accumulate=False):
    """Indexed dimensions become one, in front, and a single scatter writes to it; a mask chooses without one."""
    values = cast(ctx, values, ctx.out.dtype)
    places, _ = indexed_dims(indices)
    mask = indices[places[0]] if places else None
    if len(places) == 1 and is_mask(ctx, mask):
        merged = _under_mask(ctx, values, mask, places[0])
        if merged is not None:
            merged = add(ctx, input, merged, ctx.out.dtype) if accumulate else merged
            after = len(ctx.out.shape) - places[0] - len(dims(ctx, mask))
            return select(ctx, reshape(ctx, mask, [*dims(ctx, mask), *[1] * after]), merged, input, ctx.out.dtype)
    check(not accumulate, "adding where a mask and other indices meet is not supported")
    indices = [part for index in indices for part in unmasked(ctx, index)]
    places, first = indexed_dims(indices)
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
    places, first = indexed_dims(indices)
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
