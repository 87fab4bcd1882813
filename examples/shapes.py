"""Draw ten thousand pictures of shapes, train a small ResNet on them, and read pictures that it has not seen in int8.

    python examples/shapes.py            # a few minutes on a CPU
    python examples/shapes.py --quick    # a fifth of the pictures, less training, and fewer rows

The network is trained until it reads more than 95 % of the held-out pictures. Then it is converted in each precision,
after training with each way to calibrate, and once more after some epochs of quantisation-aware training, with torch's
own fake quantisation. With an NVIDIA GPU the TensorRT engine does the reading; without one its network is evaluated
with torch, which shows the same arithmetic.
"""

import argparse
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from torch2rt import torch2rt
from torch2rt.backend.quirks import builds_int8_convolutions

SIZE, GOAL, BATCH = 32, 0.95, 50
SHAPES = ("circle", "ring", "square", "frame", "triangle", "cross", "star", "bar", "half circle", "two dots")


def shapes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """For points (..., 1) of the plane, whether each of the ten shapes of about size 1 has them: (..., 10)."""
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    square = torch.maximum(x.abs(), y.abs())
    triangle = torch.maximum(-y, (x.abs() * math.sqrt(3) + y) / 2)
    inside = [
        radius < 0.9,
        (radius < 0.95) & (radius > 0.55),
        square < 0.8,
        (square < 0.85) & (square > 0.5),
        triangle < 0.5,
        (torch.minimum(x.abs(), y.abs()) < 0.25) & (square < 0.95),
        radius < 0.65 + 0.35 * torch.cos(5 * angle),
        (x.abs() < 0.95) & (y.abs() < 0.25),
        (radius < 0.95) & (y > 0),
        torch.hypot(x.abs() - 0.55, y) < 0.4,
    ]
    return torch.cat(inside, -1)


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, 32, 32) of shapes of any place, size, turn and colour on a noisy ground, and their labels."""

    def drawn(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    grid = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    place, size, turn = drawn(count, 2) * 0.6 - 0.3, 0.35 + 0.3 * drawn(count), 0.8 * drawn(count) - 0.4
    x, y = (grid[None, None, :] - place[:, 0, None, None]), (grid[None, :, None] - place[:, 1, None, None])
    cos, sin = (f(turn)[:, None, None] for f in (torch.cos, torch.sin))
    x, y = ((a / size[:, None, None])[..., None] for a in (cos * x + sin * y, cos * y - sin * x))
    mask = shapes(x, y).gather(3, labels[:, None, None, None].expand(-1, SIZE, SIZE, 1))[..., 0].float()
    ground, colour = drawn(count, 3, 1, 1), drawn(count, 3, 1, 1)
    colour = torch.where((colour - ground).abs().amax(1, keepdim=True) < 0.35, 1 - ground.round(), colour)
    slope = (drawn(count, 3, 1, 1) - 0.5) * grid[:, None] + (drawn(count, 3, 1, 1) - 0.5) * grid
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator) * 0.12
    return ground + 0.3 * slope + (colour - ground) * mask[:, None] + noise, labels


class Block(torch.nn.Module):
    """Two convolutions beside a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(outputs)
        self.around = torch.nn.Sequential()
        if stride > 1 or inputs != outputs:
            convolution = torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


def resnet(width: int = 16) -> torch.nn.Sequential:
    """A residual network of six blocks."""
    blocks = [Block(width * a, width * b, stride) for a, b, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2))]
    stem = [torch.nn.Conv2d(3, width, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4 * width, len(SHAPES))]
    return torch.nn.Sequential(*stem, *blocks, *head)


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float) -> None:
    """Some epochs on the pictures and their mirror images, at a rate that rises and falls."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            is_mirrored = torch.rand(len(batch), 1, 1, 1, device=images.device) < 0.5
            x = torch.where(is_mirrored, images[batch].flip(3), images[batch])
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def read(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


# Quantisation-aware training ------------------------------------------------------------------------------------------


class Rounded(torch.nn.Module):
    """Rounds what passes through to int8, with a scale that follows the largest values while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))

    def forward(self, x):
        if self.training:
            largest = x.detach().abs().amax() / 127
            self.scale.copy_(torch.where(self.scale > 0, 0.95 * self.scale + 0.05 * largest, largest))
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, -128, 127)


class RoundedWeight(torch.nn.Module):
    """A weight as int8 has it, with a scale for each output."""

    def forward(self, weight):
        scale = weight.detach().abs().flatten(1).amax(1) / 127
        return torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0, -127, 127
        )


def rounding(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that rounds the inputs and the weights of its convolutions and linear layers."""
    model = copy.deepcopy(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for name, layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight())
        model.set_submodule(name, torch.nn.Sequential(Rounded(), layer))
    return model


# The table ------------------------------------------------------------------------------------------------------------


def precisions(batches: Any, quick: bool) -> dict[str, dict[str, Any]]:
    """What `torch2rt` is told, by name."""
    methods = ("entropy",) if quick else ("entropy", "minmax", "percentile", "mse")
    whole = dict(precision="int8", calibration=batches, quantize_all=True)  # also what is no faster: this is accuracy
    int8 = {f"int8 {m}": dict(calibration_method=m, **whole) for m in methods}
    if not quick:
        int8["int8 entropy, biases corrected"] = dict(bias_correction=True, **whole)
    wide = {} if quick else {"fp32": {}, "bf16": dict(precision="bf16")}
    return {**wide, "fp16": dict(precision="fp16"), **int8}


def main(quick: bool = False, seed: int = 0) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    train_x, train_y = (t.to(device) for t in draw(2_000 if quick else 10_000, generator))
    test_x, test_y = (t.to(device) for t in draw(300 if quick else 2_000, generator))
    model = resnet(8 if quick else 16).to(device)
    for _ in range(1 if quick else 4):
        train(model, train_x, train_y, 5 if quick else 12, 1e-2)
        if (read(model, test_x) == test_y).double().mean() > GOAL:
            break
    eager = read(model, test_x)
    results = {"eager": {"accuracy": (eager == test_y).double().mean().item(), "disagreements": 0}}

    def row(name: str, module: torch.nn.Module, **options: Any) -> None:
        model_trt = torch2rt(module, [test_x[:BATCH]], max_batch_size=BATCH, **options)
        found = read(model_trt if device.type == "cuda" else model_trt.reference(), test_x)
        kept = sum("is not quantised" in text for text in model_trt.report.assumptions)
        results[name] = {
            "accuracy": (found == test_y).double().mean().item(),
            "disagreements": int((found != eager).sum()),
            "not in int8": kept,
        }

    for name, options in precisions(train_x.split(BATCH)[:5], quick).items():
        row(name, model, **options)
    aware = rounding(model)
    train(aware, train_x, train_y, 1 if quick else 3, 2e-4)
    row("int8, trained for it", aware, precision="fp16")

    print(f"{len(test_y)} pictures, read {'by the engine' if device.type == 'cuda' else 'without a GPU'}")
    if not builds_int8_convolutions():
        print("This TensorRT has no int8 convolutions: they stay in float16.")
    print(f"{'':<36}accuracy  other than eager")
    for name, numbers in results.items():
        print(f"{name:<36}{numbers['accuracy']:>8.2%}{numbers['disagreements']:>18}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, less training, fewer rows")
    main(parser.parse_args().quick)
