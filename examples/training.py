"""Train on handwritten digits, and after each epoch let the converted network read the digits that it has not seen.

    python examples/training.py
    python examples/training.py --others    # also by torch.compile, and by a new conversion each epoch

The network is converted once, with `follow=True`: each call of the converted one first takes what the optimizer has
made of the weights. With an NVIDIA GPU the engine reads; without one its network is evaluated with torch.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from digits import DigitNet, digits, predict, train

from torch2rt import torch2rt


def seconds_of(call, device):
    """What a call returns, and its seconds until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call().cpu()
    return result, time.perf_counter() - start


def main(epochs: int = 5, batch_size: int = 64, others: bool = False) -> list[dict[str, float]]:
    """For each epoch and each way to read: how many digits are read right, and the seconds that it took.

    `differ` is on how many digits eager and the engine do not agree. `others` adds `torch.compile` and "converted", a
    module that is converted again each epoch, conversion included.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_x, train_y, test_x, test_y = (t.to(device) for t in digits())
    model = DigitNet().to(device).eval()

    def convert(**options):
        model_trt = torch2rt(model, [test_x[:batch_size]], max_batch_size=batch_size, **options)
        return model_trt if device.type == "cuda" else model_trt.reference()

    engine = convert(follow=True)
    ways = {"eager": lambda: model, "engine": lambda: engine}
    if others:
        compiled = torch.compile(model)
        ways |= {"torch.compile": lambda: compiled, "converted": convert}

    results = []
    for epoch in range(epochs):
        model.train()
        train(model, train_x, train_y, 1)
        model.eval()
        read, row = {}, {}
        for name, way in ways.items():
            read[name], row[f"{name} seconds"] = seconds_of(lambda way=way: predict(way(), test_x, batch_size), device)
            row[name] = int((read[name] == test_y.cpu()).sum())
        row["differ"] = int((read["eager"] != read["engine"]).sum())
        results.append(row)
        words = ", ".join(f"{name} reads {row[name]} ({row[f'{name} seconds']:.3f} s)" for name in ways)
        print(f"epoch {epoch + 1}: of {len(test_y)} digits, {words}; eager and engine differ on {row['differ']}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, and read with the converted network after each epoch.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--others", action="store_true", help="also torch.compile, and a new conversion each epoch")
    asked = parser.parse_args()
    main(asked.epochs, others=asked.others)
