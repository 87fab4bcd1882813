"""Modules that keep tensors between calls: a sequence of calls gives what eager gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import load, save, torch2rt
from torch2rt.errors import InputError, TraceError
from torch2rt.runtime.module import TRTModule


class KeysAndValues(nn.Module):
    """Attention to a cache that is written by index, of which a part is no buffer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("keys", torch.zeros(1, 12, 8))
        self._values = {"of": [torch.zeros(1, 12, 8)]}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x, position):
        (values,) = self._values["of"]
        self.keys.index_copy_(1, position, self.k(x))
        values[:, position] = self.v(x)
        self.count += 1
        seen = torch.arange(12, device=x.device) <= position[-1]
        q, k, v = self.q(x)[:, None], self.keys[:, None], values[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None, None])[:, 0] * self.count


class Stream(nn.Module):
    """A convolution and a recurrent cell that go on where the last call ended; the state is replaced, not written."""

    def __init__(self):
        super().__init__()
        self.conv, self.cell = nn.Conv1d(3, 4, 3), nn.Linear(9, 5)
        self.register_buffer("left", torch.linspace(-1, 1, 6).view(1, 3, 2))
        self.hidden = torch.full((1, 5), 0.25)

    def forward(self, x):
        x = torch.cat([self.left, x], 2)
        self.left = x[:, :, -2:]
        y = F.relu(self.conv(x))
        self.hidden = torch.tanh(self.cell(torch.cat([y.mean(2), self.hidden], 1)))
        return y * self.hidden.sum()


class Statistics(nn.Module):
    """Batch norm in training mode, and an input that is written to."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3, momentum=0.3), nn.Linear(3, 2)

    def forward(self, x, total, *, scale):
        y = self.norm(x * scale["by"]).amax((2, 3))
        total[1:].add_(y.sum(0)[:2])
        return {"y": self.last(y)}


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2))

    def forward(self, x):
        self.cache = torch.cat([self.cache, x])
        return self.cache.sum(0)


class Outside(nn.Module):
    """State, and a call that TensorRT has not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(3, 3))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.T @ x, alpha=0.1)
        return torch.linalg.svdvals(self.mean) * x.tanh().sum()


ROWS = {
    "keys and values": (KeysAndValues().eval(), lambda i: ([torch.randn(1, 1, 8), torch.tensor([i])], {}), {}),
    "stream": (Stream().eval(), lambda i: ([torch.randn(1, 3, 5 + i)], {}), {"max_shapes": [(1, 3, 9)]}),
    "statistics": (
        Statistics().train(),
        lambda i: ([torch.randn(4, 3, 2, 5), torch.randn(3)], {"scale": {"by": torch.tensor(1.5 + i)}}),
        {},
    ),
    "outside": (Outside().eval(), lambda i: ([torch.randn(4, 3)], {}), {"fallback": True, "min_segment_calls": 1}),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("state", ["write", "explicit"])
def test_calls_one_after_another(name, state):
    module, call, options = ROWS[name]
    calls = [call(i) for i in range(4)]
    args, kwargs = copy.deepcopy(calls[0])
    before = copy.deepcopy(module)
    model_trt = torch2rt(module, args, kwargs=kwargs, state=state, **options)
    for value, kept in zip(module.buffers(), before.buffers(), strict=True):
        torch.testing.assert_close(value, kept, rtol=0, atol=0)  # as it was
    torch.testing.assert_close((args, kwargs), calls[0], rtol=0, atol=0)
    eager, run = before, model_trt.reference()
    kept = {name: place.get().clone() for name, place in _places(eager).items()}
    for args, kwargs in calls:
        ours, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        expected = eager(*theirs[0], **theirs[1])
        if state == "write":
            actual = run(*ours[0], **ours[1])
            new = run.state
        else:
            actual, new, inputs = run(*ours[0], state={n: kept[n] for n in _state(run)}, **ours[1])
            kept.update(new)
            assert len(inputs) == (name == "statistics")
            ours = (args[:1] + inputs, kwargs) if inputs else ours
        torch.testing.assert_close((actual, ours), (expected, theirs), rtol=1e-4, atol=1e-5)
        for path, value in new.items():
            torch.testing.assert_close(value, _places(eager)[path].get(), rtol=1e-4, atol=1e-5)
    assert len(new) == {"keys and values": 3, "stream": 2, "statistics": 3, "outside": 1}[name]


def _places(module):
    from torch2rt.runtime.stateful import places

    return {place.name: place for place in places(module)}


def _state(run):
    return run.interface.arguments["tuple"][1]["items"][-1]["dict"]


def test_a_module_without_state_is_one_engine():
    assert type(torch2rt(nn.Linear(3, 2), [torch.randn(4, 3)], state="write")) is TRTModule


@pytest.mark.parametrize(
    ("module", "inputs", "options", "error", "message"),
    [
        (Grows(), [torch.randn(1, 2)], {"state": "write"}, TraceError, r"'cache' does not keep its shape, \(1, 2\)"),
        (Stream(), [torch.randn(1, 3, 5)], {"state": "keep"}, InputError, "not one of 'refuse', 'write', 'explicit'"),
        (Stream(), [torch.randn(1, 3, 5)], {"state": "write", "max_batch_size": 4}, InputError, "Give max_shapes"),
        (Stream(), [torch.randn(1, 3, 5)], {}, TraceError, "earlier call"),
    ],
)
def test_refused(module, inputs, options, error, message):
    with pytest.raises(error, match=message):
        torch2rt(module.eval(), inputs, **options)


def test_the_state_can_be_set_shared_and_copied():
    module, x = Stream().eval(), torch.randn(1, 3, 5)
    run = torch2rt(module, [x], state="write", max_shapes=[(1, 3, 6)]).reference()
    first = run(x)
    for name, value in run.state.items():
        value.copy_(_places(module)[name].get())
    torch.testing.assert_close(run(x), first)
    other = torch2rt(module, [x[:, :, :1]], state="write", verify=False).reference()
    other.share_state(run)
    eager = copy.deepcopy(module)
    for part in (x, x * 2):
        eager(x) if part is x else None
    torch.testing.assert_close(other(x[:, :, :1]), eager(x[:, :, :1]))
    torch.testing.assert_close(run(x), eager(x))
    with pytest.raises(InputError, match="The states differ"):
        other.share_state(torch2rt(Outside().eval(), [torch.randn(4, 3)], state="write", fallback=True))
    with pytest.raises(InputError, match="state is the module's own"):
        run(x, state={})


LLAMA = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def test_a_static_cache_generates_what_eager_does():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=2, **LLAMA)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config).eval()
            self.cache = transformers.StaticCache(config=config, max_cache_len=16)

        def forward(self, ids, position):
            return self.model(
                input_ids=ids, position_ids=position[None], cache_position=position, past_key_values=self.cache
            ).logits[:, -1]

    def generate(prefill, decode):
        scores, tokens = prefill(prompt, torch.arange(5)), []
        for index in range(5, 11):
            tokens.append(scores.argmax(-1, keepdim=True))
            scores = decode(tokens[-1], torch.tensor([index]))
        return torch.cat(tokens), scores

    decoder, prompt = Decoder().eval(), torch.tensor([[3, 7, 11, 2, 9]])
    with torch.no_grad():
        decoder(prompt, torch.arange(5))  # transformers makes the cache at the first call
        decoder.cache.reset()
        prefill = torch2rt(decoder, [prompt, torch.arange(5)], state="write", verify=False).reference()
        decode = torch2rt(decoder, [prompt[:, :1], torch.tensor([5])], state="write", verify=False).reference()
        decode.share_state(prefill)
        tokens, scores = generate(prefill, decode)
        expected_tokens, expected = generate(decoder, decoder)
    assert len(tokens.unique()) > 1
    torch.testing.assert_close(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


class Window:
    """What a stream has heard last, in an object that the caller keeps."""

    def __init__(self, width):
        self.parts, self.calls, self.seen = [torch.zeros(1, 2, width)], 0, torch.zeros((), dtype=torch.long)


class Listens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, x, *, of):
        (last,) = of["window"].parts
        whole = torch.cat([last, x], 2)
        of["window"].parts = [whole[:, :, -2:]]
        of["window"].seen += x.shape[2]
        return self.conv(whole) * of["window"].seen


@pytest.mark.parametrize("state", ["write", "explicit"])
def test_objects_that_the_module_changes(state, tmp_path):
    module, x = Listens().eval(), torch.randn(1, 2, 5)
    windows = [{"window": Window(2)} for _ in range(3)]
    options = {"max_shapes": {"x": (1, 2, 9)}, "min_shapes": {"x": (1, 2, 1)}}
    run = torch2rt(module, [x], kwargs={"of": windows[2]}, state=state, **options).reference()
    if state == "write":
        path = tmp_path / "stream.rt"
        save(torch2rt(module, [x], kwargs={"of": windows[2]}, state=state, keep_network=False, **options), path)
        assert load(path).objects == run.objects
    assert not windows[2]["window"].seen and not windows[2]["window"].parts[0].any()
    ours, theirs = windows[:2]
    seen = ours["window"].seen
    for size in (5, 1, 9):
        x = torch.randn(1, 2, size)
        expected, actual = module(x, of=theirs), run(x, of=ours, **({"state": {}} if state == "explicit" else {}))
        if state == "explicit":
            actual, _, (ours["window"],) = actual
        torch.testing.assert_close(actual, expected)
        for one, other in zip(vars(ours["window"]).values(), vars(theirs["window"]).values(), strict=True):
            torch.testing.assert_close(one, other)
    assert (ours["window"].seen is seen) == (state == "write")  # which eager writes to in place


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_caches_among_the_inputs(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=1, **LLAMA)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)

        def forward(self, ids, cache):
            result = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            return result.logits, result.past_key_values

    module, token = Decoder().eval(), torch.tensor([[4]])
    cache = getattr(transformers, kind)(config=config, **{"max_cache_len": 9} if kind == "StaticCache" else {})
    shapes = {}
    if kind == "DynamicCache":
        shapes = {"min_shapes": [(1, 1), *[(1, 2, 1, 8)] * 2], "max_shapes": [(1, 1), *[(1, 2, 20, 8)] * 2]}
    with torch.no_grad():
        module(torch.tensor([[1, 2, 3]]), cache)
        run = torch2rt(module, [token, copy.deepcopy(cache)], state="write", **shapes).reference()
        other = copy.deepcopy(cache)
        for number in range(3):
            expected, _ = module(token + number, cache)
            actual, returned = run(token + number, other)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            assert type(returned) is type(cache) and other.get_seq_length() == cache.get_seq_length() == 4 + number
            torch.testing.assert_close(other.layers[0].keys, cache.layers[0].keys, rtol=1e-4, atol=1e-5)
