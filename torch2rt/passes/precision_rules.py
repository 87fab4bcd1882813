"""Which torch functions compute in a narrow type, in the spirit of `torch.amp`: the table of `passes/precision.py`.

Every function that is not named here computes in float32: exponentials, powers, logarithms, sums, norms, softmax, and
all that nobody has looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from torch2rt.passes.quantization.quantized import attention_of_quantized, fake_quantize, fake_quantize_fp8, scaled

# Products gain most from a narrow type, and their kernels add in float32. A table of embeddings is read, not computed.
LOW = frozenset(
    """
        linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm mv addmv einsum bilinear conv1d conv2d conv3d
        conv_transpose1d conv_transpose2d conv_transpose3d convolution scaled_dot_product_attention recurrent embedding
        fake_quantize attention_of_quantized
    """.split()
)
# Arithmetic on several tensors: in the widest of their types. Integers among them may be too large for a narrow type.
ARITHMETIC = frozenset(
    """
        add sub subtract rsub mul multiply div divide true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__
        __truediv__ __rtruediv__ maximum minimum where masked_fill clamp clip clamp_min clamp_max lerp addcmul addcdiv
    """.split()
)
# One tensor in, the same numbers or bounded ones out: in the type of the tensor.
FOLLOW = frozenset(
    """
        view reshape permute transpose t mT T flatten unflatten ravel squeeze unsqueeze expand expand_as repeat tile
        contiguous clone detach alias __getitem__ select narrow chunk split split_with_sizes tensor_split unbind
        index_select gather take_along_dim cat concat concatenate stack hstack vstack flip roll pad movedim moveaxis pad
        swapaxes swapdims unfold view_as reshape_as diagonal tril triu pixel_shuffle pixel_unshuffle channel_shuffle
        repeat_interleave broadcast_to narrow_copy slice
        relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid
        hardshrink softsign threshold glu dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d
        neg negative abs absolute
        layer_norm group_norm instance_norm rms_norm batch_norm
        scaled
        mean max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
        avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d amax amin interpolate
    """.split()
)
# What stays float32 by itself, and can be forced into a narrow type, as its result has the type of its arguments.
FORCEABLE = frozenset(
    """
        softmax log_softmax exp exp2 expm1 log log2 log10 log1p pow sqrt rsqrt reciprocal square sum prod cumsum var std
        norm vector_norm cosine_similarity softplus logsigmoid sin cos tan erf logsumexp grid_sample normalize
        pairwise_distance softmin softshrink
    """.split()
)
CONVERSIONS = frozenset("to type float half bfloat16 double long int short char byte bool _to_copy".split())
# Arguments that stay in float32 beside narrow ones: torch and the converters take them, and they lose nothing so.
WIDE_ARGUMENTS = {
    "batch_norm": frozenset({"weight", "bias", "running_mean", "running_var"}),
    "scaled_dot_product_attention": frozenset({"attn_mask"}),
    "attention_of_quantized": frozenset({"attn_mask"}),
    "scaled": frozenset({"scale"}),
}
# What is added to a product: that it vanishes is no loss beside results that are rounded by more.
ADDENDS = {
    **dict.fromkeys("linear bilinear layer_norm group_norm scaled".split(), "bias"),
    **dict.fromkeys((word for word in LOW if word.startswith("conv")), "bias"),
    **dict.fromkeys("addmm baddbmm addbmm addmv".split(), "input"),
}
# Products that may be computed in the type of a cast behind them (`quirks.computes_lone_products_low`).
PRODUCTS = LOW - set("scaled_dot_product_attention attention_of_quantized recurrent embedding fake_quantize".split())

_OWNERS = (torch, torch.Tensor, torch.nn.functional, torch._C._nn, torch.special, torch.linalg)


@functools.cache
def _named() -> dict[Any, str]:
    """torch's own callables by what they are called in the table."""
    found: dict[Any, str] = {}
    for word in sorted(LOW | ARITHMETIC | FOLLOW | FORCEABLE | CONVERSIONS):
        for owner in _OWNERS:
            if callable(target := getattr(owner, word, None)):
                found.setdefault(target, word)
        if (operator := getattr(torch.ops.aten, word, None)) is not None:
            found.setdefault(operator, word)
    return found


def name_of(target: Any) -> str:
    """What a callable is called in the table; "" for one that is not torch's own, whatever its name is."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if target in (fake_quantize, fake_quantize_fp8):
        return "fake_quantize"
    if target in (scaled, attention_of_quantized):
        return target.__name__
    if getattr(target, "__module__", "") == "torch2rt.converters.recurrence":
        return "recurrent"
    try:
        return _named().get(target, "")
    except TypeError:  # not hashable
        return ""


def spellings(target: Any) -> Iterator[Any]:
    """The callables that a user may mean by one: `torch.add` stands for `torch.Tensor.add` and ATen's operator, too."""
    yield target
    word = name_of(target)
    yield from (other for other, name in _named().items() if word and name == word)
