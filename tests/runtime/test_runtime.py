"""Calls on a GPU: streams, threads, graphs, memory, and how it all ends."""

import gc
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from harness import compare
from harness.threads import at_once
from test_callers import as_told
from test_tracing import module

from torch2rt import GraphCache, torch2rt
from torch2rt.errors import EngineError, InputError
from torch2rt.runtime import pool as pool_file
from torch2rt.runtime.cuda_graph import CudaGraph


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")


RANGES = {"min_shapes": [(1, 3, 8, 8)], "opt_shapes": [(2, 3, 16, 16)], "max_shapes": [(4, 3, 32, 32)]}


def make_net(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3)).eval().to(device)


@pytest.fixture(scope="module")
def net(device):
    return make_net(device)


@pytest.fixture(scope="module")
def model_trt(net, device):
    if device.type == "cuda":
        return torch2rt(net, [torch.randn(2, 3, 16, 16, device=device)], **RANGES)


def images(generator=random):
    sizes = [generator.randint(1, 4), 3, generator.randint(8, 32), generator.randint(8, 32)]
    return torch.randn(sizes, device="cuda")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_results_are_ordered_with_the_callers_stream(net, model_trt, graph):
    model_trt.cuda_graph = graph
    weight = torch.randn(3000, 3000, device="cuda")
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for turn in range(8):
                x = torch.zeros(2, 3, 16, 16, device="cuda")
                busy = weight @ weight  # what comes before must be done when the engine begins
                x += turn + busy[0, 0] * 0
                y = model_trt(x)
                result = y.clone()
                x.zero_()  # what comes after must wait until the engine has ended
                y.zero_()
                close(result, net(torch.full((2, 3, 16, 16), float(turn), device="cuda")))
    torch.cuda.synchronize()
    model_trt.cuda_graph = False


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_many_threads_streams_and_shapes(net, model_trt, graph):
    generator = random.Random(0)
    inputs = [images(generator) for _ in range(12)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    torch.cuda.synchronize()

    def work(seed):
        mine = random.Random(seed)
        stream = torch.cuda.default_stream() if seed % 4 == 0 else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(150):
                chosen = [mine.randrange(len(inputs)) for _ in range(3)]
                for i, y in [(i, model_trt(inputs[i])) for i in chosen]:
                    close(y, expected[i])

    with as_told(model_trt, graph):
        at_once([lambda seed=seed: work(seed) for seed in range(8)])


def test_outputs_are_fresh_unless_borrowed(net, device):
    x, other = images(), images()
    with torch.no_grad():
        fast = torch2rt(net, [x], min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 32, 32)], cuda_graph=True)
        first, second = fast(x), fast(x)
        assert first.data_ptr() != second.data_ptr()
        close(first, net(x))
        x.copy_(torch.randn_like(x))  # the same tensor again, with other values
        close(fast(x), net(x))
        close(fast(x.clone()), net(x))  # another tensor of the same shape
        close(fast(x[:, :, :].flip(0)), net(x.flip(0)))
        close(fast(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), net(x))  # not dense
        close(fast(other), net(other))
        fast.borrow_outputs = True
        assert fast(x).data_ptr() == fast(x).data_ptr()


def test_outputs_are_the_callers_whether_it_holds_them_or_not(net, device):
    """The next outputs are made ready ahead or not, in inference mode or not: none is ever another call's."""
    choose = random.Random(0)
    with torch.no_grad():
        fast = torch2rt(net, [images()], min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 32, 32)], cuda_graph=True)
        inputs = [torch.randn(shape, device=device) for shape in ((1, 3, 8, 8), (4, 3, 31, 9))]
        expected = [net(x) for x in inputs]
    held = []
    for turn in range(200):
        which, inference = choose.randrange(2), choose.random() < 0.3
        with torch.inference_mode(inference), torch.no_grad():
            result = fast(inputs[which])
        assert result.is_inference() == inference
        if turn // 20 % 2 or choose.random() < 0.2:
            held.append((result, which))
        del result
    assert len({result.data_ptr() for result, _ in held}) == len(held)
    for result, which in held:
        close(result, expected[which])


def test_more_shapes_than_graphs_are_kept(net, device):
    fast = torch2rt(net, [torch.randn(1, 3, 8, 8, device=device)], max_shapes=[(1, 3, 8, 40)], cuda_graph=True)
    with torch.no_grad():
        for width in [*range(8, 40), *range(39, 7, -1)]:
            x = torch.randn(1, 3, 8, width, device=device)
            close(fast(x), net(x))
    assert len(fast._ready().graphs) <= 16


def test_inside_of_the_callers_own_capture(net, model_trt):
    x = images()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model_trt(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = model_trt(x) * 2
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for _ in range(3):  # other calls do not disturb the graph
            model_trt(images())
        with torch.no_grad():
            close(y, net(x) * 2)


def test_a_capture_without_a_warm_up_is_refused(net, model_trt):
    x = torch.randn(1, 3, 29, 31, device="cuda")
    with pytest.raises(EngineError, match="call the module once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model_trt(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        close(model_trt(x), net(x))


def test_captures_touch_nothing_of_other_threads(net, device):
    """While calls are captured, others draw random numbers, allocate, free, and wait for streams and events."""
    fast = torch2rt(net, [images()], min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 32, 32)])
    fast.cuda_graph = GraphCache(shapes=96, after=1)
    inputs = [torch.randn(1, 3, 8 + turn % 24, 8 + turn // 24, device=device) for turn in range(96)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    torch.cuda.synchronize()
    ended, done = threading.Event(), []

    def captures():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for x, y in zip(inputs, expected, strict=True):
                    close(fast(x), y)
        finally:
            ended.set()

    def lives(deed):
        turns = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set() or turns < 3:
                deed(turns)
                turns += 1
        done.append(turns)

    def waits(turn):
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        torch.cuda.current_stream().synchronize()

    deeds = [
        waits,
        lambda turn: (torch.cuda.manual_seed(turn), torch.randn(100, device=device), torch.cuda.get_rng_state()),
        lambda turn: torch.nn.functional.dropout(torch.ones(1000, device="cuda")).sum().item(),
        lambda turn: torch.empty((turn % 50 + 1) << 20, dtype=torch.uint8, device="cuda").fill_(1),
        lambda turn: (torch.empty(30 << 20, dtype=torch.uint8, device="cuda"), torch.cuda.empty_cache()),
        lambda turn: torch.ones(1000).pin_memory().to("cuda", non_blocking=True),
    ]
    at_once([captures, *[lambda deed=deed: lives(deed) for deed in deeds]])
    assert len(done) == len(deeds) and fast.cuda_graph_refused is None


def test_a_capture_leaves_the_generator_and_the_pools_of_memory_alone(net, device):
    fast = torch2rt(net, [images()], cuda_graph=True)
    x = torch.randn(tuple(fast.interface.inputs[0].opt), device=device)
    state = torch.cuda.get_rng_state()
    held = [fast(x) for _ in range(3)]
    assert torch.equal(torch.cuda.get_rng_state(), state) and len(fast._ready().graphs) == 1
    assert {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()} <= {(0, 0)}
    with torch.no_grad():
        for y in held:
            close(y, net(x))


def test_graphs_that_are_gone_give_their_memory_back(net, device):
    fast = torch2rt(net, [images()], min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 32, 32)])
    fast.cuda_graph = GraphCache(after=1)
    allocated = []
    for width in [*range(8, 33)] * 3:
        fast(torch.randn(1, 3, 8, width, device=device))
        allocated.append(torch.cuda.memory_allocated())
    assert len(fast._ready().graphs) <= 16
    assert max(allocated[25:]) <= max(allocated[:25]) + (1 << 20)  # a graph of this engine takes 8 MiB
    torch.cuda.synchronize()
    del fast
    gc.collect()
    assert torch.cuda.memory_allocated() < allocated[0]


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.GRU(5, 7, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("dynamic", ["batch", "length"])
def test_a_recurrent_layer_runs_with_or_without_a_graph(device, monkeypatch, dynamic):
    """TensorRT cannot capture a loop of dynamic length: that is found once, said, and every call is right."""
    made = Recurrent().eval().to(device)
    x = torch.randn(2, 6, 5, device=device)
    ranges = dict(max_batch_size=4) if dynamic == "batch" else dict(min_shapes=[(2, 2, 5)], max_shapes=[(2, 9, 5)])
    model_trt = torch2rt(made, [x], cuda_graph=True, **ranges)
    counted = []
    monkeypatch.setattr(
        pool_file, "CudaGraph", lambda *args, **options: counted.append(1) or CudaGraph(*args, **options)
    )
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for size in (2, 3, 2, 4):
                x = torch.randn((size, 6, 5) if dynamic == "batch" else (2, size + 3, 5), device=device)
                close(model_trt(x), made(x))
    torch.cuda.synchronize()
    if model_trt.cuda_graph_refused is None:
        assert len(counted) > 3  # this TensorRT can
        return
    assert len(counted) <= 3 and f"without CUDA graphs: {model_trt.cuda_graph_refused}" in repr(model_trt)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model_trt(x)
    torch.cuda.synchronize()
    refused = pytest.raises(EngineError, match="call the module outside of the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        model_trt(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        close(model_trt(x), made(x))


def test_inference_mode_and_gradients(net, model_trt):
    x = images()
    with torch.no_grad():
        expected = net(x)
    with torch.inference_mode():
        close(model_trt(x), expected)
    x.requires_grad_()
    assert not model_trt(x).requires_grad


BAD = {
    "dtype": lambda: torch.randn(2, 3, 16, 16, device="cuda").half(),
    "device": lambda: torch.randn(2, 3, 16, 16),
    "rank": lambda: torch.randn(3, 16, 16, device="cuda"),
    "channels": lambda: torch.randn(2, 4, 16, 16, device="cuda"),
    "too large": lambda: torch.randn(5, 3, 16, 16, device="cuda"),
    "too small": lambda: torch.randn(2, 3, 4, 16, device="cuda"),
    "empty": lambda: torch.randn(0, 3, 16, 16, device="cuda"),
    "sparse": lambda: torch.randn(2, 3, 16, 16, device="cuda").to_sparse(),
    "a list": lambda: [1.0, 2.0],
    "none": lambda: None,
    "meta": lambda: torch.randn(2, 3, 16, 16, device="meta"),
    "complex": lambda: torch.randn(2, 3, 16, 16, device="cuda", dtype=torch.complex64),
}


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_bad_callers_get_an_error_and_the_module_still_works(net, model_trt, make, graph):
    x = images()
    model_trt.cuda_graph = graph
    try:
        for _ in range(2):
            with pytest.raises(InputError):
                model_trt(make())
            with torch.no_grad():
                close(model_trt(x), net(x))
    finally:
        model_trt.cuda_graph = False
    torch.cuda.synchronize()


def test_a_fake_tensor_and_one_inside_of_vmap(model_trt):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(InputError):
        model_trt(mode.from_tensor(torch.empty(2, 3, 16, 16, device="cuda")))
    with pytest.raises((InputError, RuntimeError)):
        torch.vmap(model_trt)(torch.randn(2, 2, 3, 16, 16, device="cuda"))


GOOD = {
    "strided": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "negated": lambda x: torch.view_as_complex(torch.stack([x, x], -1)).conj().imag,
    "flipped": lambda x: x.flip(0),
    "parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("layout", GOOD.values(), ids=GOOD)
def test_layouts(net, model_trt, layout, graph):
    model_trt.cuda_graph = graph
    with torch.no_grad():
        for _ in range(2):
            x = layout(torch.randn(2, 3, 18, 22, device="cuda"))
            close(model_trt(x), net(x))
    model_trt.cuda_graph = False


def test_the_same_tensor_twice_and_empty_ones(device):
    made = module(lambda self, x, y: (x * 2 + y, x.sum(0)))
    ranges = {"min_shapes": [(0, 3), (0, 3)], "opt_shapes": [(2, 3), (2, 3)], "max_shapes": [(4, 3), (4, 3)]}
    ranges["min_shapes"] = [(1, 3), (1, 3)]
    model_trt = torch2rt(made, [torch.randn(2, 3, device=device)] * 2, **ranges)
    x = torch.randn(3, 3, device=device)
    for graph in (False, True):
        model_trt.cuda_graph = graph
        compare(model_trt(x, x), made(x, x))
        compare(model_trt(x, x[:1].expand(3, -1)), made(x, x[:1].expand(3, -1)))


def test_closing_down_while_calls_are_under_way(net, device):
    for graph in (False, True):
        x = torch.randn(4, 3, 32, 32, device=device)
        model_trt = torch2rt(net, [x], cuda_graph=graph)
        with torch.no_grad():
            expected = net(x)
        results = [model_trt(x) for _ in range(50)]
        del model_trt
        gc.collect()
        for y in results:
            close(y, expected)


# How a process ends --------------------------------------------------------------------------------------------------

ENDING = """
import gc, os, sys, threading, time
import torch
from torch2rt import TRTModule

path, how, graph = sys.argv[1], sys.argv[2], sys.argv[3] == "graph"
x = torch.randn(2, 3, 16, 16, device="cuda")
if how == "torch":  # the same without torch2rt
    made = torch.nn.Conv2d(3, 4, 3).cuda().requires_grad_(False)
else:
    made = TRTModule.from_engine(path)
    made.cuda_graph = graph
    made(x)
holder, stop, begun = [made], threading.Event(), threading.Barrier(5)

def work():
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.randn(2, 3, 16, 16, device="cuda")
        torch.cuda.current_stream().synchronize()
        begun.wait()
        while not stop.is_set():
            try:
                function = holder[0]
            except IndexError:
                return
            function(x)

daemon = how in ("daemons", "torch")
threads = [threading.Thread(target=work, daemon=daemon) for _ in range(4)]
for thread in threads:
    thread.start()
begun.wait()
time.sleep(0.3)
if how == "deleted":
    del made
    holder.clear()
    gc.collect()
if how == "stopped":
    stop.set()
if how == "raised":
    stop.set()
    sys.exit(0)
if how == "interpreter":  # a cycle, so that the garbage collector of a dying interpreter finds it
    made.itself = [made]
    stop.set()
"""


def ends(tmp_path, model_trt, how, graph):
    model_trt.save_engine(tmp_path / "model.engine")
    (tmp_path / "ending.py").write_text(ENDING)
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        str(tmp_path / "ending.py"),
        str(tmp_path / "model.engine"),
        how,
        "graph" if graph else "plain",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("how", ["stopped", "deleted", "raised", "interpreter"])
def test_a_process_ends_quietly_with_calls_under_way(tmp_path, model_trt, how, graph):
    assert ends(tmp_path, model_trt, how, graph) == (0, "")


def test_a_process_ends_quietly_under_daemon_threads(tmp_path, model_trt):
    """Where torch itself survives that its threads are cut off in the middle of a call, so does a module."""
    if any(ends(tmp_path, model_trt, "torch", False) != (0, "") for _ in range(2)):
        pytest.skip("torch alone does not end quietly under daemon threads here")
    for graph in (False, True):
        for _ in range(2):
            assert ends(tmp_path, model_trt, "daemons", graph) == (0, "")


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_the_first_deed_of_a_thread_may_be_a_call(net, model_trt, graph):
    inputs = [torch.randn(2, 3, 16, 16, device="cuda") for _ in range(4)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    torch.cuda.synchronize()
    results = {}

    def work(place):
        results[place] = model_trt(inputs[place])

    with as_told(model_trt, graph):
        at_once([lambda place=place: work(place) for place in range(4)])
    assert len(results) == 4
    for place, y in results.items():
        close(y, expected[place])


def test_the_first_deed_of_a_thread_may_be_another_capture_or_the_end(net, device):
    x = torch.randn(2, 3, 16, 16, device=device)
    other = x.clone()
    fast = torch2rt(net, [x], cuda_graph=True)
    expected, results = fast(x), []
    torch.cuda.synchronize()
    at_once([lambda: results.append(fast(other))])
    at_once([lambda: results.append(fast(x))])
    for y in results:
        close(y, expected)
    pool = fast._ready()
    at_once([pool.close])
    assert len(results) == 2 and pool.loaded.engine is None and not pool.graphs


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_calls_do_not_wait_for_the_gpu_where_torch_would_tell(net, device, graph):
    fast = torch2rt(net, [images()], min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 32, 32)], cuda_graph=graph)
    inputs = [torch.randn(2, 3, 8 + turn, 9, device=device) for turn in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [fast(x) for x in [*inputs, *inputs]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for x, y in zip([*inputs, *inputs], results, strict=True):
            close(y, net(x))


# Whose memory it is --------------------------------------------------------------------------------------------------


def requested():
    """Bytes that torch has handed out now, and at most since the last reset, without its rounding."""
    stats = torch.cuda.memory_stats()
    return stats["requested_bytes.all.current"], stats["requested_bytes.all.peak"]


@pytest.fixture(scope="module")
def large(device):
    """A module with images of 64 MiB between its layers, and ones of 3 MiB at its ends."""
    if device.type != "cuda":
        return None
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 3, 3, padding=1),
    ]
    net = torch.nn.Sequential(*layers).eval().to(device)
    x = torch.randn(4, 3, 256, 256, device=device)
    with torch.no_grad():
        return net, x, net(x), torch2rt(net, [x])


def test_outputs_and_scratch_memory_are_torchs(large):
    _, x, expected, model_trt = large
    model_trt(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, outside = requested()[0], torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    y = model_trt(x)
    torch.cuda.synchronize()
    now, peak = requested()
    assert now - before == y.nbytes
    assert peak - before >= y.nbytes + (64 << 20)  # one of the images between the layers has to be somewhere
    assert abs(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - outside) <= 8 << 20
    close(y, expected)
    del y
    assert requested()[0] == before


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_out_of_memory_is_torchs_error_and_passes(large, graph, layout):
    net, x, expected, _ = large
    model_trt = torch2rt(net, [x])
    if layout == "strided":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    total = torch.cuda.get_device_properties(x.device).total_memory
    for warm in (False, True):
        if warm and not graph:
            close(model_trt(x), expected)
        model_trt.cuda_graph = graph and not warm
        model_trt._ready((x,))  # an engine's own memory is not what is short
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min((torch.cuda.memory_reserved() + (1 << 20)) / total, 1.0))
        try:
            for _ in range(3):
                with pytest.raises(torch.OutOfMemoryError):
                    model_trt(x)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        model_trt.cuda_graph = graph
        for _ in range(2):
            close(model_trt(x), expected)
    torch.cuda.synchronize()
