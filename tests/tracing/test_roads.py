"""What converts as a module converts as its exported program, decomposed or not, and as TorchScript."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import nn
from torch.export import Dim

from torch2rt import TraceError, lower, torch2rt, trace
from torch2rt.runtime.module import ReferenceModule

IMAGE, TOKENS, ROWS = (2, 4, 8, 6), (2, 5, 8), (3, 5)


class Layers(nn.Module):
    """A few calls in a row, each of which the exported program has operators of its own for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.last(x.mean((2, 3))), x.flatten(2).transpose(1, 2).softmax(-1)


class Distances(nn.Module):
    def forward(self, x, y):
        return torch.cdist(x, y), torch.cdist(x, y, 1.0), F.pdist(x[0])


class Attention(nn.Module):
    def forward(self, x):
        q, k, v = x.unflatten(-1, (2, 4)).transpose(1, 2).unsqueeze(0).expand(3, -1, -1, -1, -1).unbind(0)
        return F.scaled_dot_product_attention(q, k * 0.5, v, is_causal=True)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.rnn = getattr(nn, kind)(8, 6, 2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x):
        return self.cell(x[:, 0])


class Writes(nn.Module):
    def forward(self, x):
        y = x.clone()
        y[:, 1] = 2.0
        y[:, 2:] += x[:, 2:]
        y.relu_()
        return y, torch.add(x, y, alpha=2)


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))

    def forward(self, x):
        return x[:, self.mask], torch.where(self.mask, x, -1.0), x.masked_fill(self.mask, 3.0)


class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 0]))

    def forward(self, x):
        return x[self.order], x.index_select(1, self.order), x.gather(1, self.order[:, None]), x[1:, ::2]


class Rearranged(nn.Module):
    def forward(self, x):
        return (
            x.roll(2),
            x.roll([1, 2], [0, 1]),
            x.flip(0),
            x.t(),
            x.tril(1),
            x.repeat(2, 1),
            x[:, None].expand(3, 4, 5),
            torch.cat([x, x * 2], 1),
            torch.stack([x, x]),
            x.chunk(2, 1)[1],
            x.as_strided([2, 2], [1, 3], 2),
        )


class Reduced(nn.Module):
    def forward(self, x):
        return (
            x.sum(1),
            x.mean(0),
            x.amax(1),
            x.std(1),
            x.var(0),
            x.prod(1),
            x.max(1)[0],
            x.argmin(1),
            x.norm(2, 1),
            x.logsumexp(1),
            x.cumsum(0),
            x.any(0),
            x.median(1)[0],
            torch.topk(x, 2, 1)[0],
            x.sort(1)[1],
        )


class Compared(nn.Module):
    def forward(self, x):
        return (
            x > 0.5,
            x.clamp(-1.0, 0.5),
            torch.maximum(x, x * x),
            x.round(),
            x.floor(),
            x / 2.0,
            x // 0.7,
            x % 0.7,
            x.pow(2.0),
            torch.fmod(x, 0.3),
            x.sign(),
            x.abs().rsqrt(),
            torch.hypot(x, x + 1),
            torch.atan2(x, x + 2),
        )


class Bags(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode=mode)

    def forward(self, x):
        return self.bag(x)


class Resized(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0, mode=self.mode)


class Windows(nn.Module):
    def forward(self, x):
        return F.unfold(x, 3, padding=1), F.pad(x, [1, 2, 0, 1], "reflect"), F.avg_pool2d(x, 2), F.pixel_shuffle(x, 2)


class Sampled(nn.Module):
    def forward(self, x):
        grid = x[:, :2].permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, align_corners=False)


class Solved(nn.Module):
    def forward(self, x):
        a = x[:3, :3] + 4 * torch.eye(3, device=x.device)
        return torch.linalg.inv(a), torch.linalg.solve(a, x[:3]), torch.linalg.det(a)


class Products(nn.Module):
    def forward(self, x):
        y = x @ x.transpose(1, 2)
        return (
            y,
            torch.einsum("abc,abd->acd", x, x),
            torch.baddbmm(y, x, x.transpose(1, 2)),
            F.cosine_similarity(x, x + 1, 2),
            torch.outer(x[0, 0], x[0, 1]),
        )


class Two(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x[:, :, :6] * 2)


MODULES = {
    "layers": (Layers(), IMAGE),
    "conv1d": (nn.Conv1d(5, 4, 3, stride=2), TOKENS),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same", groups=2), IMAGE),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2), IMAGE),
    "linear": (nn.Linear(8, 3), TOKENS),
    "bilinear": (Two(nn.Bilinear(8, 6, 3)), TOKENS),
    "batch-norm-1d": (nn.BatchNorm1d(5), ROWS),
    "batch-norm": (nn.BatchNorm2d(4), IMAGE),
    "instance-norm": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "group-norm": (nn.GroupNorm(2, 4), IMAGE),
    "layer-norm": (nn.LayerNorm(8), TOKENS),
    "rms-norm": (nn.RMSNorm(8), TOKENS),
    "local-response-norm": (nn.LocalResponseNorm(2), IMAGE),
    "max-pool": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max-pool-1d": (nn.MaxPool1d(2), TOKENS),
    "average-pool": (nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False), IMAGE),
    "adaptive-average": (nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    "adaptive-max": (nn.AdaptiveMaxPool2d(2), IMAGE),
    "gelu": (nn.GELU("tanh"), ROWS),
    "prelu": (nn.PReLU(4), IMAGE),
    "elu": (nn.ELU(0.5), ROWS),
    "silu": (nn.SiLU(), ROWS),
    "hardswish": (nn.Hardswish(), ROWS),
    "softplus": (nn.Softplus(2.0), ROWS),
    "glu": (nn.GLU(), TOKENS),
    "rrelu": (nn.RReLU(), ROWS),
    "log-softmax": (nn.LogSoftmax(1), ROWS),
    "dropout": (nn.Dropout(0.3), ROWS),
    "embedding": (nn.Embedding(9, 4, padding_idx=2), torch.int64),
    **{f"bag-{mode}": (Bags(mode), torch.int64) for mode in ("sum", "mean", "max")},
    **{f"resize-{mode}": (Resized(mode), IMAGE) for mode in ("nearest", "bilinear", "bicubic")},
    "distances": (Distances(), ((2, 4, 3), (2, 5, 3))),
    "attention": (Attention(), TOKENS),
    "self-attention": (SelfAttention(), TOKENS),
    "encoder-layer": (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), TOKENS),
    "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), TOKENS),
    "decoder-layer": (nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), (TOKENS, (2, 3, 8))),
    **{kind: (Recurrent(kind), TOKENS) for kind in ("LSTM", "GRU", "RNN")},
    "GRUCell": (Cell(), TOKENS),
    "writes": (Writes(), ROWS),
    "masks": (Masks(), ROWS),
    "indices": (Indices(), ROWS),
    "rearranged": (Rearranged(), ROWS),
    "reduced": (Reduced(), ROWS),
    "compared": (Compared(), ROWS),
    "windows": (Windows(), IMAGE),
    "sampled": (Sampled(), IMAGE),
    "solved": (Solved(), ROWS),
    "products": (Products(), TOKENS),
}
ROADS = {
    "module": lambda module, inputs: module,
    "export": lambda module, inputs: torch.export.export(module, inputs, strict=False),
    "decomposed": lambda module, inputs: torch.export.export(module, inputs, strict=False).run_decompositions(),
    "jit.trace": lambda module, inputs: torch.jit.trace(module, inputs),
    "jit.script": lambda module, inputs: torch.jit.script(module),
}


@pytest.mark.parametrize("name", MODULES)
def test_five_roads(name, device):
    module, shapes = MODULES[name]
    torch.manual_seed(0)
    if shapes is torch.int64:
        inputs: tuple[torch.Tensor, ...] = (torch.randint(0, 9, (3, 4), device=device),)
    else:
        inputs = tuple(torch.randn(s, device=device) for s in (shapes if isinstance(shapes[0], tuple) else (shapes,)))
    module = module.eval().to(device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        expected = module(*(x.clone() for x in inputs))
        for road, made in ROADS.items():
            try:
                network = lower(trace(made(module, inputs), list(inputs)))
            except Exception as error:
                raise AssertionError(f"{road}: {error}") from error
            compare(ReferenceModule(network)(*inputs), expected, 1e-4, 1e-4)


def test_at_least_fifty():
    assert len(MODULES) >= 50


BATCHES = {0: Dim("batch", min=1, max=8)}


def test_an_exported_program_is_converted_as_it_is(device):
    """Directly, over the range that it was exported for."""
    module, x = Layers().eval().to(device), torch.randn(IMAGE, device=device)
    program = torch.export.export(module, (x,), dynamic_shapes=(BATCHES,))
    for made in (program, program.run_decompositions()):
        model_trt = torch2rt(made, [x], max_batch_size=8)
        run = model_trt if device.type == "cuda" else model_trt.reference()
        for batch in (1, 3, 8):
            x = torch.randn(batch, *IMAGE[1:], device=device)
            with torch.no_grad():
                compare(run(x), module(x), 1e-3, 1e-4)


def test_an_exported_program_keeps_its_range():
    x = torch.randn(3, 5)
    with pytest.raises(TraceError, match=r"exported for other sizes|only does the same"):
        trace(torch.export.export(nn.Linear(5, 4).eval(), (x,)), [x], max_batch_size=4)
    program = torch.export.export(nn.Linear(5, 4).eval(), (x,), dynamic_shapes=(BATCHES,))
    with pytest.raises(TraceError, match=r"exported for other sizes|only does the same"):
        trace(program, [x], max_batch_size=9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("made", [ROADS["jit.trace"], ROADS["jit.script"]], ids=["trace", "script"])
def test_torchscript_writes_in_place(made):
    """Into what the trace knows, and into constants: nothing in Python sees it."""

    class Writing(nn.Module):
        def forward(self, x):
            y = torch.zeros(3, 5)
            y.add_(x)
            return y.tanh(), x.mul(2).sub_(y)

    x = torch.randn(3, 5)
    compare(trace(made(Writing(), (x,)), [x])(x), Writing()(x))


@torch.jit.script
def _adds_one(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_function_that_writes_within_a_module():
    class Calls(nn.Module):
        def forward(self, x):
            y = x * 2
            _adds_one(y)
            return y.relu()

    x = torch.randn(3, 5)
    compare(trace(Calls(), [x])(x)[0], Calls()(x))
