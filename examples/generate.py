"""Generate text tokens with a decoder whose keys and values are kept in buffers, and compare them with eager torch's.

    python examples/generate.py                  # 64 tokens on a GPU, 8 without one
    python examples/generate.py --layers 24 --width 1024 --tokens 256

Two engines share one state: one reads the prompt, of any length up to 64 tokens, the other goes on from there token by
token. The decoder is built as LLaMA is (RMS norms, rotary positions, grouped keys and values, gated layers) with drawn
weights, so that its text means nothing; each token is the one with the highest score. Without an NVIDIA GPU the
networks are evaluated with torch.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import torch2rt

WORDS, HEADS, GROUPS, PROMPT, LENGTH = 500, 8, 2, 64, 512
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Attention to all tokens so far, then a gated layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = width // HEADS
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * GROUPS * self.head, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, GROUPS, LENGTH, self.head))

    def forward(self, x, positions, angles, mask):
        heads = lambda y: y.unflatten(-1, (-1, self.head)).transpose(1, 2)  # noqa: E731
        y = self.norms[0](x)
        keys, values = heads(self.key_value(y)).chunk(2, dim=1)
        self.keys.index_copy_(2, positions, rotated(keys, angles))
        self.values.index_copy_(2, positions, values)
        y = F.scaled_dot_product_attention(
            rotated(heads(self.query(y)), angles), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Queries or keys turned by the angles of their positions."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Decoder(nn.Module):
    """The scores of the next token, for tokens at these positions and all that it was given before."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.scores = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
        half = width // HEADS // 2
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(half) / half))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * self.frequencies
        mask = torch.arange(LENGTH, device=tokens.device) <= positions[:, None]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, positions, angles, mask)
        return self.scores(self.norm(x[:, -1:]))


def generate(read: Step, go_on: Step, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens after a prompt; nothing waits for the GPU in between."""
    position = torch.tensor([prompt.shape[1]], device=prompt.device)
    token = read(prompt, torch.arange(prompt.shape[1], device=prompt.device)).argmax(-1)
    tokens = [token]
    for _ in range(count - 1):
        token = go_on(token, position).argmax(-1)
        position = position + 1
        tokens.append(token)
    return torch.cat(tokens, 1)


def measured(read: Step, go_on: Step, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """The tokens, and how many there are in a second in the best of several runs."""
    best = 0.0
    for _ in range(4 if prompt.is_cuda else 1):
        start = time.perf_counter()
        tokens = generate(read, go_on, prompt, count)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        best = max(best, count / (time.perf_counter() - start))
    return tokens, best


@torch.no_grad()
def main(layers: int = 4, width: int = 256, tokens: int | None = None) -> dict:
    """Convert the decoder twice, generate with each, and print tokens in a second; returns what is printed."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    count = tokens or (64 if on_gpu else 8)
    torch.manual_seed(13)  # of which no two scores are so near to each other that roundings decide
    model = Decoder(layers, width).eval().to(device)
    prompt = torch.randint(WORDS, (1, 20), device=device)
    expected, eager = measured(model, model, prompt, count)
    results = {"tokens in a second, eager": eager}
    if on_gpu:
        compiled = torch.compile(model, dynamic=False)
        _, results["tokens in a second, torch.compile"] = measured(model, compiled, prompt, count)

    positions = torch.arange(20, device=device)
    common = {"state": "write", "cuda_graph": on_gpu}
    read = torch2rt(
        model, [prompt, positions], min_shapes=[(1, 1), (1,)], max_shapes=[(1, PROMPT), (PROMPT,)], **common
    )
    go_on = torch2rt(model, [prompt[:, :1], positions[:1]], **common)
    if not on_gpu:
        read, go_on = read.reference(), go_on.reference()
    go_on.share_state(read)
    actual, results["tokens in a second, torch2rt"] = measured(read, go_on, prompt, count)

    results["tokens"] = count
    results["tokens as eager's, from the first on"] = int((actual == expected).cumprod(1).sum())
    print(f"{layers} layers of width {width}; the decoder goes on: {expected[0].tolist()}")
    for name, value in results.items():
        print(f"{name:<40}{value:.0f}" if isinstance(value, float) else f"{name:<40}{value}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int)
    main(**vars(parser.parse_args()))
