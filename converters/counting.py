"""What other libraries find by a search or in a table, found by comparing everything with everything and counting."""

import math

from torch2rt.vocabulary import check, composite, is_symbolic, is_traced, torch

Tensor = torch.Tensor
LIMIT = 2**28  # comparisons


def limited(*sizes):
    product = math.prod(size for size in sizes if not is_symbolic(size))
    check(product <= LIMIT, f"comparing all with all takes {product} comparisons, where {LIMIT} is the limit")


@composite(torch.searchsorted)
def searchsorted(sorted_sequence, input, *, out_int32=False, right=False, side=None, sorter=None):
    """As many elements come before as are below the value, and with `right` equal to it; all before a NaN."""
    check(side in (None, "left", "right"), f"{side=} is neither 'left' nor 'right'")
    check(side != "left" or not right, "side and right say opposite things")
    edges = sorted_sequence if sorter is None else sorted_sequence.gather(-1, sorter)
    value = input.unsqueeze(-1) if isinstance(input, Tensor) else torch.tensor([input], device=edges.device)
    limited(*value.shape, edges.shape[-1])
    edges = edges.unsqueeze(-2) if edges.dim() > 1 else edges
    after = edges > value if right or side == "right" else edges >= value
    return (~after).sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


@composite(torch.bucketize)
def bucketize(input, boundaries, *, out_int32=False, right=False):
    return torch.searchsorted(boundaries, input, out_int32=out_int32, right=right)


@composite(torch.isin)
def isin(elements, test_elements, *, assume_unique=False, invert=False):
    limited(*(size for x in (elements, test_elements) if isinstance(x, Tensor) for size in x.shape))
    if isinstance(elements, Tensor) and isinstance(test_elements, Tensor):
        found = (elements.unsqueeze(-1) == test_elements.reshape(-1)).any(-1)
    else:
        found = elements == test_elements
        found = found if isinstance(elements, Tensor) else found.any()
    return ~found if invert else found


@composite(torch.histc, Tensor.histc)
def histc(input, bins=100, min=0, max=0):
    """Without bounds, the bins reach from the smallest element to the largest, or by 1 beyond the only one."""
    x = input.reshape(-1)
    limited(*x.shape, bins)
    if not is_traced(min) and not is_traced(max) and min == max:
        min, max = x.min(), x.max()
        alone = min == max
        min, max = torch.where(alone, min - 1, min), torch.where(alone, max + 1, max)
    place = ((x - min) * bins / (max - min)).floor().clamp(max=bins - 1)
    place = torch.where((x >= min) & (x <= max), place, -1.0)
    return (place == torch.arange(bins, device=x.device).unsqueeze(-1)).sum(-1).to(input.dtype)


@composite(torch.repeat_interleave, Tensor.repeat_interleave)
def repeat_interleave(input, repeats=None, dim=None, *, output_size=None):
    """Each place of the result takes the element after as many as have all their copies before it."""
    own = repeats is None  # repeat_interleave(repeats) gives positions
    repeats = input if own else repeats
    if not isinstance(repeats, Tensor) or not is_traced(repeats) or output_size is None:
        return NotImplemented
    if not own and dim is None:
        input, dim = input.reshape(-1), 0
    repeats = repeats if own else repeats.expand(input.shape[dim])
    ends, place = repeats.cumsum(0), torch.arange(output_size, device=repeats.device)
    index = torch.searchsorted(ends, place, right=True)
    return index.to(repeats.dtype) if own else input.index_select(dim, index)


@composite(torch.nonzero_static, Tensor.nonzero_static)
def nonzero_static(input, *, size, fill_value=-1):
    """The k-th element that is not 0 stands behind as many as have fewer such elements up to them."""
    some = input.dim() > 0 and all(is_symbolic(n) or n > 0 for n in input.shape)
    check(some, "it has no elements or no coordinates")
    found = input.bool().reshape(-1).cumsum(0)
    limited(*found.shape, size)
    k = torch.arange(1, size + 1, device=input.device)
    place = (found < k.unsqueeze(-1)).sum(-1)
    coordinates = []
    for n in reversed(input.shape):
        coordinates.append(place % n)
        place = place // n
    return torch.where((place == 0).unsqueeze(-1), torch.stack(coordinates[::-1], -1), fill_value)
