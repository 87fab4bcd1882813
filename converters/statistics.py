"""Order statistics beyond the median, from sorted values."""

import math

from torch2rt.vocabulary import check, composite, is_traced, torch

Tensor = torch.Tensor
HALF = 2**24
ONE = HALF**2  # of fixed point
# Newer versions of torch find ranks in float64, older ones in float32, where 0.4 * 5 is 2.
IN_FLOAT64 = bool(torch.quantile(torch.arange(6.0), 0.4, interpolation="higher") == 3)


@composite(torch.quantile, Tensor.quantile)
def quantile(input, q, dim=None, keepdim=False, *, interpolation="linear"):
    return quantiles(input, q, dim, keepdim, interpolation, skip=False)


@composite(torch.nanquantile, Tensor.nanquantile)
def nanquantile(input, q, dim=None, keepdim=False, *, interpolation="linear"):
    return quantiles(input, q, dim, keepdim, interpolation, skip=True)


def quantiles(input, q, dim, keepdim, interpolation, skip):
    """Sorted values at the ranks `q` * (n - 1), or between two of them; NaNs, which could go anywhere, sorted last."""
    q = q if isinstance(q, Tensor) else torch.tensor(q, dtype=torch.float32, device=input.device)
    check(input.dtype is torch.float32 and q.dtype is torch.float32, "it takes float32, and quantiles in float32")
    check(q.dim() <= 1, "the quantiles have more than one dimension")
    check(is_traced(q) or bool(((q >= 0) & (q <= 1)).all()), "the quantiles lie between 0 and 1")
    x = input.flatten() if dim is None or not input.dim() else input.movedim(dim, -1)
    missing = x.isnan()
    x = torch.where(missing, math.inf, x).sort(-1)[0]
    last = ((~missing).sum(-1, keepdim=True) - 1).clamp(min=0) if skip else x.shape[-1] - 1
    unknown = missing.all(-1, keepdim=True) if skip else missing.any(-1, keepdim=True)
    result = torch.where(unknown, math.nan, between(x, q.reshape(-1), last, interpolation)).movedim(-1, 0)
    if keepdim and dim is None:
        result = result.reshape([-1] + [1] * input.dim())
    elif keepdim and input.dim():
        result = result.unsqueeze(dim if dim < 0 else dim + 1)
    return result if q.dim() else result.squeeze(0)


def between(x, q, last, interpolation):
    """Sorted values at the ranks `q` * `last`, in fixed point: whether one is whole decides, and torch has float64."""
    low, rest = _product(q, last) if IN_FLOAT64 else _split(q * last)
    if interpolation == "lower":
        return at(x, low)
    if interpolation == "nearest":  # of two as near, the even one
        return at(x, low + (rest + low % 2 > ONE // 2))
    high = at(x, low + (rest > 0))
    if interpolation == "higher":
        return high
    check(interpolation in ("linear", "midpoint"), f"{interpolation=} is unknown")
    return torch.lerp(at(x, low), high, 0.5 if interpolation == "midpoint" else rest.float() * (1 / ONE))


def _product(q, last):
    """The whole part of a product with an int, and the rest of it times `ONE`; no number is above 2 ** 63."""
    q = torch.ceil(q * ONE).long()
    high, low = q // HALF, q % HALF
    high, low = high * last + low * last // HALF, low * last % HALF
    return high // HALF, high % HALF * HALF + low


def _split(rank):
    return rank.floor().long(), ((rank - rank.floor()) * ONE).long()


def at(x, rank):
    return x.index_select(-1, rank) if rank.dim() == 1 else x.gather(-1, rank)


@composite(torch.nanmedian, Tensor.nanmedian)
def nanmedian(input, dim=None, keepdim=False):
    """The lower one of two, and a place where it stands."""
    if not input.is_floating_point():
        return torch.median(input) if dim is None else torch.median(input, dim, keepdim)
    x, axis = (input.flatten(), 0) if dim is None or not input.dim() else (input, dim)
    missing = x.isnan()
    count = (~missing).sum(axis, keepdim=True)
    ordered = torch.where(missing, math.inf, x).sort(axis)[0]
    value = ordered.gather(axis, (count - 1).clamp(min=0) // 2)
    place = (x == value).int().argmax(axis, keepdim=True)
    result = torch.where(count == 0, math.nan, value), place
    if not keepdim or not input.dim():
        result = [side.squeeze(axis) for side in result]
    return result[0] if dim is None else torch.return_types.nanmedian(result)


@composite(torch.mode, Tensor.mode)
def mode(input, dim=-1, keepdim=False):
    """The end of the longest run of sorted values: of several modes the smallest, and a place where it stands."""
    check(not input.is_complex(), "complex numbers have no order")
    x, axis = (input, dim) if input.dim() else (input.unsqueeze(0), 0)
    ordered, places = torch.sort(x, axis)
    size = x.shape[axis]
    position = torch.arange(size, device=x.device).reshape([size if d == axis % x.dim() else 1 for d in range(x.dim())])
    start = torch.where(ordered != ordered.roll(1, axis), position, 0).cummax(axis)[0]
    end = (position - start).argmax(axis, keepdim=True)
    result = ordered.gather(axis, end), places.gather(axis, end)
    if not keepdim or not input.dim():
        result = [side.squeeze(axis) for side in result]
    return torch.return_types.mode(result)
