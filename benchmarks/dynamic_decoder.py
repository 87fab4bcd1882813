"""A small LLaMA with static and with dynamic sizes: layers of the network, and microseconds of a call on a GPU.

    python benchmarks/dynamic_decoder.py [--layers 12] [--batch 8] [--length 128]

Both engines are called with the same ids, plainly and with CUDA graphs. Without a GPU, it counts layers only. What the
dynamic network has more than the static one is what it computes of its length in every call: the table of rotary
positions, and keys and values that are repeated for groups of heads.
"""

from __future__ import annotations

import argparse
import collections
import copy

import torch

from torch2rt import TRTModule, torch2rt


def decoder(layers: int) -> torch.nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=1000,
        max_position_embeddings=512,
        use_cache=False,
    )
    return transformers.LlamaModel(config).eval().half()


def microseconds(model: TRTModule, ids: torch.Tensor, calls: int = 200) -> float:
    for _ in range(20):
        model(ids)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        model(ids)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = decoder(arguments.layers).to(device)
    shape = arguments.batch, arguments.length
    ids = torch.randint(1, 1000, shape, device=device)
    ranges = {"min_shapes": [(1, 1)], "opt_shapes": [shape], "max_shapes": [(2 * shape[0], 2 * shape[1])]}
    for name, options in (("static", {}), ("dynamic", ranges)):
        converted = torch2rt(model, [ids], verify=False, **options)
        network = converted.network
        kinds = collections.Counter(
            str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers)
        )
        print(name, network.num_layers, "layers", dict(kinds.most_common()), flush=True)
        for graph in (False, True) if device == "cuda" else ():
            one = copy.copy(converted)
            one.cuda_graph = graph
            print(f"  {microseconds(one, ids):.1f} us{' with a CUDA graph' if graph else ''}", flush=True)


if __name__ == "__main__":
    main()
