"""Layers of one's own: leaky ReLU, a fully connected layer and deformable convolution as plugins of TensorRT 10 and 11.

    python examples/plugins.py

Each plugin is a function in torch, which the engine calls on its own tensors and stream. TensorRT for RTX has no
plugins: there the three operators, of which it knows nothing, are torch calls between engines. Without an NVIDIA GPU
the networks are evaluated with torch, which needs TensorRT for RTX, as the evaluator knows no plugins.
"""

import torch
import torchvision
from torch import nn

from torch2rt import plugin, torch2rt, torch_plugin

LIBRARY = torch.library.Library("torch2rt_example", "FRAGMENT")


# What the plugins compute. An engine imports the functions by name, so that they belong into a module of a package.


def leaky_relu(x, slope):
    return torch.nn.functional.leaky_relu(x, slope)


def fully_connected(x, weight, bias):
    return torch.nn.functional.linear(x.flatten(1), weight, bias)


def deform_conv2d(x, offset, mask, weight, bias, stride, padding):
    return torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding, mask=mask)


# The operators, of which torch knows the shapes of the results ------------------------------------------------------

LIBRARY.define("leaky_relu(Tensor x, float slope) -> Tensor")
LIBRARY.define("fully_connected(Tensor x, Tensor weight, Tensor bias) -> Tensor")
LIBRARY.define(
    "deform_conv2d(Tensor x, Tensor offset, Tensor mask, Tensor weight, Tensor bias, int stride, int padding) -> Tensor"
)
for function in (leaky_relu, fully_connected, deform_conv2d):
    LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
OPERATORS = torch.ops.torch2rt_example


@torch.library.register_fake("torch2rt_example::leaky_relu", lib=LIBRARY)
def _(x, slope):
    return torch.empty_like(x)


@torch.library.register_fake("torch2rt_example::fully_connected", lib=LIBRARY)
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("torch2rt_example::deform_conv2d", lib=LIBRARY)
def _(x, offset, mask, weight, bias, stride, padding):
    return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])


# The plugins --------------------------------------------------------------------------------------------------------


@plugin(OPERATORS.leaky_relu)
def make_leaky_relu(ctx, x, slope):
    return torch_plugin(ctx, f"{__name__}:leaky_relu", [x], {"slope": slope})


@plugin(OPERATORS.fully_connected)
def make_fully_connected(ctx, x, weight, bias):
    return torch_plugin(ctx, f"{__name__}:fully_connected", [x, weight, bias])


@plugin(OPERATORS.deform_conv2d)
def make_deform_conv2d(ctx, x, offset, mask, weight, bias, stride, padding):
    how = {"stride": stride, "padding": padding}
    return torch_plugin(ctx, f"{__name__}:deform_conv2d", [x, offset, mask, weight, bias], how)


class Net(nn.Module):
    """A small network with the three of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.offsets, self.masks = nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1)
        self.kernel, self.bias = nn.Parameter(torch.randn(6, 8, 3, 3) / 9), nn.Parameter(torch.randn(6))
        self.head, self.head_bias = nn.Parameter(torch.randn(10, 6 * 8 * 8) / 20), nn.Parameter(torch.randn(10))

    def forward(self, x):
        x = OPERATORS.leaky_relu(self.stem(x), 0.2)
        mask = torch.sigmoid(self.masks(x)) * 2
        x = OPERATORS.deform_conv2d(x, torch.tanh(self.offsets(x)), mask, self.kernel, self.bias, 1, 1)
        return torch.softmax(OPERATORS.fully_connected(torch.relu(x), self.head, self.head_bias) * 2, dim=1)


@torch.no_grad()
def main():
    """Convert, compare at two batch sizes, and return the largest difference."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Net().eval().to(device)
    x = torch.randn(2, 3, 16, 16, device=device)
    model_trt = torch2rt(model, [x], max_batch_size=8, fallback=True, min_segment_calls=1)
    print(model_trt.report)
    run = model_trt if device == "cuda" else model_trt.reference()
    difference = 0.0
    for batch in (2, 5):
        x = torch.randn(batch, 3, 16, 16, device=device)
        difference = max(difference, (run(x) - model(x)).abs().max().item())
    print(f"largest difference to eager torch: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
