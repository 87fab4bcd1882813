"""The examples of serving: what is answered is the model's, whoever else asks at the same time."""

import socket
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
import torch
from test_examples import load

from torch2rt import save, torch2rt


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, x, *, weights):
        return {"scores": self.layer(x).softmax(-1) * weights.unsqueeze(1), "best": self.layer(x).argmax(-1)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The module `serve`, its application's address, the batcher, and the model."""
    for package in ("uvicorn", "starlette", "prometheus_client"):
        pytest.importorskip(package, reason=f"examples/serve.py needs {package}")
    import uvicorn

    serve = load("examples/serve.py")
    model, x, weights = Scores().eval(), torch.randn(2, 5), torch.rand(2)
    path = tmp_path_factory.mktemp("served") / "model.t2rt"
    model_trt = torch2rt(model, [x], kwargs={"weights": weights}, max_batch_size=6, progress=False)
    save(model_trt, path, source=True)
    reference = serve.load(path).reference()
    reference.warm_up()
    metrics = serve.Metrics()
    batcher = serve.Batcher(reference, reference.interface, torch.device("cpu"), 2, 0.02, metrics)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(serve.application(batcher, metrics, patience=0.5), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield serve, f"http://127.0.0.1:{port}", batcher, model
    server.should_exit = True
    thread.join()
    batcher.close()


def get(url, path, body=None):
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url + path, body) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def tensors(**arrays):
    return safetensors.numpy.save(arrays)


def test_answers_are_the_models_own(served):
    _, url, _, model = served
    x, weights = torch.randn(3, 5), torch.rand(3)
    status, body = get(url, "/infer", tensors(x=x.numpy(), weights=weights.numpy()))
    assert status == 200
    answer = safetensors.numpy.load(body)
    expected = model(x, weights=weights)
    torch.testing.assert_close(torch.from_numpy(answer["output_0"]), expected["scores"].detach())
    assert answer["output_1"].tolist() == expected["best"].tolist()


WRONG = [
    (b"text", "no safetensors file"),
    (tensors(x=np.ones((2, 5), np.float32)), r"The inputs are \['x', 'weights'\]"),
    (tensors(x=np.ones((7, 5), np.float32), weights=np.ones(7, np.float32)), "has size 7 in dimension 0"),
    (tensors(x=np.ones((2, 5), np.float64), weights=np.ones(2, np.float32)), "is torch.float64"),
    (
        tensors(x=np.ones((2, 5), np.float32), weights=np.ones(3, np.float32)),
        r"needs x\.shape\[0\] == weights\.shape\[0\]",
    ),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_the_model_does_not_take_is_named(served, body, message):
    import re

    status, text = get(served[1], "/infer", body)
    assert status == 400 and re.search(message, text.decode()), text


def test_under_load_every_answer_is_the_one_of_a_request_alone(served):
    _, url, batcher, _ = served
    before = batcher.metrics.rows._sum.get()
    results = load("examples/load_test.py").load(url, seconds=1.5, count=6, rows=3, processes=1)
    assert results["errors"] == 0 and results["requests"] > 20, results
    assert 0 < results["p50 ms"] <= results["p99 ms"]
    _, text = get(url, "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    calls = float(lines["torch2rt_batch_rows_count"])
    assert float(lines["torch2rt_batch_rows_sum"]) - before > results["requests"]
    assert calls < float(lines['torch2rt_requests_total{status="200"}']), "several requests ran as one call"
    assert get(url, "/health") == (200, b"ready")


def test_requests_of_other_sizes_are_not_put_together(served):
    serve, _, _, _ = served
    seen = []

    def model(x):
        seen.append(tuple(x.shape))
        return x * 2

    from torch2rt.interface import Input, Interface

    spec = Input("x", torch.float32, (1, 2), (2, 3), (4, 9))
    call = {"tuple": [{"tuple": [{"leaf": 0}]}, {"dict": [], "items": []}]}
    interface = Interface([spec], call, ["x"], ["y"], {"leaf": 0}, [{"output": 0}])
    batcher = serve.Batcher(model, interface, torch.device("cpu"), 1, 0.2)
    given = [torch.rand(1, 3), torch.rand(2, 4), torch.rand(2, 3), torch.rand(3, 3), torch.rand(1, 3)]
    futures = [batcher.submit([x]) for x in given]
    for x, future in zip(given, futures):
        assert torch.equal(future.result(10)["y"], 2 * x)
    batcher.close()
    assert sorted(seen) == [(2, 4), (3, 3), (4, 3)] and all(shape[0] <= 4 for shape in seen)


def batcher_of(served, model, **options):
    serve, _, batcher, _ = served
    return serve.Batcher(model, batcher.interface, torch.device("cpu"), **{"threads": 1, "delay": 0.2, **options})


def scores(x, weights):
    return {"scores": x * weights.unsqueeze(1), "best": x.argmax(-1)}


MIXED = {
    "no rows": lambda x, weights: {"scores": x.sum(0), "best": weights},
    "mean": lambda x, weights: {"scores": x - x.mean(0), "best": weights},
    "softmax": lambda x, weights: {"scores": x, "best": weights.softmax(0)},
    "order": lambda x, weights: {"scores": x.flip(0), "best": weights},
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_depend_on_others_are_not_put_together(name, served):
    mixing = batcher_of(served, MIXED[name])
    with pytest.raises(RuntimeError, match="--no-batching"):
        mixing.check_rows()
    mixing.batches = False
    mixing.check_rows()
    mixing.close()
    right = batcher_of(served, scores)
    right.check_rows()
    right.close()


def test_a_request_that_fails_takes_no_other_with_it(served):
    def model(x, weights):
        if (x == 113).any():
            raise IndexError("a number that is no index")
        return scores(x, weights)

    batcher = batcher_of(served, model)
    given = [torch.rand(1, 5), torch.full((2, 5), 113.0), torch.full((1, 5), float("nan")), torch.rand(1, 5)]
    futures = [batcher.submit([x, torch.rand(len(x))]) for x in given]
    with pytest.raises(IndexError, match="no index"):
        futures[1].result(10)
    for place in (0, 2, 3):
        assert futures[place].result(10)["output_1"].tolist() == given[place].argmax(-1).tolist()
    assert futures[2].result()["output_0"].isnan().all() and not futures[3].result()["output_0"].isnan().any()
    batcher.close()


def test_who_goes_away_while_others_wait(served):
    started, go = threading.Event(), threading.Event()

    def model(x, weights):
        started.set()
        go.wait(10)
        return scores(x, weights)

    batcher = batcher_of(served, model, delay=0.0, queue=3)
    first = batcher.submit([torch.rand(1, 5), torch.rand(1)])
    started.wait(10)
    waiting = [batcher.submit([torch.rand(n, 5), torch.rand(n)]) for n in (1, 2, 3)]
    with pytest.raises(served[0].Busy, match="3 requests are waiting"):
        batcher.submit([torch.rand(1, 5), torch.rand(1)])
    assert waiting[1].cancel() and not first.cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher.closed:
        time.sleep(0.01)
    with pytest.raises(served[0].Busy, match="ends"):
        batcher.submit([torch.rand(1, 5), torch.rand(1)])
    go.set()
    closing.join(10)
    assert [len(future.result(10)["output_1"]) for future in (first, waiting[0], waiting[2])] == [1, 1, 3]


def connected(url):
    address, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((address, int(port)), timeout=10)


def counted(url, status):
    text = get(url, "/metrics")[1].decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(lines.get(f'torch2rt_requests_total{{status="{status}"}}', 0))


def test_bodies_that_are_too_large_too_slow_or_never_end(served):
    _, url, _, _ = served
    with connected(url) as large:
        large.sendall(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nabc")
        assert large.recv(99).startswith(b"HTTP/1.1 413")
    with connected(url) as slow:  # it says that there is more, and sends nothing
        slow.sendall(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
        assert slow.recv(99).startswith(b"HTTP/1.1 408")
    with connected(url) as endless:
        endless.sendall(b"POST /infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                endless.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                time.sleep(0.001)
    before = counted(url, 499)
    with connected(url) as gone:
        gone.sendall(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
    deadline = time.monotonic() + 10
    while counted(url, 499) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted(url, 499) == before + 1 and counted(url, 413) == 2 and counted(url, 408) == 1
    assert get(url, "/health") == (200, b"ready")
