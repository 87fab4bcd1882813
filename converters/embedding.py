import math

import torch.nn.functional as F

from torch2rt.vocabulary import Context, check, composite, converter, gather, is_traced, torch


@composite(F.embedding)
def never_renormed(input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
    check(max_norm is None, f"{max_norm=} writes to the weight, which an engine cannot")
    return NotImplemented


@converter(F.embedding, limits="no max_norm")
def embedding(
    ctx: Context, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    """`padding_idx`, `scale_grad_by_freq` and `sparse` are about gradients."""
    check(max_norm is None, f"{max_norm=} writes to the weight, which an engine cannot")
    return gather(ctx, weight, input, 0)


@converter(torch.embedding)
def aten_embedding(ctx: Context, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return gather(ctx, weight, indices, 0)


@composite(F.embedding_bag)
def embedding_bag(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    """One reduction over the samples (second to last dimension) of all bags, with a mask of what samples a bag has."""
    check(max_norm is None, f"{max_norm=} writes to the weight, which an engine cannot")
    check(mode == "sum" or per_sample_weights is None, f"per_sample_weights with {mode=}")
    keep = None if input.dim() == 2 else in_bag(input, offsets, include_last_offset, mode == "max")
    if padding_idx is not None:
        real = input != padding_idx % weight.shape[0]
        keep = real if keep is None else keep & real
    wide = torch.promote_types(weight.dtype, torch.float32)
    samples = F.embedding(input, weight).to(wide)
    finite = not is_traced(weight) and bool(weight.isfinite().all())
    if per_sample_weights is not None:
        samples, finite = samples * per_sample_weights.unsqueeze(-1), False
    if keep is None:
        result = {"sum": samples.sum, "mean": samples.mean, "max": samples.amax}[mode](-2)
    elif mode == "max":
        most = torch.where(keep.unsqueeze(-1), samples, -math.inf).amax(-2)
        result = torch.where(keep.any(-1, keepdim=True), most, 0.0)
    else:
        if finite and samples.dim() == 2:  # bags of all lengths at once; an infinity would not survive the mask's zeros
            with torch.autocast(samples.device.type, enabled=False):
                result = keep.to(wide) @ samples
        else:
            result = torch.where(keep.unsqueeze(-1), samples, 0.0).sum(-2)
        if mode == "mean":
            result = result / keep.to(wide).sum(-1, keepdim=True).clamp(min=1)
    return result.to(weight.dtype)


@composite(torch.embedding_bag)
def embedding_bag_and_bags(
    weight,
    indices,
    offsets,
    scale_grad_by_freq=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    padding_idx = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return torch._embedding_bag(
        weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx
    )


def _bags(operator):
    """The operator that `F.embedding_bag` calls; what it says beside the bags is for gradients."""

    @composite(operator)
    def bags(
        weight,
        indices,
        offsets,
        scale_grad_by_freq=False,
        mode=0,
        sparse=False,
        per_sample_weights=None,
        include_last_offset=False,
        padding_idx=-1,
    ):
        result = embedding_bag(
            indices,
            weight,
            offsets,
            mode=("sum", "mean", "max")[mode],
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=None if padding_idx < 0 else padding_idx,
        )
        how = (scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx)
        return (result, *operator(weight, indices, offsets, *how)[1:])


for _operator in (torch._embedding_bag, torch._embedding_bag_forward_only):
    _bags(_operator)


@converter(torch._embedding_bag, torch._embedding_bag_forward_only, limits="the bags alone")
def no_bags(ctx: Context, *args, **kwargs):
    return (None,) * len(ctx.out)


def in_bag(input, offsets, include_last_offset, to_the_end):
    """Which samples (columns) are in which bag (rows): those from the bag's offset up to the next bag's.

    torch's maximum takes the last bag to the end of the samples, whatever the last offset says.
    """
    ends = offsets[1:]
    if not include_last_offset or to_the_end:
        ends = torch.cat([ends[:-1] if include_last_offset else ends, torch.full_like(offsets[:1], input.shape[0])])
    position = torch.arange(input.shape[0], device=offsets.device)
    return (position >= offsets[: ends.shape[0]].unsqueeze(1)) & (position < ends.unsqueeze(1))
