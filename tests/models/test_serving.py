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
    config = uvicorn.Config(serve.application(batcher, metrics), port=port, log_level="error")
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


def test_outputs_that_are_no_rows_are_an_error(served):
    serve, _, batcher, _ = served
    broken = serve.Batcher(
        lambda x, weights: {"scores": x.sum(0), "best": weights}, batcher.interface, torch.device("cpu"), 1, 0.2
    )
    futures = [broken.submit([torch.rand(2, 5), torch.rand(2)]) for _ in range(2)]
    for future in futures:
        with pytest.raises(RuntimeError, match="--no-batching"):
            future.result(10)
    broken.close()
