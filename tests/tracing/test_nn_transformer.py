"""`nn.Transformer`, whose Python looks into its masks: a trace computes what eager torch would choose."""

import math
import threading

import pytest
import torch
from harness import B, Call, S, With, bools, case, check_case, parametrize
from test_attention import OTHER, SELF, causal
from torch import nn

from torch2rt import torch2rt, trace


def encoder(norm=None, norm_first=False, layers=1, **options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, norm, **options)


def at_the_ends(x):
    """Padding: each row has one element less than the one before, the last row has one."""
    length = torch.arange(x.shape[0], 0, -1, device=x.device)
    return torch.arange(x.shape[1], device=x.device) >= length[:, None]


def added(mask):
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)


def padded(make, x, mask=lambda m: m, **options):
    """With padding at the ends, where torch leaves it out, and at the beginnings."""
    return [make(x, src_key_padding_mask=mask(p), **options) for p in (at_the_ends(x), at_the_ends(x).flip(1))]


def padded_and_causal(m, x, y):
    target = nn.Transformer.generate_square_subsequent_mask(y.shape[1], device=y.device)
    return m(x, y, tgt_mask=target, src_key_padding_mask=at_the_ends(x).flip(1))


CASES = [
    case(With(encoder(layers=2), padded), [SELF], id="padded"),
    case(With(encoder(), lambda m, x: m(x, src_key_padding_mask=at_the_ends(x) & False)), [SELF], id="padded-nowhere"),
    case(With(encoder(nn.LayerNorm(8)), padded), [SELF], id="padded-norm"),
    case(With(encoder(), lambda m, x: padded(m, x, added)), [SELF], id="padded-added"),
    case(With(encoder(), lambda m, x: padded(m, x, is_causal=False)), [SELF], id="padded-not-causal"),
    case(With(encoder(enable_nested_tensor=False), padded), [SELF], id="padded-leaves-nothing-out"),
    case(With(encoder(norm_first=True), padded), [SELF], id="padded-norm-first"),
    case(With(encoder(mask_check=False), padded), [SELF], id="padded-unchecked"),
    case(With(encoder(), lambda m, x: m(x, added(causal(x)), added(at_the_ends(x)))), [SELF], id="padded-causal"),
    case(
        With(encoder(), lambda m, x: m(x, src_key_padding_mask=torch.tensor([[False, True, True]], device=x.device))),
        [(1, 3, 8)],
        id="padded-constant",
    ),
    case(
        With(encoder(), lambda m, x, p: m(x, src_key_padding_mask=p & (p.cumsum(1) > 1))),
        [SELF, bools(B, S)],
        id="padded-anywhere",
    ),
    case(With(encoder(), lambda m, x: m(x, causal(x))), [SELF], id="causal"),
    case(With(encoder(norm_first=True), lambda m, x: m(x, added(causal(x)))), [SELF], id="causal-added"),
    case(With(encoder(), lambda m, x, mask: m(x, mask & (mask.cumsum(1) > 1))), [SELF, bools(S, S)], id="mask"),
    case(
        With(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
            lambda m, x, memory: m(x, memory, tgt_mask=added(causal(x))),
        ),
        [SELF, OTHER],
        id="decoder-causal",
    ),
    case(
        With(
            nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
            lambda m, x, y: m(x, y, src_key_padding_mask=at_the_ends(x)),
        ),
        [SELF, OTHER],
        id="transformer-padded",
    ),
    case(
        With(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), padded_and_causal),
        [SELF, OTHER],
        id="transformer-padded-causal",
    ),
]


@parametrize(CASES)
def test_masks(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gelu_is_that_of_torchs_kernel(norm_first, bias, device):
    """Which a GPU has for layers with biases, in eval mode; it is the approximate one."""
    made = nn.TransformerEncoderLayer(
        8, 2, 12, activation="gelu", batch_first=True, norm_first=norm_first, bias=bias, device=device
    )
    torch.nn.init.normal_(made.linear1.weight, 0.0, 2.0)
    x = torch.randn(2, 5, 8, device=device)
    (found,) = torch2rt(made.eval(), [x], max_batch_size=3).report.verified.differences
    assert found.error < 5e-5


def test_other_threads_look_into_their_masks_meanwhile():
    made, x = encoder().eval(), torch.randn(2, 5, 8)
    before, seen = nn.TransformerEncoder.forward, []
    run = torch.no_grad()(lambda: made(x, src_key_padding_mask=at_the_ends(x)))

    def looks(x):
        thread = threading.Thread(target=lambda: seen.append(run()))
        thread.start()
        thread.join()
        return x + 1

    trace(Call(looks), [x])
    assert torch.equal(*seen, run()) and nn.TransformerEncoder.forward is before
