"""Causal masks of a static and of a dynamic length are recognised by their values."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import lower, trace
from torch2rt.passes import default
from torch2rt.passes.order import run
from torch2rt.runtime.module import ReferenceModule


def _attends(mask_of, **constants):
    return module(lambda self, x: F.scaled_dot_product_attention(x, x * 2, x + 1, mask_of(self, x)), **constants)


def _tril(self, x):
    n = x.shape[-2]
    return torch.tril(torch.ones(n, n)).bool()


def _triu(self, x):
    n = x.shape[-2]
    return torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)


def _arange(self, x):
    place = torch.arange(x.shape[-2])
    return place[None, :] <= place[:, None]


def _masked_fill(self, x):
    n = x.shape[-2]
    return torch.zeros(n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(diagonal=1), float("-inf"))


def _of_input(self, x):
    seen = torch.ones_like(x[0] @ x[0].transpose(0, 1), dtype=torch.bool)
    return torch.tril(seen).unsqueeze(0).expand(x.shape[0], -1, -1)


def _of_table(self, x):
    n = x.shape[-2]
    return torch.where(self.table[:n, :n] > 0, 0.0, torch.finfo(torch.float32).min)


def _packed(self, x, every=100):
    """Which of several sequences in a row a place is in, as decoders compute it from the places: here there is one."""
    place = torch.arange(x.shape[-2])[None].expand(x.shape[0], -1) % every
    sequence = (torch.diff(place, prepend=place[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, q, k = torch.arange(x.shape[0])[:, None, None], place[:1, :, None], place[:1, None]
    return (q >= k) & (sequence[batch, q] == sequence[batch, k])


def _cut_in_front(self, x):
    place = torch.arange(x.shape[-2] + 2)[2:]
    return place[None, :] <= place[:, None]


def _several_packed(self, x):
    return _packed(self, x, 4)


def _before(self, x):
    return (torch.arange(x.shape[-2] + 1)[1:] <= torch.arange(x.shape[-2])[:, None]) | (x[0, :, :1] > 9)


def _one_off(self, x):
    n = x.shape[-2]
    return torch.tril(torch.ones(n, n, dtype=torch.bool), diagonal=1)


def _window(self, x):
    place = torch.arange(x.shape[-2])
    apart = place[:, None] - place[None, :]
    return (apart >= 0) & (apart < 5)


def _at_the_end(self, x):
    n = x.shape[-2]
    return self.table[-n:, :n] > 0


def _soft(self, x):
    n = x.shape[-2]
    return torch.full((n, n), -1000.0).triu(1)


TABLE = torch.ones(9, 9).tril()
CAUSAL = [_tril, _triu, _arange, _masked_fill, _of_input, _of_table, _packed, _cut_in_front]
OTHERS = [_several_packed, _before, _one_off, _window, _at_the_end, _soft]


@pytest.mark.parametrize("length", [(6, 6), (2, 9)], ids=["static", "dynamic"])
@pytest.mark.parametrize("mask_of", [*CAUSAL, *OTHERS], ids=lambda f: f.__name__)
def test_a_causal_mask_is_recognised_and_no_other_one(mask_of, length):
    made = _attends(mask_of, table=TABLE)
    low, high = length
    graph = trace(made, [torch.randn(2, 6, 8)], min_shapes=[(1, low, 8)], max_shapes=[(3, high, 8)])
    ready = run(graph, default())
    (call,) = ready.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    mask = call.kwargs.get("attn_mask", call.args[3] if len(call.args) > 3 else None)
    is_causal = call.kwargs.get("is_causal", False)
    assert (mask is None, is_causal) == ((True, True) if mask_of in CAUSAL else (False, False))
    if mask_of in CAUSAL:  # nothing of the mask is left
        assert not [n for n in ready.graph.nodes if "tril" in str(n.target) or "arange" in str(n.target)]
    reference = ReferenceModule(lower(graph))
    for rows in {low, 6, high}:
        x = torch.randn(2, rows, 8)
        compare(ready(x)[0], made(x))
        torch.testing.assert_close(reference(x), made(x), rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_range_is_causal():
    """A window of 5 hides nothing up to a length of 5, and then does."""
    for most, is_causal in ((5, True), (6, False)):
        graph = trace(_attends(_window), [torch.randn(2, 4, 8)], min_shapes=[(2, 2, 8)], max_shapes=[(2, most, 8)])
        (call,) = run(graph, default()).graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        assert call.kwargs.get("is_causal", False) is is_causal
