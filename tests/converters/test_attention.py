import copy
import math

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, Size, With, bools, case, check_case, floats, half, parametrize

from torch2rt import UnsupportedError, lower, torch2rt, trace
from torch2rt.backend.tensorrt import has_attention

sdpa = F.scaled_dot_product_attention
T = Size("T", 3, 5, 8)


def bf16(*shape):
    return Data(shape, torch.bfloat16)


def masked(fill, dtype=torch.float32, kind="float"):
    """Attention with a mask made from one bool per key, in which the last query sees nothing at all."""

    def attend(query, key, value, keep):
        keep = keep[:, None, None, :] & (torch.arange(query.shape[-2], device=query.device) < 5)[:, None]
        mask = keep if kind == "bool" else torch.where(keep, 0.0, fill).to(dtype)
        return sdpa(query, key, value, mask)

    return attend


def several(*options):
    """Attentions of one input; a number for a mask stands for one filled with it."""

    def attend(x):
        size = (x.shape[-2], x.shape[-2])
        masks = [{k: x.new_full(size, v) if k == "attn_mask" else v for k, v in one.items()} for one in options]
        return [sdpa(x, x, x, **one) for one in masks]

    return attend


def halves(*inputs):
    return [Data(shape, torch.float16) for shape in inputs]


QKV = [(B, 3, S, 8), (B, 3, S, 8), (B, 3, S, 8)]
CROSS = [(B, 3, S, 8), (B, 3, T, 8), (B, 3, T, 8)]


def kernel(name, *args, **kwargs):
    """One of the operators that the attention is on a device."""
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    return lambda q, k, v, *mask: function(q, k, v, *mask, *args, **kwargs)[0]


def with_mask(name):
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    return lambda q, k, v, mask: function(q, k, v, attn_mask=mask)[0]


CASES = [
    case(kernel("flash_attention_for_cpu", 0.0, True, scale=0.3), QKV, id="for_cpu-causal"),
    case(with_mask("flash_attention_for_cpu"), [*CROSS, (B, 1, S, T)], id="for_cpu-mask"),
    case(with_mask("attention_math"), [*CROSS, (B, 1, S, T)], id="math-mask"),
    case(kernel("attention_math", None, 0.0, True), QKV, id="math-causal"),
    case(sdpa, QKV),
    case(sdpa, CROSS),
    case(sdpa, QKV, None, 0.0, True),
    case(sdpa, CROSS, is_causal=True),
    case(sdpa, QKV, scale=0.3, is_causal=True),
    case(sdpa, QKV, scale=1.0),
    case(sdpa, QKV, scale=-0.5),
    case(sdpa, halves((B, 3, S, 80), (B, 3, S, 80), (B, 3, S, 80))),
    case(sdpa, [bf16(B, 3, S, 8), bf16(B, 3, S, 8), bf16(B, 3, S, 8)], is_causal=True),
    case(sdpa, [(B, S, 8), (B, T, 8), (B, T, 8)]),
    case(sdpa, [(B, S, 8), (B, T, 8), (B, T, 8)], is_causal=True),
    case(sdpa, [(S, 8), (T, 8), (T, 8)], is_causal=True),
    case(sdpa, [(B, 2, 3, S, 8), (B, 2, 3, T, 8), (B, 2, 3, T, 8)], is_causal=True, scale=0.5),
    case(sdpa, [(B, 3, S, 8), (B, 3, T, 8), (B, 3, T, 6)], is_causal=True),
    case(sdpa, [(B, 3, S, 8), (1, 3, T, 8), (1, 3, T, 8)]),
    case(sdpa, [(B, 3, S, 8), (T, 8), (T, 8)]),
    case(sdpa, [(B, 6, S, 8), (B, 2, T, 8), (B, 2, T, 8)], enable_gqa=True),
    case(sdpa, [(B, 6, S, 8), (B, 2, T, 8), (B, 2, T, 8)], is_causal=True, enable_gqa=True),
    case(sdpa, [(B, 6, S, 8), (B, 2, T, 8), (B, 3, T, 8)], enable_gqa=True),
    case(sdpa, [(B, 2, S, 8), (B, 2, T, 8), (B, 2, T, 5)], enable_gqa=True),
    *[
        case(several(*options), [Data((B, 3, S, 8), dtype)], id=f"one-input-{len(options)}-{dtype}")
        for options in ([{}, {"is_causal": True}], [{"attn_mask": 0.5}, {"is_causal": True}, {"scale": 0.3}])
        for dtype in (torch.float32, torch.float16)
    ],
    case(sdpa, [*CROSS, bools(S, T)], id="mask-bool-2d"),
    case(sdpa, [*CROSS, bools(B, 1, 1, T)], id="mask-bool-keys"),
    case(sdpa, [*CROSS, bools(B, 3, S, T)], id="mask-bool-full"),
    case(sdpa, [*CROSS, (S, T)], id="mask-float-2d"),
    case(sdpa, [*CROSS, (3, 1, T)], id="mask-float-heads"),
    case(sdpa, [*CROSS, (B, 1, S, T)], id="mask-float-4d"),
    case(sdpa, [*halves(*CROSS), Data((B, 1, S, T), torch.float16)], id="mask-half"),
    case(sdpa, [(B, S, 8), (B, T, 8), (B, T, 8), bools(B, S, T)], id="mask-3d"),
    case(sdpa, [(B, 2, 3, S, 8), (B, 2, 3, T, 8), (B, 2, 3, T, 8), bools(B, 1, 1, S, T)], id="mask-5d"),
    case(sdpa, [(B, 3, S, 8), (B, 3, T, 8), (B, 3, T, 6), (S, T)], scale=0.2, id="mask-composed"),
    case(masked(None, kind="bool"), [*CROSS, bools(B, T)], id="rows-bool"),
    case(masked(-math.inf), [*CROSS, bools(B, T)], id="rows-inf"),
    case(masked(-math.inf, torch.float16), [*halves(*CROSS), bools(B, T)], id="rows-half"),
    case(masked(-65504.0, torch.float16), [*halves(*CROSS), bools(B, T)], id="rows-lowest"),
    case(masked(None, kind="bool"), [(B, 3, S, 8), (B, 3, T, 8), (B, 3, T, 6), bools(B, T)], id="rows-bool-composed"),
    case(
        lambda q, k, v: sdpa(q, k, v, torch.ones(7, 5, dtype=torch.bool, device=q.device).tril(-1)),
        [(B, 3, 7, 8), (B, 3, 5, 8), (B, 3, 5, 8)],
        id="mask-constant-with-an-empty-row",
    ),
    case(
        lambda q, k, v: sdpa(q, k, v, torch.arange(35.0, device=q.device).view(7, 5) / 10),
        [(B, 3, 7, 8), (B, 3, 5, 8), (B, 3, 5, 8)],
        id="mask-constant",
    ),
    case(
        lambda q: sdpa(q, q.new_ones(1, 3, 5, 8) * 2, torch.arange(120.0, device=q.device).view(1, 3, 5, 8)),
        [(1, 3, S, 8)],
        id="constant-keys",
    ),
]


def attention(id, call, *inputs, sizes=(8, 2), **options):
    options.setdefault("batch_first", True)
    return case(With(torch.nn.MultiheadAttention(*sizes, **options), call), inputs, id=f"MultiheadAttention-{id}")


def causal(x):
    length = x.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)


SELF, OTHER = (B, S, 8), (B, T, 8)


def native(call, mask=None, kind=None):
    """A layer of `nn.Transformer` as the operator that eager torch runs."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    weights = [p.detach() + 0.1 for p in attention.parameters()]
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    parts = (layer.norm1, layer.norm2, layer.linear1, layer.linear2)
    others = [p.detach() + 0.1 for part in parts for p in part.parameters()]

    def run(x):
        given = [[t.to(x.device) for t in ts] for ts in (weights, others)]
        return call(x, *given, None if mask is None else mask.to(x.device), kind)

    return run


def attend_natively(x, weights, others, mask, kind):
    return torch._native_multi_head_attention(x, x, x, 8, 2, *weights, mask, True, kind == 1, kind)


def encode_natively(x, weights, others, mask, kind):
    return torch._transformer_encoder_layer_fwd(x, 8, 2, *weights, kind == 1, kind == 1, 1e-5, *others, mask, kind)


QUERIES = torch.tensor([[False, True, False, False, True]] * 5)
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
NATIVE = [
    case(native(attend_natively), [(B, S, 8)], id="native-attention"),
    case(native(attend_natively, PADDING, 1), [(2, 5, 8)], id="native-attention-padding"),
    case(native(attend_natively, QUERIES, 0), [(B, 5, 8)], id="native-attention-mask"),
    case(native(encode_natively), [(B, S, 8)], id="encoder-layer"),
    case(native(encode_natively, PADDING, 1), [(2, 5, 8)], id="encoder-layer-padding"),
    case(lambda x, mask: torch._masked_softmax(x, mask, 1, 2), [(B, 4, S), bools(B, 4, S)], id="masked_softmax"),
    case(lambda x: torch._transform_bias_rescale_qkv(x, x[0, 0] * 2, 2), [(B, S, 24)], id="qkv"),
]


@parametrize(NATIVE)
def test_operators_of_whole_layers(row, mode, device):
    if device.type == "cuda" and "encoder" in row.id:
        row = copy.copy(row)
        row.rtol = row.atol = 2e-3  # its kernel has the approximate gelu
    check_case(row, mode, device)


def under_autocast(module, call):
    def run(module, *inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return call(module, *inputs)

    return With(module, run)


def attend_to_some(module, query, key, value, mask):
    """No query sees no key at all: what that gives in half precision depends on torch's kernel for a GPU."""
    return sdpa(query, key, value, mask | (torch.arange(mask.shape[-1], device=mask.device) == 0))


AUTOCAST = [
    case(under_autocast(None, lambda m, q, k, v: sdpa(q, k, v, is_causal=True)), QKV, id="autocast-causal"),
    case(under_autocast(None, attend_to_some), [*CROSS, bools(B, 1, S, T)], id="autocast-bool-mask"),
    case(under_autocast(None, lambda m, *qkv: sdpa(*qkv)), [*CROSS, (B, 1, S, T)], id="autocast-float-mask"),
    case(
        under_autocast(torch.nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)),
        [(B, S, 8)],
        id="autocast-MultiheadAttention",
    ),
    *(
        case(
            under_autocast(
                torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first), lambda m, x: m(x)
            ),
            [(B, S, 8)],
            id=f"autocast-encoder-layer-{first}",
        )
        for first in (False, True)
    ),
    case(
        under_autocast(torch.nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), lambda m, x, y: m(x, y)),
        [(B, S, 8), (B, T, 8)],
        id="autocast-decoder-layer",
    ),
    case(under_autocast(None, lambda m, x, y: torch.cdist(x, y, 3.0)), [(B, 5, 4), (B, S, 4)], id="autocast-cdist"),
]
for _row in AUTOCAST:
    _row.rtol = _row.atol = 3e-2


@parametrize(AUTOCAST)
def test_autocast(row, mode, device):
    check_case(row, mode, device)


def test_autocast_of_bilinear():
    """More exactly than eager torch, which rounds the product that it sums."""
    module, inputs = torch.nn.Bilinear(4, 3, 5), [torch.randn(2, 4), torch.randn(2, 3)]
    module = under_autocast(module, lambda m, *xs: m(*xs))
    model_trt = torch2rt(module, inputs, verify=False)
    torch.testing.assert_close(model_trt.reference()(*inputs), module(*inputs), rtol=3e-2, atol=3e-2)


MODULES = [
    attention("plain", lambda m, x: m(x, x, x), SELF),
    attention("no-weights", lambda m, x: m(x, x, x, need_weights=False)[0], SELF),
    attention("heads", lambda m, x: m(x, x, x, average_attn_weights=False), SELF),
    attention("cross", lambda m, x, y: m(x, y, y), SELF, OTHER),
    attention("cross-no-weights", lambda m, x, y: m(x, y, y, need_weights=False)[0], SELF, OTHER),
    attention("length-first", lambda m, x, y: m(x, y, y), (S, B, 8), (T, B, 8), batch_first=False),
    attention("length-first-no-weights", lambda m, x: m(x, x, x, need_weights=False)[0], (S, B, 8), batch_first=False),
    attention("unbatched", lambda m, x: m(x, x, x), (S, 8)),
    attention("sizes", lambda m, q, k, v: m(q, k, v), SELF, (B, T, 5), (B, T, 7), kdim=5, vdim=7),
    attention("no-bias", lambda m, x: m(x, x, x, need_weights=False)[0], SELF, bias=False),
    attention("bias-kv", lambda m, x: m(x, x, x), SELF, add_bias_kv=True),
    attention("zero-attn", lambda m, x: m(x, x, x), SELF, add_zero_attn=True),
    attention("zero-attn-no-weights", lambda m, x: m(x, x, x, need_weights=False)[0], SELF, add_zero_attn=True),
    attention("padding", lambda m, x, y, p: m(x, y, y, key_padding_mask=p), SELF, OTHER, floats(B, T, low=-3, high=3)),
    attention(
        "padding-no-weights", lambda m, x, y, p: m(x, y, y, p, False)[0], SELF, OTHER, floats(B, T, low=-3, high=3)
    ),
    attention("padding-bool", lambda m, x, p: m(x, x, x, key_padding_mask=p & (p.cumsum(1) > 1)), SELF, bools(B, S)),
    attention("causal", lambda m, x: m(x, x, x, attn_mask=causal(x)), SELF),
    attention("is-causal", lambda m, x: m(x, x, x, attn_mask=causal(x), is_causal=True, need_weights=False)[0], SELF),
    attention("mask", lambda m, x, y, a: m(x, y, y, attn_mask=a), SELF, OTHER, (S, T)),
    attention("mask-heads", lambda m, x, y, a: m(x, y, y, attn_mask=a), SELF, OTHER, (B * 2, S, T)),
    attention("masks", lambda m, x, p: m(x, x, x, p & (p.cumsum(1) > 1), False, causal(x))[0], SELF, bools(B, S)),
    case(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [SELF], id="EncoderLayer"),
    case(
        torch.nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True),
        [(S, B, 8)],
        id="EncoderLayer-first",
    ),
    case(
        With(
            torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, torch.nn.LayerNorm(8)
            ),
            lambda m, x, p: m(x, mask=causal(x), src_key_padding_mask=p & (p.cumsum(1) > 1), is_causal=True),
        ),
        [SELF, bools(B, S)],
        id="Encoder",
    ),
    case(
        With(
            torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
            lambda m, x, memory: m(x, memory, tgt_mask=causal(x), tgt_is_causal=True),
        ),
        [SELF, OTHER],
        id="Decoder",
    ),
    case(
        With(
            torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
            lambda m, x, y: m(
                x, y, tgt_mask=m.generate_square_subsequent_mask(y.shape[1], device=y.device), tgt_is_causal=True
            ),
        ),
        [SELF, OTHER],
        id="Transformer",
    ),
    case(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).half(), [half(B, S, 8)], id="EncoderLayer-half"),
]


@parametrize(CASES + MODULES)
def test_attention(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("row", [row for row in CASES if "-5d" not in row.id], ids=lambda row: row.id)
def test_without_the_layer(row, device, monkeypatch):
    """TensorRT 10.3 has no attention layer."""
    monkeypatch.setattr("torch2rt.converters.attention.has_attention", lambda: False)
    check_case(row, "dynamic", device)


@pytest.mark.skipif(not has_attention(), reason="this TensorRT has no attention layer")
def test_no_layer_too_many():
    """Scale the queries, attend; and one layer each to give three dimensions a fourth, and to take it away."""
    for shape, shuffles in ((2, 3, 5, 8), 0), ((3, 5, 8), 4):
        network = lower(trace(Call(sdpa, (), {"is_causal": True}), [torch.randn(shape).half()] * 3)).definition
        types = sorted(network.get_layer(i).type.name for i in range(network.num_layers))
        attention = ["ATTENTION_INPUT", "ATTENTION_OUTPUT", "CONSTANT", "ELEMENTWISE"]
        assert types == [*attention, *["SHUFFLE"] * shuffles]


def test_dropout_is_refused(device):
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.1 is random"):
        torch2rt(Call(sdpa, (), {"dropout_p": 0.1}), [torch.randn(2, 3, 5, 8, device=device)] * 3)


def test_a_decomposition_with_other_results_is_refused():
    q = torch.randn(2, 3, 5, 4)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with pytest.raises(UnsupportedError, match="_scaled_dot_product_flash_attention_for_cpu"):
        torch2rt(Call(flash), [q, q, q])
