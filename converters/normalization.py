import torch.nn.functional as F

from torch2rt.vocabulary import (
    Context,
    add,
    add_normalization,
    axes,
    cast,
    check,
    composite,
    constant,
    converter,
    dims,
    div,
    dtype_of,
    elementwise,
    fusion,
    is_symbolic,
    is_traced,
    materialize,
    mul,
    reduce,
    reshape,
    scales_groups_by_channel,
    torch,
    trt,
    unary,
)

EW, Reduce, Unary = trt.ElementWiseOperation, trt.ReduceOperation, trt.UnaryOperation
aten = torch.ops.aten

TRAINING = "it updates running statistics; call .eval() on the module before converting it"


# By the statistics of the input ---------------------------------------------------------------------------------------


@converter(torch.layer_norm)
def layer_norm(ctx: Context, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    sizes = dims(ctx, input)
    first = len(sizes) - len(normalized_shape)
    return _normalize(ctx, input, range(first, len(sizes)), (*[1] * first, *sizes[first:]), weight, bias, eps)


@composite(torch.native_layer_norm, aten.native_layer_norm, aten.native_layer_norm.default)
def layer_norm_and_statistics(input, normalized_shape, weight, bias, eps):
    spread, mean = _statistics(input, [-1 - d for d in range(len(normalized_shape))], eps, True, weight, bias)
    return torch.layer_norm(input, normalized_shape, weight, bias, eps), mean, spread


def _statistics(x, dim, eps, keepdim, *affine):
    """What is divided by, as a factor, and the mean: in float32, but on the CPU in the type of the parameters."""
    variance, mean = torch.var_mean(x.float(), dim, correction=0, keepdim=keepdim)
    dtype = next(v.dtype for v in (*affine, x) if v is not None) if x.device.type == "cpu" else torch.float32
    return (variance + eps).rsqrt().to(dtype), mean.to(dtype)


@converter(torch.group_norm)
def group_norm(ctx: Context, input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """The layer splits channels into two groups or more; one group is a normalization that includes them."""
    sizes = dims(ctx, input)
    x = reshape(ctx, input, (*sizes, 1)) if len(sizes) == 2 else input
    spatial, shape = range(2, len(dims(ctx, x))), (1, sizes[1], *[1] * (len(dims(ctx, x)) - 2))
    if num_groups == 1:
        x = _normalize(ctx, x, [1, *spatial], shape, weight, bias, eps)
    elif scales_groups_by_channel():
        x = _normalize(ctx, x, spatial, shape, weight, bias, eps, num_groups)
    else:
        x = _normalize(ctx, x, spatial, (1, num_groups, *shape[2:]), None, None, eps, num_groups)
        x = _affine(ctx, x, weight, bias, shape)
    return reshape(ctx, x, sizes)


@composite(torch.native_group_norm, aten.native_group_norm, aten.native_group_norm.default)
def group_norm_and_statistics(input, weight, bias, N, C, HxW, group, eps):
    spread, mean = _statistics(input.reshape(N, group, C // group * HxW), -1, eps, False, weight, bias)
    kind = input.dtype if input.is_cuda else mean.dtype  # as torch's two kernels have it
    return torch.group_norm(input, group, weight, bias, eps), mean.to(kind), spread.to(kind)


@converter(torch.instance_norm, limits="does not update running statistics")
def instance_norm(
    ctx: Context, input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
):
    if not use_input_stats:
        return _by_running(ctx, input, weight, bias, running_mean, running_var, eps)
    check(running_mean is None and running_var is None, TRAINING)
    sizes = dims(ctx, input)
    return _normalize(ctx, input, range(2, len(sizes)), (1, sizes[1], *[1] * (len(sizes) - 2)), weight, bias, eps)


@converter(torch.rms_norm)
def rms_norm(ctx: Context, input, normalized_shape, weight=None, eps=None):
    """In float32, as torch does; its default `eps` is that of float32 for half precision too."""
    x = cast(ctx, input, torch.float32)
    ndim = len(dims(ctx, x))
    over = list(range(ndim - len(normalized_shape), ndim))
    mean = reduce(ctx, Reduce.AVG, mul(ctx, x, x), over, keepdim=True)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    result = div(ctx, x, unary(ctx, Unary.SQRT, add(ctx, mean, eps)))
    result = result if weight is None else mul(ctx, result, weight)
    return cast(ctx, result, dtype_of(input))


@converter(torch._fused_rms_norm, limits="rstd is not a result of the layer")
def fused_rms_norm(ctx: Context, input, normalized_shape, weight, eps):
    ctx.out = ctx.out[0]
    return rms_norm(ctx, input, normalized_shape, weight, eps), None


def _normalize(ctx: Context, x, over, shape, weight, bias, eps, groups=1):
    """One normalization layer. TensorRT wants scale and bias, in the data's type and rank: `shape` is theirs."""
    x = materialize(ctx, x)
    if weight is None and bias is None and groups == 1:
        shape = [1] * len(shape)
    check(not any(map(is_symbolic, shape)), "the normalised sizes must be static")
    scale, shift = (
        _in_shape(ctx, torch.full(tuple(shape), default) if value is None else value, dtype_of(x), shape)
        for value, default in ((weight, 1.0), (bias, 0.0))
    )
    layer = add_normalization(ctx.network, x, scale, shift, axes(list(over), len(shape)))
    layer.epsilon = eps
    layer.num_groups = groups
    return ctx.track(layer.get_output(0), dims(ctx, x))


def _in_shape(ctx: Context, x, dtype, shape):
    if isinstance(x, torch.Tensor):
        return constant(ctx, x.to(dtype).reshape(tuple(shape)))
    return reshape(ctx, cast(ctx, x, dtype), shape)


def _affine(ctx: Context, x, weight, bias, shape):
    for op, value in ((EW.PROD, weight), (EW.SUM, bias)):
        x = x if value is None else elementwise(ctx, op, x, _in_shape(ctx, value, dtype_of(x), shape))
    return x


# By running statistics ------------------------------------------------------------------------------------------------


@converter(torch.batch_norm, limits="does not update running statistics")
def batch_norm(
    ctx: Context, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True
):
    if not training:
        return _by_running(ctx, input, weight, bias, running_mean, running_var, eps)
    check(running_mean is None and running_var is None, TRAINING)
    ndim = len(dims(ctx, input))
    shape = (1, dims(ctx, input)[1], *[1] * (ndim - 2))
    return _normalize(ctx, input, [d for d in range(ndim) if d != 1], shape, weight, bias, eps)


@composite(torch.batch_norm)
def batch_norm_with_state(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    """In training mode with running statistics that are inputs of the graph: it writes to them."""
    if not training or not is_traced(running_mean) or not is_traced(running_var):
        return NotImplemented
    over = [dim for dim in range(input.dim()) if dim != 1]
    for running, batch in ((running_mean, input.mean(over)), (running_var, input.var(over, unbiased=True))):
        running.copy_(running * (1 - momentum) + batch.to(running.dtype) * momentum)
    return torch.batch_norm(input, weight, bias, None, None, training, momentum, eps, cudnn_enabled)


_PRODUCTS = {  # and which axis of the weight is that of the channels
    torch.conv1d: 0,
    torch.conv2d: 0,
    torch.conv3d: 0,
    F.linear: 0,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 1,
    torch.conv_transpose3d: 1,
}


@fusion(torch.batch_norm)
def into_product(fuser, node):
    """Running statistics and affine parameters as part of the weight and bias of the call before, if it is only for it.

    That is left alone where the weight's type cannot hold the result as exactly as it holds the weight.
    """
    norm = fuser.arguments(node)
    before, names = norm["input"], ("weight", "bias", "running_mean", "running_var")
    values = [fuser.constant(norm[name]) for name in names]
    if norm["training"] or before.target not in _PRODUCTS or len(before.users) > 1 or None in values[2:]:
        return
    product, axis = fuser.arguments(before), _PRODUCTS[before.target]
    weight, bias = fuser.constant(product["weight"]), fuser.constant(product["bias"])
    computed = any(
        given is not None and value is None
        for given, value in ((norm["weight"], values[0]), (norm["bias"], values[1]), (product["bias"], bias))
    )
    if weight is None or computed or node.meta["val"].dim() != weight.dim():  # the channels are elsewhere
        return
    if _is_pointwise(weight) and any(_takes_long(fuser, user, weight) for user in node.users):
        return
    scale, shift = _as_affine(*values, norm["eps"])
    shift = shift if bias is None else shift + bias.double() * scale
    dtype, groups = weight.dtype, product.get("groups", 1) if axis else 1
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    channels = scale.float().reshape(groups, *[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
    shift, others = shift.to(dtype), [d for d in range(parts.dim()) if d not in (0, axis + 1)]
    largest = torch.linalg.vector_norm(parts, torch.inf, others, dtype=torch.float32).double().flatten()
    if shift.isfinite().all() and _holds(dtype, largest, scale):
        scaled = torch.mul(parts, channels, out=torch.empty_like(parts))
        scaled = scaled.reshape(weight.shape)
        fuser.note(scaled, product["weight"], "folded with batch norm")
        fuser.note(shift, norm["bias"] if bias is None else product["bias"], "folded with batch norm")
        fuser.replace(node, before, weight=scaled, bias=shift)


def _holds(dtype, largest, scale):
    """Whether numbers up to `largest` times `scale`, each for a channel, are neither too large nor too small."""
    product = (largest * scale).abs()
    ends = [(torch.finfo(dtype), product), (torch.finfo(torch.float32), scale.abs())]
    return all(((x <= info.max) & ((x >= info.tiny) | (x == 0))).all() for info, x in ends)


def _is_pointwise(weight):
    return weight is not None and weight.dim() > 2 and set(weight.shape[2:]) == {1}


def _takes_long(fuser, user, weight):
    """Whether TensorRT's builder would work on two pointwise convolutions in a row for seconds.

    It makes them one, for which TensorRT for RTX 1.4 multiplies their kernels at 20 million products a second. It does
    not where a scale layer stands between them.
    """
    if _PRODUCTS.get(user.target) != 0 or user.target is F.linear:
        return False
    after = fuser.constant(fuser.arguments(user)["weight"])
    return _is_pointwise(after) and after.shape[1] == weight.shape[0] and after.shape[0] * weight.numel() > 2**26


@converter(torch.native_batch_norm, limits="does not update running statistics")
def native_batch_norm(ctx: Context, input, weight, bias, running_mean, running_var, training, momentum, eps):
    return batch_norm(ctx, input, weight, bias, running_mean, running_var, training, momentum, eps), None, None


@composite(torch._native_batch_norm_legit)
def native_batch_norm_legit(
    input, weight, bias, running_mean=None, running_var=None, training=False, momentum=0.1, eps=1e-5
):
    """It is said to write to the running statistics, which it does in training."""
    check(not training or running_mean is None, TRAINING)
    return torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


@composite(aten._native_batch_norm_legit_functional)
def native_batch_norm_legit_functional(input, weight, bias, running_mean, running_var, training, momentum, eps):
    check(not training, TRAINING)
    results = torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return (*results, running_mean.clone(), running_var.clone())


@composite(aten._batch_norm_with_update, aten._batch_norm_with_update_functional)
def batch_norm_with_update(input, weight, bias, running_mean, running_var, momentum, eps):
    check(False, TRAINING)


@composite(aten._batch_norm_no_update)
def batch_norm_no_update(input, weight, bias, running_mean, running_var, momentum, eps):
    training = running_mean is None
    results = torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return (*results, input.new_empty(0, dtype=torch.uint8))


@composite(torch.cudnn_batch_norm, torch.miopen_batch_norm)
def batch_norm_of_a_gpu(input, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon):
    check(not training or running_mean is None, TRAINING)
    momentum = exponential_average_factor
    results = torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, epsilon)
    return (*results, input.new_empty(0, dtype=torch.uint8))


@converter(torch.ops.aten._native_batch_norm_legit_no_training)
def native_batch_norm_legit_no_training(ctx: Context, input, weight, bias, running_mean, running_var, momentum, eps):
    return _by_running(ctx, input, weight, bias, running_mean, running_var, eps), None, None


def _by_running(ctx: Context, x, weight, bias, mean, var, eps):
    """Statistics and affine parameters as one scale layer."""
    check(mean is not None and var is not None, "there are no running statistics to normalise by")
    if any(isinstance(v, trt.ITensor) for v in (weight, bias, mean, var)):
        return _by_computed(ctx, x, weight, bias, mean, var, eps)
    scale, shift = _as_affine(weight, bias, mean, var, eps)
    dtype, sizes = dtype_of(x), dims(ctx, x)
    if not all(v.to(dtype).isfinite().all() for v in (scale, shift)):
        x = cast(ctx, x, torch.float32)
    scale, shift = (v.to(dtype_of(x)) for v in (scale, shift))
    if len(sizes) < 3:
        return cast(ctx, _affine(ctx, x, scale, shift, (1, sizes[1])), dtype)
    weights = ctx.weights(shift, "shift"), ctx.weights(scale, "scale"), trt.Weights(x.dtype)
    layer = ctx.network.add_scale_nd(x, trt.ScaleMode.CHANNEL, *weights, 1)
    return cast(ctx, ctx.track(layer.get_output(0), sizes), dtype)


def _as_affine(weight, bias, mean, var, eps):
    """A factor and a summand for each channel, in float64."""
    scale = (var.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    return scale, (0 if bias is None else bias.double()) - mean.double() * scale


def _by_computed(ctx: Context, x, weight, bias, mean, var, eps):
    """The same, of statistics and parameters that are not all constant, in float32 as torch does."""
    var = cast(ctx, var, torch.float32)
    scale = unary(ctx, Unary.RECIP, unary(ctx, Unary.SQRT, add(ctx, var, eps)))
    scale = scale if weight is None else mul(ctx, scale, weight)
    shift = unary(ctx, Unary.NEG, mul(ctx, scale, mean))
    shift = shift if bias is None else add(ctx, shift, bias)
    sizes = dims(ctx, x)
    shape = (1, sizes[1], *[1] * (len(sizes) - 2))
    return cast(ctx, _affine(ctx, cast(ctx, x, torch.float32), scale, shift, shape), dtype_of(x))
