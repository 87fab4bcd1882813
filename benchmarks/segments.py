"""The host time between two segments of a partitioned module, and what partitioning costs beside eager torch.

    python benchmarks/segments.py             # needs a GPU
    python benchmarks/segments.py --pairs 30

A module of `pairs` small layers, each followed by a call that is left to torch, becomes engines with torch calls
between them. The host time of a call is measured with the GPU far behind, so that nothing waits for it. The segments
are then called one after the other by a plain loop, each with what the one before has returned, and that time is
subtracted: what is left is the module's own work, for each segment. Last, the same module with all of its segments in
one CUDA graph, and eager torch.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from torch2rt import torch2rt

AIM = 5e-6  # seconds between two segments


class Pairs(nn.Module):
    """Layers, and calls between them that are left to torch."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(pairs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * 2 + 1
            x = torch.logcumsumexp(x, 0)
        return x


def host_seconds(call: Callable[[], object], calls: int = 50) -> float:
    """The host's time for one call, the least of several runs; the GPU works on something long meanwhile."""
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return best


def whole_seconds(call: Callable[[], object], calls: int = 100) -> float:
    """The time of a call where one follows the other, host and GPU together, the least of several runs."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@torch.no_grad()
def main(pairs: int = 10) -> dict[str, float]:
    """Measure, print a line for each number, and return them in seconds."""
    module, x = Pairs(pairs).cuda().eval(), torch.randn(32, 64, device="cuda")
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=1, torch_executed=[torch.logcumsumexp])
    segments = [segment.forward for segment in model_trt.segments]

    def chain() -> object:
        (value,) = segments[0](x)
        for segment in segments[1:]:
            (value,) = segment(value)
        return value

    for _ in range(20):
        model_trt(x), chain()
    rounds = [(host_seconds(lambda: model_trt(x), 10), host_seconds(chain, 10)) for _ in range(3)]
    whole, parts = min(w for w, _ in rounds), min(p for _, p in rounds)
    eager = host_seconds(lambda: module(x), 10), whole_seconds(lambda: module(x))
    results = {
        "a call": whole,
        "the segments by a loop": parts,
        "between two segments": (whole - parts) / len(segments),
        "a call of eager torch": eager[0],
        "a call, with the GPU's time": whole_seconds(lambda: model_trt(x)),
        "of eager torch, with the GPU's": eager[1],
    }
    model_trt.cuda_graph = True
    for _ in range(20):
        model_trt(x)
    assert model_trt.cuda_graph_refused is None, model_trt.cuda_graph_refused
    results["a call with one graph"] = host_seconds(lambda: model_trt(x), 10)
    results["with one graph, with the GPU's"] = whole_seconds(lambda: model_trt(x))
    torch.testing.assert_close(model_trt(x), module(x), rtol=1e-3, atol=1e-4)
    for name, seconds in results.items():
        print(f"{name:<32}{seconds * 1e6:8.1f} us")
    met = results["between two segments"] <= AIM
    print(f"{len(segments)} segments; at most {AIM * 1e6:.0f} us between two: {'yes' if met else 'no'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    main(parser.parse_args().pairs)
