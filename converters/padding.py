import torch.nn.functional as F

from torch2rt.vocabulary import Context, check, converter, dims, is_symbolic, require, same_size, slice_nd, torch, trt

Mode, _nn = trt.SampleMode, torch._C._nn

MODES = {"constant": Mode.FILL, "reflect": Mode.REFLECT, "replicate": Mode.CLAMP, "circular": Mode.WRAP}


@converter(F.pad, _nn.pad, limits="sizes that the mode can pad")
def pad_op(ctx: Context, input, pad, mode="constant", value=None):
    """A slice that starts before the first element and ends behind the last; negative amounts crop."""
    check(mode in MODES, f"{mode=} is none of {', '.join(MODES)}")
    n = len(dims(ctx, input))
    pairs = [(0, 0)] * (n - len(pad) // 2) + list(zip(pad[-2::-2], pad[::-2], strict=True))
    if mode == "circular":  # what a negative amount crops is not repeated at the other end
        input = _slice(ctx, input, [(_lower(before), _lower(after)) for before, after in pairs])
        pairs = [(before - _lower(before), after - _lower(after)) for before, after in pairs]
    if not any(is_symbolic(amount) or amount > 0 for pair in pairs for amount in pair):
        return _slice(ctx, input, pairs)
    if mode in ("reflect", "circular"):
        for size, pair in zip(dims(ctx, input), pairs, strict=True):
            for amount in pair:
                enough = size > amount if mode == "reflect" else size >= amount
                require(
                    ctx, enough, f"mode='{mode}' pads a dimension by {amount}, for which it is too small", at_calls=True
                )
    return _slice(ctx, input, pairs, MODES[mode], value if mode == "constant" else None)


def _lower(amount):
    """The part of an amount that crops."""
    return torch.sym_min(amount, 0)


def _slice(ctx: Context, x, pairs, mode=None, fill=None):
    sizes = [size + before + after for size, (before, after) in zip(dims(ctx, x), pairs, strict=True)]
    for size, (before, after) in zip(dims(ctx, x), pairs, strict=True):
        require(ctx, size + _lower(before) + _lower(after) >= 0, "more is cropped than there is", at_calls=True)
    fill = None if fill is None or same_size(fill, 0) else fill  # zeros come for free
    return slice_nd(ctx, x, [-before for before, _ in pairs], sizes, [1] * len(pairs), mode, fill)


@converter(torch.constant_pad_nd)
def constant_pad_nd(ctx: Context, input, pad, value=0):
    return pad_op(ctx, input, pad, value=value)


@converter(_nn.reflection_pad1d, _nn.reflection_pad2d, _nn.reflection_pad3d)
def reflection_pad(ctx: Context, input, padding):
    return pad_op(ctx, input, padding, "reflect")


@converter(_nn.replication_pad1d, _nn.replication_pad2d, _nn.replication_pad3d)
def replication_pad(ctx: Context, input, padding):
    return pad_op(ctx, input, padding, "replicate")


@converter(_nn._pad_circular)
def pad_circular(ctx: Context, input, pad):
    return pad_op(ctx, input, pad, "circular")
