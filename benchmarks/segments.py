"""The host time between two segments of a partitioned module, and what partitioning costs beside eager torch.

    python benchmarks/segments.py             # needs a GPU
    python benchmarks/segments.py --pairs 30

A module of `pairs` small layers, each followed by a call that is left to torch, becomes engines with torch calls
between them. The host time of a call is measured with the GPU far behind, so that nothing waits for it; the parts' own
host times, of the engines and of the torch segments called alone, are subtracted.
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


@torch.no_grad()
def main(pairs: int = 10) -> dict[str, float]:
    """Measure, print a line for each number, and return them in seconds."""
    module, x = Pairs(pairs).cuda().eval(), torch.randn(32, 64, device="cuda")
    model_trt = torch2rt(module, [x], fallback=True, min_segment_calls=1, torch_executed=[torch.logcumsumexp])
    segments = list(model_trt.segments)
    inputs = {
        index: [torch.randn(spec.opt, device="cuda", dtype=spec.dtype) for spec in segment._interface().inputs]
        for index, segment in enumerate(segments)
    }
    for _ in range(20):
        model_trt(x)
    whole = host_seconds(lambda: model_trt(x), 10)
    parts = sum(host_seconds(lambda s=s, i=i: s.forward(*inputs[i])) for i, s in enumerate(segments))
    results = {
        "a call": whole,
        "the segments alone, summed": parts,
        "between two segments": (whole - parts) / len(segments),
        "a call of eager torch": host_seconds(lambda: module(x), 10),
    }
    for name, seconds in results.items():
        print(f"{name:<32}{seconds * 1e6:8.1f} us")
    met = results["between two segments"] <= AIM
    print(f"{len(segments)} segments; at most {AIM * 1e6:.0f} us between two: {'yes' if met else 'no'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    main(parser.parse_args().pairs)
