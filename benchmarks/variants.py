"""What variants cost a call, and what folding constants that repeat along the batch saves. Needs a GPU.

    python benchmarks/variants.py [--calls N]

The first table has the host time of a call to a module with one engine, and with four of which each serves some of the
sizes; both run the same calls on the same shapes. The second has the time of a small LLaMA (without a mask, float16)
whose batch is static and dynamic; it needs transformers.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

from torch2rt import torch2rt


class Plain(torch.nn.Module):
    """One path for all sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1


class Split(torch.nn.Module):
    """Four paths, by the parity of two sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 if x.shape[0] % 2 else x * 3
        return x + 1 if x.shape[1] % 2 else x + 2


def host_time(call: Callable[[], object], calls: int) -> float:
    """Microseconds of the host for a call, the median of twenty rounds."""
    rounds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(rounds)


def gpu_time(call: Callable[[], object], calls: int) -> float:
    """Microseconds of the GPU for a call, with CUDA graphs."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rounds = []
    for _ in range(20):
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(rounds)


def dispatch(calls: int) -> None:
    ranges = {"min_shapes": [(1, 1)], "max_shapes": [(16, 16)]}
    print("| engines | shapes in turn | us of the host for a call |\n|---|---|---|")
    for made in (Plain(), Split()):
        model_trt = torch2rt(made.cuda().eval(), [torch.randn(3, 5, device="cuda")], **ranges)
        for count in (1, 4):
            inputs = [torch.randn(3 + i % 2, 5 + i // 2, device="cuda") for i in range(count)]
            for x in inputs:
                torch.testing.assert_close(model_trt(x), made(x))

            def call(inputs: list[torch.Tensor] = inputs, run: torch.nn.Module = model_trt) -> None:
                for x in inputs:
                    run(x)

            per_call = host_time(call, calls) / count
            print(f"| {len(model_trt.built.each())} | {count} | {per_call:.1f} |")


def decoder(calls: int) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    model = LlamaModel(config).eval().half().cuda()
    print("\n| batch | batch of the call | layers | us of the GPU for a call |\n|---|---|---|---|")
    for low, high in ((2, 2), (1, 4)):
        ids = torch.randint(0, 1000, (2, 512), device="cuda")
        model_trt = torch2rt(model, [ids], min_shapes=[(low, 512)], max_shapes=[(high, 512)], verify=False)
        model_trt.cuda_graph = True
        with torch.no_grad():
            expected = model(ids).last_hidden_state
        error = (model_trt(ids).last_hidden_state - expected).abs().max().item()
        name = str(low) if low == high else f"{low} to {high}"
        layers = len(model_trt.built.facts["layers"])
        time_of = gpu_time(functools.partial(model_trt, ids), calls // 10)
        print(f"| {name} | 2 | {layers} | {time_of:.0f} |  error {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    arguments = parser.parse_args()
    dispatch(arguments.calls)
    decoder(arguments.calls)


if __name__ == "__main__":
    main()
