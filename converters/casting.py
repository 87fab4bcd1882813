from torch2rt.vocabulary import Context, cast, check, composite, converter, torch

Tensor, aten, prims = torch.Tensor, torch.ops.aten, torch.ops.prims


@converter(
    torch.clone,
    Tensor.clone,
    torch.detach,
    Tensor.detach,
    Tensor.detach_,
    Tensor.contiguous,
    Tensor.requires_grad_,
    Tensor.pin_memory,
    aten.alias,
    aten.lift,
    aten.lift_fresh,
    prims.view_of,
    prims.clone,
    *filter(None, [getattr(prims, "copy_strided", None)]),
)
def same_value(ctx: Context, input, *args, **kwargs):
    """An engine's values have no memory format, gradient or identity."""
    return input


@converter(
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.double,
    Tensor.long,
    Tensor.int,
    Tensor.short,
    Tensor.char,
    Tensor.byte,
    Tensor.bool,
    Tensor.cpu,
    Tensor.cuda,
    aten._to_copy,
    prims.convert_element_type,
    limits="to the engine's own device",
)
def converted(ctx: Context, input, *args, **kwargs):
    """Into the recorded dtype, which is what all spellings come down to."""
    check(ctx.out.device == ctx.device, f"an engine works on one device, and this moves data to {ctx.out.device}")
    return cast(ctx, input, ctx.out.dtype)


@composite(Tensor.__deepcopy__)
def deepcopy(input, memo):
    return memo.setdefault(id(input), input.clone())
