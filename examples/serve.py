"""Serve a file of `torch2rt.save` over HTTP, without the Python of the model, with dynamic batching on many threads.

    pip install 'torch2rt[serve]'
    python examples/serve.py model.t2rt --threads 4 --delay 2          # needs a GPU
    python examples/serve.py model.t2rt --reference                    # without one, if saved with source=True
    python examples/load_test.py http://127.0.0.1:8000 --seconds 60

`POST /infer` takes the inputs by name as a safetensors file and returns the outputs as one. Requests whose inputs are
of the same sizes but for the first dimension run as one call, as long as the engine serves it. `GET /metrics` is for
Prometheus, `GET /metadata` says what the model takes, and `GET /health` answers once the engine is warm.

What the model does not take is answered with 400, a body larger than its inputs can be with 413, one that takes too
long to arrive with 408, and with 503 what comes while too many requests wait, or while the server ends.
"""

import argparse
import asyncio
import collections
import dataclasses
import math
import threading
import time
from concurrent.futures import Future

import safetensors.torch
import torch
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from torch2rt import InputError, load
from torch2rt.structure import flatten, unflatten

HEADER = 1 << 16  # bytes of a safetensors file beside the tensors


@dataclasses.dataclass(eq=False)  # each is itself
class Request:
    """Tensors in the order of the inputs, and where their outputs go. Requests of one `kind` can be one call."""

    tensors: list
    kind: tuple
    rows: int
    result: Future
    arrived: float


class Busy(Exception):
    """There is no place for another request."""


class Batcher:
    """Runs requests on threads, several as one call where their sizes allow it.

    - `model`: a converted module, or its reference. `interface`: what it takes.
    - `threads`: calls at once, each on a CUDA stream of its own. `delay`: seconds that a request waits for others.
    - `queue`: how many requests may wait.

    Requests are put together along dimension 0 if that is dynamic in every input; a result of other rows is an error.
    Where a call of several requests fails, each is run by itself, so that those that are right are answered.
    """

    def __init__(self, model, interface, device, threads=2, delay=0.002, metrics=None, queue=1024):
        self.model, self.interface, self.device, self.delay, self.metrics = model, interface, device, delay, metrics
        self.queue, self.served = queue, {}
        ranges = {(spec.min[0], spec.max[0]) for spec in interface.inputs if spec.min}
        self.batches = len(ranges) == 1 and all(0 in spec.dynamic for spec in interface.inputs)
        self.most = next(iter(ranges))[1] if self.batches else 1
        self.waiting, self.lock = collections.deque(), threading.Condition()
        self.closed = False
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def submit(self, tensors):
        """The future of the outputs by name.

        Raises `InputError` for tensors that the model does not take, and `Busy` while too many requests wait.
        """
        shapes = [tuple(x.shape) for x in tensors]
        self.interface.check(shapes, [x.dtype for x in tensors])
        rows = {shape[0] for shape in shapes} if self.batches else {1}
        if len(rows) != 1:
            raise InputError(f"The inputs have {sorted(rows)} rows; all must have the same number.")
        kind = tuple(shape[1:] if self.batches else shape for shape in shapes)
        request = Request(tensors, kind, rows.pop(), Future(), time.monotonic())
        with self.lock:
            if self.closed or len(self.waiting) >= self.queue:
                raise Busy("The server ends." if self.closed else f"{self.queue} requests are waiting.")
            self.waiting.append(request)
            self.lock.notify_all()  # one that is woken may be waiting for requests of other sizes
        return request.result

    def close(self):
        """Answer what is waiting, and end the threads."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        for thread in self.threads:
            thread.join()

    def _next(self):
        """The requests of the next call; none when there will be no more."""
        with self.lock:
            while not self.waiting:
                if self.closed:
                    return []
                self.lock.wait()
            batch = [self.waiting.popleft()]
            rows, end = batch[0].rows, batch[0].arrived + self.delay
            while self.batches:
                kind = batch[0].kind
                others = [r for r in self.waiting if r.kind == kind and self._serves(kind, r.rows + rows)]
                if others:
                    self.waiting.remove(others[0])
                    batch.append(others[0])
                    rows += others[0].rows
                elif rows >= self.most or self.closed or not self.lock.wait(end - time.monotonic()):
                    return batch
                if time.monotonic() >= end and not others:
                    return batch
            return batch

    def _serves(self, kind, rows):
        """Whether requests of a kind that have so many rows together can be one call."""
        if (kind, rows) not in self.served:
            if len(self.served) > 10_000:
                self.served.clear()
            self.served[kind, rows] = rows <= self.most and self.interface.serves([(rows, *sizes) for sizes in kind])
        return self.served[kind, rows]

    def _work(self):
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        with torch.cuda.stream(stream), torch.no_grad():
            while batch := self._next():
                # From here on, nobody can cancel them, as is done where a client has gone.
                self._answer([request for request in batch if request.result.set_running_or_notify_cancel()])

    def _answer(self, batch):
        try:
            results = self._run(batch) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
            else:
                for request in batch:
                    self._answer([request])
        else:
            for request, result in zip(batch, results, strict=True):
                request.result.set_result(result)

    def check_rows(self):
        """Raise `RuntimeError` for a model whose rows depend on each other: requests must not be put together then."""
        specs = self.interface.inputs
        if not self.batches:
            return
        kind, rows = tuple(spec.opt[1:] for spec in specs), max(1, *(spec.min[0] for spec in specs))
        if not (self._serves(kind, rows) and self._serves(kind, 2 * rows)):
            return
        drawn = [_drawn(spec, (2 * rows, *spec.opt[1:])).split(rows) for spec in specs]
        batch = [Request(list(tensors), kind, rows, Future(), 0.0) for tensors in zip(*drawn)]
        with torch.no_grad():
            together, apart = self._run(batch), [self._run([request])[0] for request in batch]
        for ours, theirs in zip(together, apart, strict=True):
            for name, y in theirs.items():
                most = 2e-2 * y.abs().double().max().item() if y.numel() else 0.0
                if not torch.allclose(ours[name].double(), y.double(), rtol=0, atol=most, equal_nan=True):
                    raise RuntimeError(
                        f"A row of the output {name} depends on the other rows of its batch, so that requests cannot "
                        "be put together: serve with --no-batching."
                    )

    def _run(self, batch):
        together = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*(r.tensors for r in batch))]
        args, kwargs = unflatten(self.interface.arguments, [x.to(self.device) for x in together])
        outputs, _ = flatten(self.model(*args, **kwargs), torch.is_tensor)
        names = [self.interface.outputs[leaf["output"]] for leaf in self.interface.leaves if "output" in leaf]
        outputs = {name: y.cpu() for name, y in zip(names, outputs, strict=True)}
        if self.metrics is not None:
            self.metrics.rows.observe(sum(request.rows for request in batch))
        if len(batch) == 1:
            return [outputs]
        rows = [request.rows for request in batch]
        if wrong := [name for name, y in outputs.items() if not y.dim() or len(y) != sum(rows)]:
            raise RuntimeError(f"The outputs {wrong} do not have the rows of the inputs: serve with --no-batching.")
        return [dict(zip(outputs, parts)) for parts in zip(*(y.split(rows) for y in outputs.values()))]


def _drawn(spec, shape):
    """Numbers for an input: any that is not 0, but few where they may be indices."""
    if spec.dtype.is_floating_point:
        return torch.randn(shape).to(spec.dtype)
    return torch.randint(0, 2, shape).to(spec.dtype)


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self):
        self.registry = CollectorRegistry()
        make = {"registry": self.registry}
        self.requests = Counter("torch2rt_requests", "Requests, by the status of their answer", ["status"], **make)
        steps = [0.001 * 2**i for i in range(14)]
        self.seconds = Histogram("torch2rt_request_seconds", "From a request to its answer", buckets=steps, **make)
        self.rows = Histogram("torch2rt_batch_rows", "Rows of a call", buckets=[2**i for i in range(11)], **make)
        self.waiting = Gauge("torch2rt_waiting_requests", "Requests that no call has taken yet", **make)


class TooLarge(Exception):
    """A body that is larger than the inputs can be."""


async def body_of(request, most):
    """A request's body; raises `TooLarge` as soon as it has more bytes than that."""
    if int(request.headers.get("content-length", 0)) > most:
        raise TooLarge
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)


def application(batcher, metrics, patience=60.0):
    """The ASGI application. `patience`: seconds in which a body has to arrive."""
    specs = batcher.interface.inputs
    most = sum(math.prod(spec.max) * spec.dtype.itemsize for spec in specs) + HEADER

    async def infer(request):
        start = time.perf_counter()
        status = 500
        try:
            body = await asyncio.wait_for(body_of(request, most), patience)
            tensors = read(body, [spec.name for spec in specs])
            outputs = await asyncio.wrap_future(batcher.submit(tensors))
            status, body = 200, write(outputs)
            return Response(body, media_type="application/octet-stream")
        except InputError as error:
            status = 400
            return PlainTextResponse(str(error), status)
        except TooLarge:
            status = 413
            return PlainTextResponse(f"A body has at most {most} bytes.", status, {"Connection": "close"})
        except asyncio.TimeoutError:
            status = 408
            return PlainTextResponse(f"The body has not arrived in {patience} s.", status, {"Connection": "close"})
        except Busy as error:
            status = 503
            return PlainTextResponse(str(error), status, {"Retry-After": "1"})
        except ClientDisconnect:
            status = 499  # nobody reads it, but it is counted
            return PlainTextResponse("", status)
        except Exception as error:
            return PlainTextResponse(f"{type(error).__name__}: {error}", status)
        finally:
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - start)

    async def metadata(request):
        inputs = {
            spec.name: {"dtype": str(spec.dtype).removeprefix("torch."), "min": spec.min, "max": spec.max}
            for spec in specs
        }
        return JSONResponse({"inputs": inputs, "batches": batcher.batches, "outputs": list(batcher.interface.outputs)})

    async def prometheus(request):
        metrics.waiting.set(len(batcher.waiting))
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def health(request):
        return PlainTextResponse("ready")

    routes = [Route("/infer", infer, methods=["POST"]), Route("/metadata", metadata)]
    return Starlette(routes=[*routes, Route("/metrics", prometheus), Route("/health", health)])


def read(body, names):
    """The tensors in a safetensors file, in the order of these names; raises `InputError` for others."""
    try:
        found = safetensors.torch.load(body)
    except Exception as error:
        raise InputError(f"The body is no safetensors file: {error}.") from error
    if found.keys() != set(names):
        raise InputError(f"The inputs are {names}, given are {list(found)}.")
    return [found[name] for name in names]


def write(outputs):
    """A safetensors file of tensors by name."""
    return safetensors.torch.save({name: y.contiguous() for name, y in outputs.items()})


def main(argv=None):
    parser = argparse.ArgumentParser(description="Serve a file of torch2rt.save over HTTP.")
    parser.add_argument("file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2, help="calls at once (default: 2)")
    parser.add_argument("--delay", type=float, default=2.0, help="milliseconds to wait for other requests (default: 2)")
    parser.add_argument("--no-batching", action="store_true", help="run every request by itself")
    parser.add_argument("--queue", type=int, default=1024, help="requests that may wait (default: 1024)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for a body to arrive (default: 60)")
    parser.add_argument("--cuda-graph", action="store_true", help="replay calls whose shapes come back as CUDA graphs")
    parser.add_argument("--reference", action="store_true", help="evaluate the network with torch, without a GPU")
    parser.add_argument("--rebuild", choices=("never", "auto"), default="never", help="as for torch2rt.load")
    arguments = parser.parse_args(argv)
    model = load(arguments.file, rebuild=arguments.rebuild)
    interface = model._interface()
    device = torch.device("cpu" if arguments.reference else "cuda")
    if arguments.reference:
        model = model.reference()
    else:
        model.cuda_graph = arguments.cuda_graph
    model.warm_up(contexts=arguments.threads)
    metrics = Metrics()
    batcher = Batcher(model, interface, device, arguments.threads, arguments.delay / 1000, metrics, arguments.queue)
    batcher.batches = batcher.batches and not arguments.no_batching
    try:
        batcher.check_rows()
        app = application(batcher, metrics, arguments.patience)
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
    finally:
        batcher.close()


if __name__ == "__main__":
    main()
