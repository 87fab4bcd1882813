"""Train on handwritten digits, and after each epoch let the converted network read the digits that it has not seen.

    python examples/training.py

The network is converted once, with `follow=True`: each call of the converted one first takes what the optimizer has
made of the weights. With an NVIDIA GPU the engine reads; without one its network is evaluated with torch.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from digits import DigitNet, digits, predict, train

from torch2rt import torch2rt


def main(epochs: int = 5, batch_size: int = 64) -> list[dict[str, float]]:
    """For each epoch: the accuracies, on how many digits the two differ, and the seconds that each took to read."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_x, train_y, test_x, test_y = (t.to(device) for t in digits())
    model = DigitNet().to(device).eval()
    model_trt = torch2rt(model, [test_x[:batch_size]], max_batch_size=batch_size, follow=True)
    engine = model_trt if device.type == "cuda" else model_trt.reference()

    results = []
    for epoch in range(epochs):
        model.train()
        train(model, train_x, train_y, 1)
        model.eval()
        read, seconds = {}, {}
        for name, network in (("eager", model), ("engine", engine)):
            start = time.perf_counter()
            read[name] = predict(network, test_x, batch_size).cpu()
            seconds[name] = time.perf_counter() - start
        right = {name: int((digits_read == test_y.cpu()).sum()) for name, digits_read in read.items()}
        differ = int((read["eager"] != read["engine"]).sum())
        results.append({**right, "differ": differ, **{f"{name} seconds": s for name, s in seconds.items()}})
        print(
            f"epoch {epoch + 1}: of {len(test_y)} digits, eager reads {right['eager']} ({seconds['eager']:.3f} s), "
            f"the converted network {right['engine']} ({seconds['engine']:.3f} s); they differ on {differ}"
        )
    return results


if __name__ == "__main__":
    main()
