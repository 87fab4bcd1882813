"""Triton kernels, which run as torch calls between engines. They need a GPU."""

import pytest
import torch
from torch import nn

from torch2rt import TraceError, torch2rt

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _leaky_shift(x, out, slope, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count)
    tl.store(out + at, tl.where(value > 0, value, value * slope) + at, mask=at < count)


@torch.library.triton_op("torch2rt_tests::leaky_shift", mutates_args={})
def leaky_shift(x: torch.Tensor, slope: float) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.library.wrap_triton(_leaky_shift)[(triton.cdiv(x.numel(), 64),)](x, out, slope, x.numel(), BLOCK=64)
    return out


def launched(x: torch.Tensor, slope: float) -> torch.Tensor:
    """The kernel without an operator around it, as an autograd function has it."""
    out = torch.empty_like(x)
    _leaky_shift[(triton.cdiv(x.numel(), 64),)](x, out, slope, x.numel(), BLOCK=64)
    return out


@torch.library.custom_op("torch2rt_tests::leaky_shift_opaque", mutates_args=())
def leaky_shift_opaque(x: torch.Tensor, slope: float) -> torch.Tensor:
    return launched(x, slope)


class Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        return torch.ops.torch2rt_tests.leaky_shift_opaque(x, slope)


class Net(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.first, self.last, self.call = nn.Linear(6, 7), nn.Linear(7, 5), call

    def forward(self, x):
        return self.last(self.call(self.first(x).tanh() * 3, 0.3)).sigmoid() * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(
    "call", [leaky_shift, leaky_shift_opaque, Leaky.apply], ids=["triton_op", "custom_op", "Function"]
)
def test_triton_kernels_run_between_engines(call, cuda_graph):
    module, x = Net(call).cuda().eval(), torch.randn(9, 6, device="cuda")
    model_trt = torch2rt(
        module, [x], max_batch_size=20, fallback=True, min_segment_calls=1, cuda_graph=cuda_graph, tf32=False
    )
    assert model_trt.engines and model_trt.torch_segments
    for rows in (9, 1, 20, 9, 9, 9):
        x = torch.randn(rows, 6, device="cuda")
        torch.testing.assert_close(model_trt(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_kernel_without_an_operator_is_refused_by_name_or_right():
    module, x = Net(launched).cuda().eval(), torch.randn(9, 6, device="cuda")
    try:
        model_trt = torch2rt(module, [x], fallback=True)
    except TraceError as error:
        assert "takes a traced tensor out of torch" in str(error)
    else:
        torch.testing.assert_close(model_trt(x), module(x), rtol=1e-4, atol=1e-4)
