import functools
import math

import torch.nn.functional as F
from torch2rt.converters.kernels import activated

from torch2rt.vocabulary import (
    Context,
    add,
    add_attention,
    attention_of_quantized,
    by_schema,
    cast,
    check,
    composite,
    converter,
    dims,
    dtype_of,
    expand,
    fuses_attention,
    fusion,
    has_attention,
    iota,
    is_symbolic,
    is_traced,
    less,
    materialize,
    matmul,
    mul,
    prefers_attention_layer,
    quantized_and_back,
    reshape,
    same_size,
    select,
    torch,
)

aten = torch.ops.aten

LOWEST = {torch.float16: -3e4, torch.bfloat16: -3e38}


@composite(F.scaled_dot_product_attention)
def with_mask(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """What a mask needs around the attention: a query that may attend to no key gets 0, where a softmax gives NaN."""
    check(key.shape[-2] == value.shape[-2], f"{key.shape[-2]} keys for {value.shape[-2]} values")
    if has_symbolic_scale := is_symbolic(
        scale
    ):  # such as log(tokens), of which torch's kernel would make a plain number
        query, scale = query * scale, 1.0
    options, device = {"scale": scale, "enable_gqa": enable_gqa}, query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value, attn_mask = (lowered(x, device) for x in (query, key, value, attn_mask))
        with torch.autocast(device, enabled=False):
            return attended(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is None and not has_symbolic_scale:
        return NotImplemented
    return attended(query, key, value, attn_mask, dropout_p, is_causal, **options)


def lowered(x, device):
    """A tensor in the dtype that autocast has for calls like this."""
    casts = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def attended(query, key, value, attn_mask, dropout_p, is_causal, **options):
    if attn_mask is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask.dtype is torch.bool:
        seen = attn_mask.any(-1, keepdim=True)
    else:
        most = attn_mask.amax(-1, keepdim=True)
        seen = most > -math.inf
        if query.dtype is torch.float16:  # a row of the lowest half must neither overflow nor swallow the scores
            attn_mask = attn_mask - torch.where(most < -1e4, most.clamp(min=-65504.0), 0.0)
        if query.dtype in LOWEST:
            attn_mask = attn_mask.clamp(min=LOWEST[query.dtype])
    result = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if not is_traced(seen) and seen.all():
        return result
    return torch.where(seen, result, 0.0)


def _in_kernels(operator):
    """The operator that `F.scaled_dot_product_attention` runs as a kernel; its other results are for gradients."""

    @composite(operator)
    def attention(query, key, value, *args, **kwargs):
        given = by_schema(operator.default, _ATTENTION, (query, key, value, *args), kwargs)[1]
        mask = given.get("attn_mask", given.get("attn_bias"))
        check(given.get("dropout_mask") is None, "a dropout mask is for training")
        grouped = len(key.shape) > 3 and not same_size(query.shape[-3], key.shape[-3])
        result = F.scaled_dot_product_attention(
            query, key, value, mask, given["dropout_p"], given["is_causal"], scale=given["scale"], enable_gqa=grouped
        )
        return (result, *operator(query, key, value, *args, **kwargs)[1:])


_ATTENTION = """
    query key value attn_mask attn_bias compute_log_sumexp dropout_p is_causal dropout_mask return_debug_mask
    scale
""".split()
_KERNELS = [
    getattr(aten, f"_scaled_dot_product_{name}")
    for name in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math",
    )
]
for _operator in _KERNELS:
    _in_kernels(_operator)


@converter(*_KERNELS, limits="the attention alone")
def no_statistics(ctx: Context, *args, **kwargs):
    return (None,) * len(ctx.out)


@fusion(torch.where)
def zeros_by_value(fuser, node):
    """Queries that see no key get 0 from values that are 0, where all queries see the same keys: no kernel for it.

    That needs products as attention, which give such queries the mean of all values.
    """
    chosen = fuser.arguments(node)
    seen, attention = chosen["condition"], chosen["input"]
    if not fuses_attention() or getattr(attention, "target", None) is not F.scaled_dot_product_attention:
        return
    call = fuser.arguments(attention)
    mask, value = call["attn_mask"], call["value"]
    if chosen["other"] != 0 or len(attention.users) > 1 or call["is_causal"] or fuser.constant(value) is not None:
        return
    if getattr(seen, "target", None) not in (torch.any, torch.Tensor.any) or fuser.arguments(seen)["input"] is not mask:
        return
    if fuser.arguments(seen)["dim"] not in (-1, 3) or not fuser.arguments(seen)["keepdim"]:
        return
    while getattr(mask, "target", None) is torch.Tensor.expand:
        mask = fuser.arguments(mask)["input"]
    row, own = mask.meta["val"].shape, value.meta["val"].shape
    if len(row) != 4 or len(own) != 4 or not same_size(row[2], 1) or mask.meta["val"].dtype is not torch.bool:
        return
    if any(not same_size(a, 1) and not same_size(a, b) for a, b in zip(row[:2], own[:2], strict=True)):
        return
    some = fuser.call(attention, mask, (*row[:3], 1), torch.any, mask, -1, True)
    zeroed = fuser.call(attention, value, own, torch.where, some, value, 0.0)
    fuser.replace(node, attention, value=zeroed)


@composite(F.multi_head_attention_forward)
def same_batch(query, key, value, *args, **kwargs):
    """torch reshapes the keys with the queries' batch size before it finds out that it is also their own."""
    check(query.dim() < 3 or query.shape[1] == key.shape[1], "queries and keys have different batch sizes")
    return NotImplemented


@converter(F.scaled_dot_product_attention, limits="no dropout")
def scaled_dot_product_attention(
    ctx: Context, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    check(dropout_p == 0, f"{dropout_p=} is random; call the model in eval mode or pass 0")
    dtype = ctx.out.dtype
    query, key, value = (cast(ctx, x, dtype) for x in (query, key, value))
    mask = attn_mask if attn_mask is None or dtype_of(attn_mask) is torch.bool else cast(ctx, attn_mask, dtype)
    prefers = has_attention() and prefers_attention_layer(dtype, is_causal)
    whole = prefers and fits(ctx, query, key, value, enable_gqa)
    attend = fused if whole else composed
    if scale is None:
        scale = 1 / torch.sym_sqrt(dims(ctx, query)[-1])
    if is_symbolic(scale) or scale != 1:
        # TensorRT moves a plain factor behind a product of matrices, where half precision may overflow
        query = cast(ctx, mul(ctx, query, scale, dtype if attend is fused else torch.float32), dtype)
    return reshape(ctx, attend(ctx, query, key, value, mask, is_causal, enable_gqa), ctx.out.shape)


def fits(ctx: Context, query, key, value, enable_gqa):
    """Whether TensorRT's attention layer takes tensors of these sizes."""
    q, k, v = ((1,) * (4 - len(dims(ctx, x))) + tuple(dims(ctx, x)) for x in (query, key, value))
    if not len(q) == len(k) == len(v) == 4 or not all(map(same_size, k, v)):
        return False
    heads = same_size(q[1], k[1]) or (enable_gqa and not is_symbolic(q[1]) and not is_symbolic(k[1]))
    return heads and same_size(q[0], k[0]) and same_size(q[3], k[3])


def fused(ctx: Context, query, key, value, mask, is_causal, enable_gqa):
    query, key, value = (materialize(ctx, x, None, 4) for x in (query, key, value))
    layer = add_attention(ctx.network, query, key, value, is_causal)
    if mask is not None:
        layer.mask = materialize(ctx, mask, None, 4)
        check(layer.mask is not None, "TensorRT's attention layer refuses the mask")
    return ctx.track(layer.get_output(0), dims(ctx, query))


@converter(attention_of_quantized)
def attention_layers(
    ctx: Context,
    query,
    key,
    value,
    attn_mask=None,
    is_causal=False,
    scale=None,
    format="int8",
    largest=1.0,
    tokens_first=False,
):
    dtype = ctx.out.dtype
    query, key, value = (cast(ctx, x, dtype) for x in (query, key, value))
    mask = attn_mask if attn_mask is None or dtype_of(attn_mask) is torch.bool else cast(ctx, attn_mask, dtype)
    scale = dims(ctx, query)[-1] ** -0.5 if scale is None else scale
    if scale != 1:
        query = cast(ctx, mul(ctx, query, scale, torch.float32), dtype)
    return reshape(ctx, composed(ctx, query, key, value, mask, is_causal, False, (format, largest)), ctx.out.shape)


PROBABILITIES = {"int8": (127.0, torch.int8), "fp8": (448.0, torch.float8_e4m3fn)}


def composed(ctx: Context, query, key, value, mask, is_causal, enable_gqa, format=None):
    """A product, a softmax and a product; with a mask to add, torch does the middle in float32.

    `format`: what the probabilities are rounded to, if they are, and the largest of them. TensorRT then has a kernel
    for all of it where a mask is added in the type of the values.
    """
    if enable_gqa:
        key, value = (repeat_heads(ctx, x, dims(ctx, query)[-3]) for x in (key, value))
    scores = matmul(ctx, query, key, transpose_b=True)
    dtype = dtype_of(scores)
    if is_causal:
        rows, columns = (iota(ctx, size) for size in dims(ctx, scores)[-2:])
        rows = reshape(ctx, rows, (*dims(ctx, rows), 1))
        mask = less(ctx, columns, add(ctx, rows, 1))
    if mask is not None and dtype_of(mask) is torch.bool:
        scores = select(ctx, mask, scores, torch.finfo(dtype).min, dtype)  # not -inf, which makes NaN of a full row
    elif mask is not None:
        scores = add(ctx, scores, mask, torch.float32 if format is None else dtype)
    layer = ctx.network.add_softmax(scores)
    layer.axes = 1 << (len(dims(ctx, scores)) - 1)
    probabilities = cast(ctx, ctx.track(layer.get_output(0), dims(ctx, scores)), dtype)
    if format is not None:
        most, stored_as = PROBABILITIES[format[0]]
        scale = torch.tensor(format[1] / most, dtype=torch.float32)
        probabilities = quantized_and_back(ctx, probabilities, scale, dtype, stored_as=stored_as)
    return matmul(ctx, probabilities, value)


def repeat_heads(ctx: Context, x, heads):
    """Each head of keys or values as often as there are query heads to use it."""
    *batch, own, length, size = dims(ctx, x)
    if same_size(own, heads):
        return x
    check(not is_symbolic(own) and not is_symbolic(heads), "enable_gqa with dynamic numbers of heads")
    x = expand(ctx, reshape(ctx, x, (*batch, own, 1, length, size)), (*batch, own, heads // own, length, size))
    return reshape(ctx, x, (*batch, heads, length, size))


@composite(torch._nested_tensor_from_mask_left_aligned)
def nested_tensor_from_mask_left_aligned(t, mask):
    """`nn.TransformerEncoder` asks whether it may use a nested tensor, where it may not for other reasons too."""
    return False


# The layers of `nn.Transformer`, as operators -------------------------------------------------------------------------


@composite(torch._transformer_encoder_layer_fwd)
def encoder_layer(
    src,
    embed_dim,
    num_heads,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    use_gelu,
    norm_first,
    eps,
    norm_weight_1,
    norm_bias_1,
    norm_weight_2,
    norm_bias_2,
    ffn_weight_1,
    ffn_bias_1,
    ffn_weight_2,
    ffn_bias_2,
    mask=None,
    mask_type=None,
):
    first, second = (
        functools.partial(F.layer_norm, normalized_shape=(embed_dim,), weight=weight, bias=bias, eps=eps)
        for weight, bias in ((norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2))
    )
    x = first(src) if norm_first else src
    x = (
        src
        + native_attention(
            x,
            x,
            x,
            embed_dim,
            num_heads,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            mask,
            False,
            mask_type=mask_type,
        )[0]
    )
    x = x if norm_first else first(x)
    y = F.linear(second(x) if norm_first else x, ffn_weight_1, ffn_bias_1)
    y = x + F.linear(activated(y, use_gelu), ffn_weight_2, ffn_bias_2)
    return y if norm_first else second(y)


@composite(torch._native_multi_head_attention)
def native_attention(
    query,
    key,
    value,
    embed_dim,
    num_head,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    mask=None,
    need_weights=True,
    average_attn_weights=True,
    mask_type=None,
):
    """Of (batch, tokens, features), by one weight for the three projections."""
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in projected)
    if mask is None and not need_weights:
        weights, result = None, F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q * (embed_dim // num_head) ** -0.5 @ k.mT
        weights = scores.softmax(-1) if mask is None else masked_softmax(scores, mask.bool(), -1, mask_type)
        result = weights @ v
    result = F.linear(result.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return result, None
    return result, weights.mean(1) if average_attn_weights else weights


@composite(torch._masked_softmax)
def masked_softmax(input, mask, dim=None, mask_type=None):
    """The mask says what is left out: of each query (type 0), of each sample's keys (1), or of each element."""
    check(mask.dtype is torch.bool, f"the mask is {mask.dtype}, torch takes bools")
    if mask_type == 1:
        mask = mask[:, None, None, :]
    return input.masked_fill(mask, -math.inf).softmax(input.dim() - 1 if dim is None else dim)


@composite(torch._transform_bias_rescale_qkv)
def split_into_heads(qkv, qkv_bias, num_heads):
    """Queries, keys and values from one product, as (batch, heads, tokens, features); the queries are scaled."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (qkv + qkv_bias).chunk(3, -1))
    return q * q.shape[-1] ** -0.5, k, v
