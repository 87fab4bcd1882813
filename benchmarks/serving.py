"""Requests per second, latencies and errors of `examples/serve.py` with a model of torchvision, or BERT.

    python benchmarks/serving.py resnet50 bert_base --seconds 30

Each model is converted with a batch of 1 to 16, saved, and served by a process of its own, which
`examples/load_test.py` asks. Without a GPU the reference is served, with `--tiny` models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from torch2rt import save, torch2rt

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
from load_test import load  # noqa: E402
from refit import made  # noqa: E402


def wait_for(url, server, seconds=120):
    """Wait until a server is warm; raises `RuntimeError` where it ends or takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).read()
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"The server has not come up ({server.poll()=}).")


def measure(name, arguments, folder):
    """What a load test of a model says, after the seconds until the server was warm."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = (value.to(device) for value in made(name, arguments.tiny))
    model_trt = torch2rt(model.eval(), [x], max_batch_size=arguments.batch, precision=arguments.precision)
    path, port = Path(folder) / f"{name}.t2rt", arguments.port
    save(model_trt, path, inputs=[x], source=device == "cpu", kernels=device == "cuda")
    del model, model_trt
    how = ["--reference"] if device == "cpu" else ["--cuda-graph"]
    how += ["--threads", str(arguments.threads), "--delay", str(arguments.delay), "--port", str(port)]
    start, url = time.monotonic(), f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, str(HERE.parent / "examples/serve.py"), str(path), *how])
    try:
        wait_for(url, server)
        found = {"server warm after s": round(time.monotonic() - start, 1)}
        for clients in arguments.clients:
            row = load(url, arguments.seconds, clients, processes=min(clients, arguments.processes))
            found[f"{clients} clients"] = row
            print(name, clients, "clients", json.dumps(row), flush=True)
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
        rows, calls = (
            next(float(line.split()[1]) for line in metrics if line.startswith(f"torch2rt_batch_rows_{what} "))
            for what in ("sum", "count")
        )
        found["rows a call"] = rows / calls
        found["answers"] = [line for line in metrics if line.startswith("torch2rt_requests_total")]
    finally:
        server.terminate()
        server.wait()
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description="Load tests of examples/serve.py.")
    parser.add_argument("models", nargs="*", default=["resnet50", "bert_base"])
    parser.add_argument("--seconds", type=float, default=20, help="of each load test (default: 20)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32], help="one load test each (default: 1 32)")
    parser.add_argument("--processes", type=int, default=8, help="that the clients are threads of (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the largest call (default: 16)")
    parser.add_argument("--threads", type=int, default=2, help="calls at once (default: 2)")
    parser.add_argument("--delay", type=float, default=2.0, help="milliseconds to wait for other requests (default: 2)")
    parser.add_argument("--precision", help="as for torch2rt.torch2rt")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tiny", action="store_true", help="small models, which a CPU evaluates in time")
    parser.add_argument("--json", help="write the result to a file")
    arguments = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            results[name] = measure(name, arguments, folder)
            print(json.dumps({name: results[name]}, indent=2), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
