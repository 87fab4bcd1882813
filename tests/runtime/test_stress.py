"""Many calls from many threads: every result is right, nothing grows, and other weights may come in meanwhile.

`--stress 1000000` makes more of them than the default, which is meant for a minute or so on a GPU.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import random
import sys
import threading
import time

import pytest
import torch
from harness import Call
from harness.threads import at_once
from test_callers import GRAPHS, as_told

from torch2rt import TRTModule, torch2rt
from torch2rt.errors import InputError
from torch2rt.runtime import variants as variants_file

THREADS = 8
TOLERANCE = 1e-3
SHAPES = [(1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 8, 32), (3, 3, 31, 9)]
RARE = [(1, 3, 8, width) for width in range(9, 32)]  # with each stream, more than the graphs that are kept


@pytest.fixture(scope="module")
def net(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3)).eval().to(device)


@pytest.fixture(scope="module")
def net_trt(net, device):
    ranges = {"min_shapes": [(1, 3, 8, 8)], "opt_shapes": [(2, 3, 16, 16)], "max_shapes": [(4, 3, 32, 32)]}
    if device.type == "cuda":
        return torch2rt(net, [torch.randn(2, 3, 16, 16, device=device)], **ranges)


@pytest.fixture
def on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")


@contextlib.contextmanager
def switching_often():
    """Let Python change threads twenty times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 20)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def synchronize(stream=None):
    if stream is not None:
        stream.synchronize()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


class Checker:
    """The largest error of the results on one stream so far, kept on the device: looking at it would wait."""

    def __init__(self, device):
        self.worst = torch.zeros((), device=device)
        self.kept = []

    def check(self, result, expected):
        assert result.shape == expected.shape and result.dtype == expected.dtype
        torch.maximum(self.worst, (result - expected).abs().amax(), out=self.worst)

    def check_kept(self):
        for result, expected in self.kept:
            self.check(result, expected)
        self.kept.clear()

    def finish(self):
        self.check_kept()
        worst = self.worst.item()
        assert worst < TOLERANCE, f"a result is off by {worst}"  # NaN is not less, either


class Storm:
    """Callers who share nothing but the module, and do things in an order of their own."""

    def __init__(self, function, net, device, calls, seed=0, captures=False):
        self.captures = captures  # then CUDA lets nobody wait for the whole device
        self.function, self.device, self.calls, self.seed = function, device, calls, seed
        self.inputs = [torch.randn(shape, device=device) for shape in SHAPES]
        self.rare = [torch.randn(shape, device=device) for shape in RARE]
        with torch.no_grad():
            self.expected = [net(x) for x in self.inputs]
            self.rare_expected = [net(x) for x in self.rare]
        self.left = itertools.count(1)
        self.made = 0
        self.stop = threading.Event()
        synchronize()

    def run(self, streams_of):
        """Make the calls in `THREADS` threads, on the streams that `streams_of(thread)` gives."""
        at_once([lambda seed=seed: self.work(seed, streams_of(seed)) for seed in range(THREADS)])
        synchronize()

    def work(self, seed, streams):
        choose = random.Random(1000 * self.seed + seed)
        checkers = dict.fromkeys(streams)
        made = 0
        try:
            while not self.stop.is_set():
                stream = choose.choice(streams)
                with torch.cuda.stream(stream), torch.no_grad():
                    checker = checkers[stream] = checkers[stream] or Checker(self.device)
                    for _ in range(choose.randint(1, 20)):
                        if (made := next(self.left)) > self.calls:
                            self.stop.set()
                            break
                        self.one(choose, checker)
                    self.between(choose, checker, stream)
            for stream, checker in checkers.items():
                with torch.cuda.stream(stream):
                    if checker is not None:
                        checker.finish()
        finally:
            self.stop.set()
            self.made = max(self.made, min(made, self.calls))

    def one(self, choose, checker):
        """One call, and what a caller may do with its input and its result at once."""
        place, fate = choose.randrange(len(self.inputs)), choose.random()
        x, expected = self.inputs[place], self.expected[place]
        if fate < 0.0005:
            place = choose.randrange(len(self.rare))
            x, expected = self.rare[place], self.rare_expected[place]
        if fate < 0.7:
            result = self.function(x)
        elif fate < 0.8:  # an input that is gone at once, and its memory in other hands
            mine = x.clone()
            result = self.function(mine)
            del mine
            torch.full_like(x, float("nan"))
        elif fate < 0.9:  # one that is overwritten at once
            mine = x.clone()
            result = self.function(mine)
            mine.fill_(float("nan"))
        else:  # one that has to be copied first
            result = self.function(x.transpose(2, 3).contiguous().transpose(2, 3))
        then = choose.random()
        if then < 0.6:
            checker.check(result, expected)
        elif then < 0.9:
            checker.kept.append((result, expected))
        else:  # a result that nobody else may see changed
            checker.check(result, expected)
            result.fill_(float("nan"))

    def between(self, choose, checker, stream):
        """What happens between bursts: rests, waits, looks at results."""
        fate = choose.random()
        if fate < 0.2 or len(checker.kept) > 50:
            choose.shuffle(checker.kept)
            checker.check_kept()
        elif fate < 0.25:
            time.sleep(0)
        elif fate < 0.27:
            time.sleep(choose.random() * 1e-3)
        elif fate < 0.29:
            synchronize(stream)
        elif fate < 0.295 and not self.captures:
            synchronize()
        elif fate < 0.31:
            checker.finish()


@pytest.mark.parametrize("fault", [None, "off", "nan", "late"])
def test_a_storm_finds_a_wrong_result(net, device, fault):
    """One wrong result among hundreds, in whatever way it is wrong, fails the storm."""
    calls, lock = itertools.count(), threading.Lock()
    before = {}

    def function(x):
        result = net(x)
        with lock:
            if next(calls) == 321:
                if fault == "off":
                    result[0, 0, 0, 0] += 0.01
                elif fault == "nan":
                    result[-1, -1, -1, -1] = float("nan")
                elif fault == "late":
                    result = before[x.shape]
            before[x.shape] = result.clone() + 1  # as another input of this shape has it
        return result

    storm = Storm(function, net, device, 600)
    storm_ends = contextlib.nullcontext() if fault is None else pytest.raises(AssertionError, match="is off by")
    with storm_ends:
        storm.run(streams_for(device))
    assert storm.made == 600 or fault is not None


def streams_for(device, shared=False):
    """The default stream and three others, a thread's own or everybody's; none without a GPU."""
    if device.type != "cuda":
        return lambda thread: [None]
    everybody = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(3))]
    own = [[everybody[0], *(torch.cuda.Stream() for _ in range(3))] for _ in range(THREADS)]
    return lambda thread: everybody if shared else own[thread]


@GRAPHS
def test_every_result_of_many_callers_is_right(on_a_gpu, net, net_trt, graph, device, pytestconfig, record_property):
    calls = pytestconfig.getoption("--stress")
    with as_told(net_trt, graph), switching_often():
        storm = Storm(net_trt, net, device, calls, seed=int(graph), captures=graph)
        begun = time.perf_counter()
        storm.run(streams_for(device, shared=graph))  # four streams of four shapes: the graphs that are kept
        seconds = time.perf_counter() - begun
    assert storm.made == calls
    record_property("calls", calls)
    print(f"{calls} calls, every result compared: {seconds:.1f} s")


@GRAPHS
def test_callers_with_new_streams_all_the_time(on_a_gpu, net, net_trt, graph, device, pytestconfig):
    """More streams than contexts and graphs are kept, so that some are thrown away while others run."""
    pool = [torch.cuda.Stream() for _ in range(32)]
    with as_told(net_trt, graph):
        storm = Storm(
            net_trt, net, device, pytestconfig.getoption("--stress") // (250 if graph else 25), seed=2, captures=graph
        )
        storm.run(lambda thread: pool)
    assert storm.made == storm.calls


@GRAPHS
def test_calls_per_second(on_a_gpu, net, net_trt, graph, device, pytestconfig, record_property):
    """How many, in one thread and in eight, which share one interpreter: they must not end up waiting for the GPU."""
    each = max(pytestconfig.getoption("--stress") // 10, 100)
    rates = {}
    with as_told(net_trt, graph), torch.no_grad():
        for threads in (1, THREADS):
            streams = [torch.cuda.Stream() for _ in range(threads)]
            x = torch.randn(SHAPES[1], device=device)
            synchronize()
            for stream in streams:
                with torch.cuda.stream(stream):
                    for _ in range(10):
                        net_trt(x)
            synchronize()

            def work(stream):
                with torch.cuda.stream(stream):
                    for _ in range(each // threads):  # noqa: B023  (it runs within the loop's turn)
                        net_trt(x)  # noqa: B023

            begun = time.perf_counter()
            at_once([lambda stream=stream: work(stream) for stream in streams])
            synchronize()
            rates[threads] = each // threads * threads / (time.perf_counter() - begun)
    for threads, rate in rates.items():
        record_property(f"calls per second, {threads} threads", round(rate))
    print("calls per second: " + ", ".join(f"{rate:.0f} with {threads} threads" for threads, rate in rates.items()))
    assert rates[THREADS] > 0.2 * rates[1], rates


# Memory --------------------------------------------------------------------------------------------------------------


def resident():
    """This process's memory on the host, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


MALLINFO = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def in_use():
    """The bytes on the host that the C library has given out and not got back.

    What it keeps for itself is not among them: after a storm of threads, that grows by up to 5 MiB for each engine that
    comes and goes, also of TensorRT alone, until each of its arenas is as large as it needs to be.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.hblkhd + found.uordblks


def settled():
    gc.collect()
    torch.cuda.synchronize()
    device = torch.cuda.current_device()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "on the device": -torch.cuda.mem_get_info(device)[0],
        "on the host": resident(),
        "in use": in_use(),
        "objects": len(gc.get_objects()),
    }


# Of 100,000 calls, 64 bytes each are 6.1 MiB: a call that leaves one Python object behind leaves more. The driver
# takes device memory in pieces of 2 MiB, and other processes may use the same GPU.
GROWTH = {
    "allocated": 0,
    "reserved": 0,
    "on the device": 8 << 20,
    "on the host": 6 << 20,
    "in use": 6 << 20,
    "objects": 500,
}


def tensorrt_alone(net_trt, inputs):
    """A function that makes this many calls of the engine without torch2rt."""
    context, stream = net_trt.context, torch.cuda.Stream()
    (name,), (result,) = net_trt.input_names, net_trt.output_names
    outputs = [torch.empty_like(net_trt(x)) for x in inputs]

    def call(count):
        for turn in range(count):
            x, output = inputs[turn % len(inputs)], outputs[turn % len(inputs)]
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
            context.set_tensor_address(result, output.data_ptr())
            context.execute_async_v3(stream.cuda_stream)

    return call


@GRAPHS
@pytest.mark.parametrize("caller", ["good", "strided", "with gradients", "bad"])
def test_nothing_grows(on_a_gpu, net_trt, graph, caller, device, pytestconfig):
    calls = pytestconfig.getoption("--stress") // (1 if caller == "good" else 10)
    inputs = [torch.randn(shape, device=device) for shape in SHAPES]
    if caller == "strided":
        inputs = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    if caller == "with gradients":
        inputs = [x.requires_grad_() for x in inputs]
    bad = [torch.randn(2, 3, 33, 16, device=device), inputs[0].half(), inputs[0].cpu(), None]

    def call(count):
        for turn in range(count):
            if caller != "bad":
                net_trt(inputs[turn % len(inputs)])
            else:
                with contextlib.suppress(InputError):
                    net_trt(bad[turn % len(bad)])
                    raise AssertionError("a bad call was accepted")

    with as_told(net_trt, graph):
        call(max(calls // 20, 100))
        before = settled()
        call(calls)
        after = settled()
    grown = {what: after[what] - before[what] for what in before}
    if caller != "bad" and not graph:
        # TensorRT for RTX 1.6 keeps 1.7 KB on the host each time that a context is told other shapes
        alone = tensorrt_alone(net_trt, inputs)
        alone(100)
        before = settled()
        alone(calls)
        after = settled()
        for what in ("on the host", "in use"):
            grown[what] -= after[what] - before[what]
    print(grown)
    for what, most in GROWTH.items():
        assert grown[what] <= most, grown


def test_modules_that_come_and_go_leave_nothing(on_a_gpu, net, net_trt, device):
    """Fifty modules, called and dropped: the device has its memory back."""
    state, x = net_trt.state_dict(), torch.randn(SHAPES[1], device=device)

    def come_and_go(count):
        for turn in range(count):
            made = TRTModule()
            made.load_state_dict(state)
            made.cuda_graph = turn % 2 == 1
            made(x)

    come_and_go(6)
    torch.cuda.empty_cache()
    before = settled()
    come_and_go(50)
    torch.cuda.empty_cache()
    after = settled()
    assert after["allocated"] <= before["allocated"]
    assert after["on the device"] - before["on the device"] <= 32 << 20  # an engine's weights and contexts take 2 MiB
    # TensorRT for RTX 1.6 keeps 153 KiB each time that this engine's kernels are read or written: thrice for a module
    assert after["in use"] - before["in use"] <= 50 * len(state["engine"]) * 2


# Other weights -------------------------------------------------------------------------------------------------------


def swap(model_trt, states, results, inputs, seconds, compare):
    """Load one state after the other while others call; every result is of one state, the loader's of the last."""
    stop = threading.Event()

    def loads():
        choose = random.Random(0)
        try:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                last = choose.randrange(len(states))
                model_trt.load_state_dict(states[last])
                if choose.random() < 0.5:
                    time.sleep(choose.random() * seconds / 50)
                    continue
                for x, expected in zip(inputs, results[last], strict=True):
                    assert compare(model_trt(x), expected), "a call after a load is of the engine before"
        finally:
            stop.set()

    def calls():
        choose, made = random.Random(1), 0
        while not stop.is_set() or made < 10:
            place = choose.randrange(len(inputs))
            result = model_trt(inputs[place])
            assert any(compare(result, one[place]) for one in results), "a result is of neither engine"
            made += 1

    at_once([loads, *[calls] * (THREADS - 1)])


def test_other_weights_come_in_while_others_call(on_a_gpu, net, net_trt, device):
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3)).eval().to(device)
    ranges = {"min_shapes": [(1, 3, 8, 8)], "opt_shapes": [(2, 3, 16, 16)], "max_shapes": [(4, 3, 32, 32)]}
    inputs = [torch.randn(shape, device=device) for shape in SHAPES]
    states = [net_trt.state_dict(), torch2rt(other, [inputs[1]], **ranges).state_dict()]
    with torch.no_grad():
        results = [[made(x) for x in inputs] for made in (net, other)]
    torch.cuda.synchronize()
    for graph in (False, True):
        model_trt = TRTModule().to(device)
        model_trt.load_state_dict(states[0])
        model_trt.cuda_graph = graph
        swap(model_trt, states, results, inputs, 10, lambda a, b: bool((a - b).abs().amax() < TOLERANCE))
    torch.cuda.synchronize()


class Slow:
    """A pool that multiplies by the first byte of its engine, and takes its time to load it."""

    def __init__(self, loaded):
        engine, index = loaded
        time.sleep(0.003)
        self.factor, self.index = engine.data[0], 0 if index is None else index
        self.interface = engine.interface

    def run(self, tensors, graph=False, borrow=False):
        return [tensors[0] * self.factor] * len(self.interface.outputs)


def test_other_weights_never_mix_with_the_ones_before(monkeypatch):
    """The same without a GPU, of what `TRTModule` does around its pools."""
    monkeypatch.setattr(variants_file, "LoadedEngine", lambda engine, index: (engine, index))
    monkeypatch.setattr(variants_file, "ContextPool", Slow)
    x, states = torch.ones(2, 3), []
    for engine, function in ((b"\2", lambda x: x * 2), (b"\3", lambda x: (x * 3, x * 3))):
        made = torch2rt(Call(function), [x], verify=False)
        made.built = dataclasses.replace(made.built, data=engine)
        states.append(made.state_dict())
    results = [[x * 2], [(x * 3, x * 3)]]
    model_trt = TRTModule()
    model_trt.load_state_dict(states[0])

    def equal(result, expected):
        if isinstance(result, tuple) != isinstance(expected, tuple):
            return False
        return len(result) == len(expected) and all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    with switching_often():
        swap(model_trt, states, results, [x], 1, equal)
