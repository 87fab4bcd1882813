"""Calls on a GPU: streams, threads, graphs, memory, and callers who do it wrong."""

import gc
import random
import threading

import pytest
import torch
from harness import compare
from test_tracing import module

from torch2rt import TRTModule, torch2rt
from torch2rt.errors import EngineError, InputError


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")


@pytest.fixture(scope="module")
def net(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3)).eval().to(device)


@pytest.fixture(scope="module")
def model_trt(net, device):
    ranges = {"min_shapes": [(1, 3, 8, 8)], "opt_shapes": [(2, 3, 16, 16)], "max_shapes": [(4, 3, 32, 32)]}
    if device.type == "cuda":
        return torch2rt(net, [torch.randn(2, 3, 16, 16, device=device)], **ranges)


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
    model_trt.cuda_graph = graph
    generator = random.Random(0)
    inputs = [images(generator) for _ in range(12)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(seed):
        mine = random.Random(seed)
        stream = torch.cuda.default_stream() if seed % 4 == 0 else torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for _ in range(150):
                    chosen = [mine.randrange(len(inputs)) for _ in range(3)]
                    for i, y in [(i, model_trt(inputs[i])) for i in chosen]:
                        close(y, expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model_trt.cuda_graph = False
    if failures:
        raise failures[0]


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


def test_more_shapes_than_graphs_are_kept(net, device):
    fast = torch2rt(
        net, [torch.randn(1, 3, 8, 8, device=device)], max_shapes=[(1, 3, 8, 40)], cuda_graph=True
    )
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


def test_memory_does_not_grow(net, model_trt):
    inputs = [images() for _ in range(4)]
    for graph in (False, True):
        model_trt.cuda_graph = graph
        for x in inputs * 3:
            model_trt(x)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for turn in range(20_000):
            model_trt(inputs[turn % 4])
        torch.cuda.synchronize()
        gc.collect()
        assert torch.cuda.memory_allocated() <= before[0]
        assert torch.cuda.memory_reserved() <= before[1]
    model_trt.cuda_graph = False


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestTwoGPUs:
    def test_an_engine_lives_where_it_was_put(self, net, model_trt, tmp_path):
        x = images()
        with torch.no_grad():
            expected = net(x)
        model_trt(x)
        with torch.cuda.device(1):
            close(model_trt(x), expected)
        with pytest.raises(InputError, match="is on cuda:1, the engine on cuda:0"):
            model_trt(x.to("cuda:1"))
        other = TRTModule()
        other.load_state_dict(model_trt.state_dict())
        close(other.to("cuda:1")(x.to("cuda:1")).to("cuda:0"), expected)
        assert other.device == torch.device("cuda:1")
        close(other.to("cuda:0")(x), expected)

    def test_data_parallel(self, net, model_trt):
        x = torch.randn(4, 3, 16, 16, device="cuda:0")
        with torch.no_grad():
            close(torch.nn.DataParallel(model_trt, [0, 1])(x), net(x))

    def test_two_gpus_at_once(self, net, model_trt):
        other = TRTModule()
        other.load_state_dict(model_trt.state_dict())
        modules = [model_trt, other.to("cuda:1")]
        inputs = [images() for _ in range(6)]
        with torch.no_grad():
            expected = [net(x) for x in inputs]
        for _ in range(50):
            for x, y in zip(inputs, expected, strict=True):
                results = [m(x.to(f"cuda:{i}")) for i, m in enumerate(modules)]
                for result in results:
                    close(result.to("cuda:0"), y)
