"""What a trace changes in the process for its own thread, and puts back: len, caches of functions, inference mode."""

import builtins
import functools
import threading

import pytest
import torch
from harness import Call, compare

from torch2rt import TraceError, torch2rt, trace


@functools.lru_cache(maxsize=8)
def table(length, scale=2.0):
    return torch.arange(length) * scale


@functools.cache
def doubled(x):
    return x * 2


def cached_method(function):
    """A cache that only a closure refers to, as transformers has them."""
    cached = functools.lru_cache(maxsize=1)(function)

    @functools.wraps(function)
    def wrapper(*args):
        return cached(*args)

    wrapper.cached = [cached]
    return wrapper


class Cached(torch.nn.Module):
    tables = {"in a dict": table}

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def places(self, length):
        return torch.arange(length) + 1.0

    @cached_method
    def more(self, length, other):
        return torch.arange(length) - other

    def forward(self, x):
        n = len(x)
        y = doubled(x) + table(3)[1]
        for part in (table(n, scale=3.0), self.places(n), self.more(x.shape[0], n), self.tables["in a dict"](n)):
            y = y + part[:, None]
        return y.reshape(n, -1), n


CACHES = (table, doubled, Cached.places, Cached.more.cached[0])


@pytest.fixture
def module():
    for cache in CACHES:
        cache.cache_clear()
    return Cached().eval()


def info():
    return [cache.cache_info().currsize for cache in CACHES]


@pytest.mark.parametrize("called_before", [False, True])
def test_functions_behind_a_cache(module, device, called_before):
    made = table(3)
    if called_before:
        module(torch.randn(2, 5, device="cpu"))
    sizes = info()
    model_trt = torch2rt(module, [torch.randn(2, 5)], max_batch_size=4, verify=False)  # which would call the module
    assert (table, doubled, Cached.places, Cached.more.cached[0]) == CACHES and Cached.tables["in a dict"] is table
    assert table(3) is made, "what was in the cache stays there"
    assert info()[0] == sizes[0] and info()[2:] == sizes[2:] and info()[1] in (0, sizes[1])
    for batch in (1, 2, 4):
        x = torch.randn(batch, 5)
        compare(model_trt.reference()(x), module(x))


def test_functions_behind_a_cache_when_the_trace_fails(module):
    module.more = lambda length, other: None
    before = table, Cached.__dict__["places"]
    with pytest.raises((TraceError, TypeError)):
        trace(module, [torch.randn(2, 5)], max_batch_size=4)
    assert (table, Cached.__dict__["places"]) == before
    for n in (2, 3):  # 2 may be there already: the example's own size was tried, too
        assert type(table(n)) is torch.Tensor
        compare(table(n), torch.arange(n) * 2.0)


def test_the_length_of_a_tensor_is_its_size():
    lengths = []

    def forward(x, y):
        lengths.append((len(x), len(y), len([x]), len(x.shape), len(torch.zeros(7))))
        return x.expand(len(y), len(x)) * len(x)

    model_trt = torch2rt(
        Call(forward).eval(), [torch.randn(4), torch.randn(2, 1)], min_shapes=[(2,), (1, 1)], max_shapes=[(9,), (5, 1)]
    )
    assert lengths[0][2:] == (1, 1, 7) and all(isinstance(n, torch.SymInt) for n in lengths[0][:2])
    for n, m in [(2, 1), (9, 5), (4, 3)]:
        x, y = torch.randn(n), torch.randn(m, 1)
        compare(model_trt.reference()(x, y), forward(x, y))


@pytest.mark.parametrize("forward", [lambda x: x * len(x.sum()), lambda x: [x][: len(x)] and x * len(range(len(x)))])
def test_a_length_that_python_cannot_take(forward):
    with pytest.raises((TraceError, TypeError), match=r"len\(\) of a 0-d tensor|does the same for every size"):
        trace(Call(forward).eval(), [torch.randn(2, 3)], max_batch_size=4)


def test_other_threads_and_what_follows_have_pythons_own(module):
    """Two traces at once, one of which fails while the other is under way."""
    original, seen, entered, done = builtins.len, [], threading.Event(), threading.Event()

    def slow(x):
        entered.set()
        done.wait(20)
        seen.append(len(x))
        return x * len(x)

    thread = threading.Thread(target=lambda: seen.append(trace(Call(slow), [torch.randn(2, 3)], max_batch_size=4)))
    thread.start()
    assert entered.wait(20)
    with pytest.raises(ZeroDivisionError):
        trace(Call(lambda x: 1 // 0), [torch.randn(2, 3)])
    assert builtins.len is not original and len("abc") == 3 and len(torch.zeros(5)) == 5
    with torch.inference_mode():
        assert torch.zeros(2).is_inference()
    done.set()
    thread.join()
    assert builtins.len is original and isinstance(seen[0], torch.SymInt)
    compare(seen[1](torch.ones(3, 2))[0], torch.full((3, 2), 3.0))


class Inside(torch.nn.Module):
    """Views and writes in inference mode, whose result is used outside of it."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    @torch.inference_mode()
    def head(self, x):
        return self.linear(x).view(-1)[1:]

    def forward(self, x):
        with torch.inference_mode():
            y = x.reshape(-1)[1:].clone()
            y[1:] += 1
            assert y.view(-1).shape == y.shape
        with torch.inference_mode(False):
            z = y.relu() * 2
        return z[:2] + self.head(x)[:2], y


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("made_in", [False, True])
def test_inference_mode(device, around, made_in):
    with torch.inference_mode(made_in):
        module, x = Inside().eval().to(device), torch.randn(2, 3, device=device)
    with torch.inference_mode(around):
        model_trt = torch2rt(module, [x], max_batch_size=4)
        run = model_trt if device.type == "cuda" else model_trt.reference()
        assert torch.is_inference_mode_enabled() is around
        actual = run(x)
    with torch.inference_mode():
        compare(actual, module(x))
        assert torch.zeros(2).is_inference()
