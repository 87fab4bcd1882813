"""Pooling with windows of dynamic sizes, such as `F.avg_pool2d(x, x.shape[2:])`, and the indices of dynamic ones.

TensorRT's pooling layers have static windows, and torch's own operators take no dynamic ones. So the elements of each
window are gathered, one dimension after the other.
"""

import math

import torch.nn.functional as F

from torch2rt.vocabulary import composite, is_symbolic, ntuple, same_size, torch, wide

_nn = torch._C._nn


def _register_max(n):
    plain = getattr(torch, f"max_pool{n}d")

    @composite(getattr(F, f"max_pool{n}d"), plain)
    def max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if not _is_dynamic(kernel_size, stride, padding, dilation):
            return NotImplemented
        return _slide(input, n, _highest, *_windows(input, n, kernel_size, stride, padding, dilation, ceil_mode))

    @composite(getattr(_nn, f"max_pool{n}d_with_indices"))
    def max_pool_with_indices(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        if not _is_dynamic(kernel_size, stride, padding, dilation, *input.shape[-n:]):
            return NotImplemented
        return _highest_with_indices(input, n, *_windows(input, n, kernel_size, stride, padding, dilation, ceil_mode))


def _register_average(n):
    @composite(getattr(F, f"avg_pool{n}d"))
    def avg_pool(
        input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        if not _is_dynamic(kernel_size, stride, padding):
            return NotImplemented
        if not input.dtype.is_floating_point:
            return NotImplemented
        places, inside = _windows(input, n, kernel_size, stride, padding, 1, ceil_mode)
        total = _slide(input.to(wide(input.dtype)), n, _sum, places, inside)
        if divisor_override is not None:
            return (total / divisor_override).to(input.dtype)
        for axis, (place, known) in enumerate(zip(places, inside, strict=True), -n):
            size, reach = input.shape[axis], ntuple(padding, n)[axis] if count_include_pad else 0
            if known is None:
                count = _length(place)
            else:
                count = ((place >= -reach) & (place < size + reach)).sum(-1).reshape(-1, *[1] * (-1 - axis))
            total = total / count
        return total.to(input.dtype)


def _register_adaptive(n):
    with_indices = getattr(torch if n == 1 else _nn, f"adaptive_max_pool{n}d")

    @composite(getattr(F, f"adaptive_max_pool{n}d"))
    def adaptive_max_pool(input, output_size, return_indices=False):
        if not _is_dynamic(output_size):
            return NotImplemented
        return _slide(input, n, _highest, _shares(input, n, output_size), [None] * n)

    @composite(with_indices)
    def adaptive_max_pool_with_indices(input, output_size):
        if not _is_dynamic(output_size, *input.shape[-n:]):
            return NotImplemented
        return _highest_with_indices(input, n, _shares(input, n, output_size), [None] * n)


for _n in (1, 2, 3):
    _register_average(_n)
    _register_adaptive(_n)
    if _n > 1:
        _register_max(_n)


def _is_dynamic(*values):
    flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return any(map(is_symbolic, flat))


# Which elements a window has ------------------------------------------------------------------------------------------


def _windows(input, n, kernel_size, stride, padding, dilation, ceil_mode):
    """For each dimension: where each window reads, as (result, window), and where that is inside, or None for always.

    For one window that is all of its dimension it is the size instead of the places.
    """
    stride = stride if stride is not None and stride != [] and stride != () else kernel_size
    places, inside = [], []
    options = (ntuple(v, n) for v in (kernel_size, stride, padding, dilation))
    for size, k, s, p, d in zip(input.shape[-n:], *options, strict=True):
        if same_size(k, size) and same_size(p, 0) and same_size(d, 1):
            places.append(size)
            inside.append(None)
            continue
        reach = size + 2 * p - d * (k - 1) - 1
        torch._check(reach >= 0)
        torch._check(d * (k - 1) + 1 >= 2 * p)
        out = reach // s + 1
        if ceil_mode:  # no window starts in the padding behind
            out = torch.sym_min((reach + s - 1) // s + 1, (size + p + s - 1) // s)
        first = torch.arange(out, device=input.device).unsqueeze(-1) * s - p
        place = first + torch.arange(k, device=input.device) * d
        places.append(place)
        inside.append((place >= 0) & (place < size) if ceil_mode or not same_size(p, 0) else None)
    return places, inside


def _shares(input, n, output_size):
    """The places of adaptive windows; a shorter one has its last place repeatedly."""
    places = []
    for size, out in zip(input.shape[-n:], ntuple(output_size, n), strict=True):
        if out is None or same_size(out, size):
            places.append(torch.arange(size, device=input.device).unsqueeze(-1))
            continue
        if same_size(out, 1):
            places.append(size)
            continue
        i = torch.arange(out, device=input.device).unsqueeze(-1)
        end = ((i + 1) * size + out - 1) // out
        longest = (size + out - 1) // out + 1
        places.append(torch.minimum(i * size // out + torch.arange(longest, device=input.device), end - 1))
    return places


def _length(place):
    return place.shape[-1] if isinstance(place, torch.Tensor) else place


# What becomes of them -------------------------------------------------------------------------------------------------


def _highest(x, inside):
    return (x if inside is None else torch.where(inside, x, _lowest(x))).amax(-1)


def _lowest(x):
    return -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min


def _sum(x, inside):
    return (x if inside is None else torch.where(inside, x, 0)).sum(-1)


def _slide(x, n, combine, places, inside):
    """Each window combined, one dimension after the other."""
    for axis, (place, known) in enumerate(zip(places, inside, strict=True), -n):
        x = x.movedim(axis, -1)
        if isinstance(place, torch.Tensor):
            x = combine(_read(x, place, known), known)
        else:
            x = combine(x, None).unsqueeze(-1)
        x = x.movedim(-1, axis)
    return x


def _read(x, place, inside):
    """The last dimension at the places of each window."""
    return x[..., place if inside is None else place.clamp(0).clamp(max=x.shape[-1] - 1)]


def _highest_with_indices(x, n, places, inside):
    """The highest element of each window, and the first place in the flattened planes that has it."""
    sizes, lead = x.shape[-n:], x.dim() - n
    place = torch.zeros((), dtype=torch.int64, device=x.device)
    seen = torch.ones((), dtype=torch.bool, device=x.device)
    for size, where, known in zip(sizes, places, inside, strict=True):
        if not isinstance(where, torch.Tensor):
            where = torch.arange(size, device=x.device).unsqueeze(0)
        x = _read(x.movedim(lead, -1), where, known)  # (..., sizes to come, results and windows so far)
        place = place.unsqueeze(-1).unsqueeze(-1) * size + where
        seen = seen.unsqueeze(-1).unsqueeze(-1) & (where >= 0 if known is None else known)
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
    flat = lambda v: v.permute(order).flatten(n)  # noqa: E731
    x = x.permute([*range(lead), *(lead + d for d in order)]).flatten(lead + n)
    place, seen = flat(place), flat(seen)
    x = torch.where(seen, x, _lowest(x))
    best = x.amax(-1)
    hit = x == best.unsqueeze(-1)
    if x.dtype.is_floating_point:
        hit = hit | x.isnan()
    return best, torch.where(hit & seen, place, math.prod(sizes)).amin(-1)
