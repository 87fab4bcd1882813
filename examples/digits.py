"""Train a small network on handwritten digits, convert it, and let both read the digits that it has not seen.

    python examples/digits.py [--device cuda] [--epochs 8]

Runs in under a minute on a CPU. With an NVIDIA GPU the TensorRT engine does the reading; without one its network is
evaluated with torch, which shows the same arithmetic.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from torch2rt import TRTModule, torch2rt


class DigitNet(torch.nn.Module):
    """Two convolutions and a classifier for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, padding=1)
        self.linear = torch.nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear(x.flatten(1))


def digits() -> tuple[torch.Tensor, ...]:
    """Images (N, 1, 8, 8) and labels, for training and held out."""
    data = load_digits()
    split = train_test_split(data.images / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, split)
    return train_x.float()[:, None], train_y.long(), test_x.float()[:, None], test_y.long()


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def predict(model: torch.nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)])


def precisions(batches) -> dict[str, dict[str, Any]]:
    """The same network in other types: what `torch2rt` is told, by name. int8 and fp8 need batches to find ranges on.

    In fp8 the convolutions stay in float16.
    """
    methods = ("entropy", "minmax", "percentile", "mse")
    whole = dict(calibration=batches, quantize_all=True)  # small layers are no faster so: this is about accuracy
    int8 = {f"int8 {m}": dict(precision="int8", calibration_method=m, **whole) for m in methods}
    fp8 = dict(precision="fp8", **whole)
    return {"fp16": dict(precision="fp16"), "bf16": dict(precision="bf16"), **int8, "fp8": fp8}


def main(on: str | None = None, epochs: int = 8, batch_size: int = 64) -> dict[str, float]:
    torch.manual_seed(0)
    device = torch.device(on or ("cuda" if torch.cuda.is_available() else "cpu"))
    train_x, train_y, test_x, test_y = (t.to(device) for t in digits())
    model = DigitNet().to(device)
    train(model, train_x, train_y, epochs)
    model.eval()

    # Any batch from 1 to batch_size: the last batch of the held-out digits is smaller than the others.
    model_trt = torch2rt(model, [test_x[:batch_size]], max_batch_size=batch_size)
    engine = model_trt if device.type == "cuda" else model_trt.reference()

    eager = predict(model, test_x, batch_size)
    converted = predict(engine, test_x, batch_size)
    results = {
        "eager accuracy": (eager == test_y).double().mean().item(),
        "engine accuracy": (converted == test_y).double().mean().item(),
        "disagreements": int((eager != converted).sum()),
    }

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.pth"
        torch.save(model_trt.state_dict(), path)
        loaded = TRTModule()
        loaded.load_state_dict(torch.load(path))
    results["reloaded disagreements"] = reloaded(loaded, model_trt, test_x, eager, batch_size)

    for name, options in precisions(train_x.split(batch_size)[:8]).items():
        low = torch2rt(model, [test_x[:batch_size]], max_batch_size=batch_size, **options)
        read = predict(low if device.type == "cuda" else low.reference(), test_x, batch_size)
        results[f"{name} accuracy"] = (read == test_y).double().mean().item()
        results[f"{name} disagreements"] = int((eager != read).sum())

    print(f"{len(test_y)} held-out digits, read {'by the engine' if device.type == 'cuda' else 'without a GPU'}")
    for name, value in results.items():
        print(f"{name:<32}{value:.4f}" if isinstance(value, float) else f"{name:<32}{value}")
    return results


def reloaded(loaded: TRTModule, original: TRTModule, images: torch.Tensor, expected: torch.Tensor, size: int) -> int:
    """How many digits the reloaded engine reads differently."""
    if images.is_cuda:
        return int((predict(loaded, images, size) != expected).sum())
    # What is loaded holds the engine and no network, so without a GPU there is only the engine itself to compare.
    same = loaded.engine_bytes == original.engine_bytes and loaded.interface == original.interface
    return 0 if same else len(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU, by default")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    main(arguments.device, arguments.epochs)
