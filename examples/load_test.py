"""Load a server of `examples/serve.py`: throughput, latencies and errors.

    python examples/load_test.py http://127.0.0.1:8000 --seconds 60 --clients 32

Each client sends one request after the other. Every answer is compared with the one that the same request got when it
was alone; an answer that differs is an error.
"""

import argparse
import http.client
import json
import multiprocessing
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.numpy

SAMPLES = 8  # different requests
TOLERANCE = {"float16": 2e-2, "float32": 5e-3}  # in parts of the largest number: kernels of other sizes round otherwise


def samples(inputs, rows):
    """Requests of drawn numbers at the smallest sizes that the server takes, of up to so many rows."""
    drawn = np.random.default_rng(0)
    for number in range(SAMPLES):
        arrays = {}
        for name, spec in inputs.items():
            shape = list(spec["min"])
            if shape:
                shape[0] = min(max(shape[0], 1 + number % rows), spec["max"][0])
            arrays[name] = drawn.random(shape).astype(spec["dtype"])
        yield safetensors.numpy.save(arrays)


def ask(connection, body):
    """The outputs for a request; raises `RuntimeError` for another answer than 200."""
    connection.request("POST", "/infer", body)
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {data[:200]!r}")
    return safetensors.numpy.load(data)


def same(ours, theirs):
    """Whether two answers are one but for roundings."""
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        return False
    for name, x in theirs.items():
        if not np.issubdtype(x.dtype, np.floating):
            if not np.array_equal(ours[name], x):
                return False
        elif not np.allclose(ours[name], x, rtol=0, atol=TOLERANCE[str(x.dtype)] * np.abs(x).max(initial=0)):
            return False
    return True


def client(address, bodies, expected, end, number):
    """The latencies of one client, and its errors."""
    connection, latencies, errors = http.client.HTTPConnection(address, timeout=60), [], []
    while time.time() < end:
        place = number = (number + 1) % len(bodies)
        start = time.perf_counter()
        try:
            if not same(ask(connection, bodies[place]), expected[place]):
                errors.append("the answer is another one than when the request was alone")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            connection.close()
        latencies.append(time.perf_counter() - start)
    return latencies, errors


def clients(address, bodies, expected, end, first, count):
    """What `count` clients on threads of this process have found."""
    with ThreadPoolExecutor(count) as pool:
        found = [pool.submit(client, address, bodies, expected, end, first + i) for i in range(count)]
        results = [future.result() for future in found]
    return [x for latencies, _ in results for x in latencies], [e for _, errors in results for e in errors]


def load(url, seconds, count, rows=1, processes=4):
    """Requests per second, the median and the 99th percentile in milliseconds, and errors."""
    address = urllib.parse.urlparse(url).netloc
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metadata")
    metadata = json.loads(connection.getresponse().read())
    bodies = list(samples(metadata["inputs"], rows if metadata["batches"] else 1))
    expected = [ask(connection, body) for body in bodies]
    processes = min(processes, count)
    shares = [count // processes + (i < count % processes) for i in range(processes)]
    start = time.time() + (2 if processes > 1 else 0)  # when all processes have started
    work = [(address, bodies, expected, start + seconds, sum(shares[:i]), shares[i]) for i in range(processes)]
    if processes == 1:
        results = [clients(*work[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            results = pool.starmap(clients, work)
    latencies = np.sort(np.concatenate([latencies for latencies, _ in results])) * 1000
    errors = [error for _, errors in results for error in errors]
    return {
        "requests": len(latencies),
        "per second": len(latencies) / seconds,
        "p50 ms": float(np.percentile(latencies, 50)),
        "p99 ms": float(np.percentile(latencies, 99)),
        "errors": len(errors),
        "first errors": errors[:3],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description="Load a server of examples/serve.py.")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1, help="requests have 1 to so many rows (default: 1)")
    parser.add_argument("--processes", type=int, default=4, help="that the clients are threads of (default: 4)")
    arguments = parser.parse_args(argv)
    results = load(arguments.url, arguments.seconds, arguments.clients, arguments.rows, arguments.processes)
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
