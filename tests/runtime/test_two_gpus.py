"""One process, or one for each, on two GPUs: an engine stays where it was put, whatever is current."""

import random

import pytest
import torch
from harness.threads import at_once
from test_runtime import RANGES, close, images, make_net

from torch2rt import TRTModule, torch2rt
from torch2rt.errors import InputError

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def _on_gpus(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")


@pytest.fixture(scope="module")
def net(device):
    return make_net(device)


@pytest.fixture(scope="module")
def model_trt(net, device):
    model_trt = torch2rt(net, [torch.randn(2, 3, 16, 16, device=device)], **RANGES)
    model_trt(torch.randn(2, 3, 16, 16, device="cuda:0"))
    return model_trt


def copy_on(model_trt, index):
    made = TRTModule()
    made.load_state_dict(model_trt.state_dict())
    return made.to(f"cuda:{index}")


GRAPHS = pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])


def test_an_engine_lives_where_it_was_put(net, model_trt, tmp_path):
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


def test_data_parallel(net, model_trt):
    x = torch.randn(4, 3, 16, 16, device="cuda:0")
    with torch.no_grad():
        close(torch.nn.DataParallel(model_trt, [0, 1])(x), net(x))


def test_two_gpus_at_once(net, model_trt):
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


@GRAPHS
def test_another_gpu_is_current(net, model_trt, graph):
    """The call is of the engine's GPU and in its current stream; the caller's choice is as it was."""
    x = images()
    with torch.no_grad():
        expected = net(x)
    torch.cuda.synchronize(0)
    made = copy_on(model_trt, 0)
    made.cuda_graph = graph
    with torch.cuda.device(1):
        for _ in range(3):
            y = made(x)
            assert y.device == x.device and torch.cuda.current_device() == 1
            close(y, expected)
        first_call = copy_on(model_trt, 0)
        first_call.cuda_graph = graph
        close(first_call(x), expected)
        undecided = TRTModule()
        undecided.load_state_dict(model_trt.state_dict())
        close(undecided(x), expected)
        assert undecided.device == torch.device("cuda:0") and torch.cuda.current_device() == 1


@GRAPHS
def test_streams_of_the_other_gpu_are_current(net, model_trt, graph):
    x = images()
    with torch.no_grad():
        expected = net(x)
    torch.cuda.synchronize(0)
    made = copy_on(model_trt, 0)
    made.cuda_graph = graph
    mine = torch.cuda.Stream(0)
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream(1)):
            close(made(x), expected)
            with torch.cuda.stream(mine):
                own = made(x)
            mine.synchronize()
            close(own, expected)
        with torch.cuda.stream(mine), torch.cuda.stream(torch.cuda.Stream(1)):  # each GPU has a current one
            kept = x.clone()
            y = made(kept)
            with torch.cuda.device(0):
                assert torch.cuda.current_stream() == mine
            mine.synchronize()
            close(y, expected)
    assert torch.cuda.current_device() == 0


@GRAPHS
def test_bad_callers_on_two_gpus(net, model_trt, graph):
    modules = [copy_on(model_trt, index) for index in range(2)]
    x = images()
    with torch.no_grad():
        expected = net(x)
    for index, made in enumerate(modules):
        made.cuda_graph = graph
        for current in range(2):
            with torch.cuda.device(current):
                close(made(x.to(f"cuda:{index}")).to("cuda:0"), expected)
                for bad in (x.to(f"cuda:{1 - index}"), x.cpu(), x.to(f"cuda:{index}").half()):
                    with pytest.raises(InputError):
                        made(bad)
                    close(made(x.to(f"cuda:{index}")).to("cuda:0"), expected)
                assert torch.cuda.current_device() == current


def test_from_one_gpu_to_the_other_and_back(net, model_trt):
    x = images()
    with torch.no_grad():
        expected = net(x)
    made = copy_on(model_trt, 1)
    for index in (1, 0, 1, 1, 0):
        made.to(f"cuda:{index}")
        assert made.device == torch.device("cuda", index)
        for graph in (False, True):
            made.cuda_graph = graph
            close(made(x.to(f"cuda:{index}")).to("cuda:0"), expected)
        made.load_state_dict(model_trt.state_dict())  # it stays where it is
        assert made.device == torch.device("cuda", index)
        close(made(x.to(f"cuda:{index}")).to("cuda:0"), expected)


@GRAPHS
def test_threads_on_both_gpus(net, model_trt, graph):
    modules = [copy_on(model_trt, index) for index in range(2)]
    inputs = [images(random.Random(seed)) for seed in range(3)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    given = [[x.to(f"cuda:{index}") for x in inputs] for index in range(2)]
    right = [[y.to(f"cuda:{index}") for y in expected] for index in range(2)]
    for index in range(2):
        modules[index].cuda_graph = graph
        torch.cuda.synchronize(index)

    def work(seed):
        choose = random.Random(seed)
        streams = [torch.cuda.Stream(index) for index in range(2)]
        worst = [torch.zeros((), device=f"cuda:{index}") for index in range(2)]
        for index in range(2):
            streams[index].wait_stream(torch.cuda.default_stream(index))
        torch.cuda.set_device(seed % 2)
        for _ in range(300):
            index, place = choose.randrange(2), choose.randrange(len(inputs))
            with torch.cuda.stream(streams[index]):
                error = (modules[index](given[index][place]) - right[index][place]).abs().amax()
                torch.maximum(worst[index], error, out=worst[index])
        for index in range(2):
            with torch.cuda.stream(streams[index]):
                assert worst[index].item() < 1e-3

    at_once([lambda seed=seed: work(seed) for seed in range(4)])


@GRAPHS
def test_data_parallel_again_and_again(net, model_trt, graph):
    made = copy_on(model_trt, 0)
    made.cuda_graph = graph
    parallel = torch.nn.DataParallel(made, [0, 1])
    for batch in (4, 2, 3, 4):
        x = torch.randn(batch, 3, 16, 16, device="cuda:0")
        with torch.no_grad():
            close(parallel(x), net(x))


def run_on_one_gpu(index, path, x, expected):
    """What each process does."""
    torch.cuda.set_device(index)
    made = TRTModule.from_engine(path)
    for graph in (False, True):
        made.cuda_graph = graph
        for _ in range(20):
            close(made(x.cuda()).cpu(), expected)
    assert made.device == torch.device("cuda", index)


def test_a_process_for_each_gpu(net, model_trt, tmp_path):
    model_trt.save_engine(tmp_path / "model.engine")
    x = images()
    with torch.no_grad():
        expected = net(x)
    context = torch.multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "model.engine"), x.cpu(), expected.cpu())
    processes = [context.Process(target=run_on_one_gpu, args=(index, *arguments)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
