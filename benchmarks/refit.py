"""New weights for engines: seconds of a refit and of a second conversion, what following costs, errors beside eager.

    NVIDIA_TF32_OVERRIDE=0 python benchmarks/refit.py [--json FILE] [--models resnet50 vit_b_16 bert_base] [--tiny]

For each model: converting it, the first refit of all weights after a step of Adam (in which TensorRT compiles), the
second, that of one layer, and that of a low-rank change of all linear layers, merged and taken back; each with the
largest error of the engine beside eager, in parts of the largest output, before and after. Then the microseconds of a
call with and without `follow`, and a second conversion from a folder of kept engines: with the same weights, and with
others. Without a GPU the reference stands for the engine, and times mean nothing; `--tiny` makes the models small.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch2rt import torch2rt
from torch2rt.backend.quirks import builds_refittable
from torch2rt.backend.tensorrt import FLAVOUR, VERSION

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Bert(nn.Module):
    """An encoder of BERT-base's sizes: 12 layers of 12 heads and 768 features, 128 tokens."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(128, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.norm(self.words(ids) + self.places))


def made(name: str, tiny: bool) -> tuple[nn.Module, torch.Tensor]:
    """A model and an input."""
    torch.manual_seed(0)
    if name == "bert_base":
        model: nn.Module = Bert(1, 24, 50) if tiny else Bert(12, 768, 30522)
        return model, torch.randint(50, (1, 128))
    import torchvision

    name, size = ("resnet18", 64) if tiny and name == "resnet50" else (name, 224)
    model = torchvision.models.get_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # a transformer's head, which would hide all before
            nn.init.normal_(layer.weight, std=0.02)
    return model, torch.randn(1, 3, size, size)


def waited(function: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call and of the GPU's work for it, and its result."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Measured:
    """A converted model beside the one it came from."""

    def __init__(self, name: str, tiny: bool) -> None:
        model, x = made(name, tiny)
        self.model, self.x = model.to(DEVICE).eval(), x.to(DEVICE)
        self.results: dict[str, Any] = {"model": name}
        self.results["convert"], self.model_trt = waited(self.convert)
        self.results["refittable"] = "refittable" in self.model_trt.made_by
        self.results["first call"], _ = waited(lambda: self.run()(self.x))

    def convert(self, **options: Any) -> Any:
        return torch2rt(self.model, [self.x], verify=False, **{"refittable": True, **options})

    def run(self) -> Any:
        return self.model_trt if DEVICE.type == "cuda" else self.model_trt.reference()

    @torch.no_grad()
    def error(self) -> float:
        ours, theirs = self.run()(self.x), self.model(self.x)
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    def refit(self, what: str) -> None:
        """Refit, and note how long it took and how large the error is before and after."""
        stale = self.error()
        seconds, changed = waited(self.model_trt.refit)
        _, again = waited(lambda: self.run()(self.x))
        row = {"seconds": seconds, "tensors": len(changed), "stale error": stale, "error": self.error()}
        row["call after"] = waited(lambda: self.run()(self.x))[0]
        del again
        self.results[what] = row
        print(f"  {what:<24}{seconds:8.3f} s  {len(changed):4d} tensors  error {stale:.1e} -> {row['error']:.1e}")

    def step(self) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.model(self.x).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def low_rank(self) -> Callable[[], None]:
        """Add a product of two narrow matrices to the weight of each linear layer; returns how to take it back."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        before = [layer.weight.clone() for layer in layers]
        for layer in layers:
            a, b = (torch.randn(n, 8, device=DEVICE) * 0.01 for n in layer.weight.shape)
            layer.weight += a @ b.T

        @torch.no_grad()
        def back() -> None:
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)

        return back

    def all(self) -> dict[str, Any]:
        for what in ("all weights, first", "all weights", "all weights, again"):
            self.step()
            self.refit(what)
        with torch.no_grad():
            next(p for p in reversed(list(self.model.parameters())) if p.dim() > 1).mul_(1.5)
        self.refit("one layer")
        output = self.run()(self.x).clone()
        back = self.low_rank()
        self.refit("low rank, merged")
        back()
        self.refit("low rank, taken back")
        self.results["restored"] = (self.run()(self.x) - output).abs().max().item()
        self.results["changed, nothing"] = waited(self.model_trt.changed)[0]
        self.following()
        self.kept()
        return self.results

    def following(self) -> None:
        """Microseconds of the host for a call, with and without looking for changes."""
        found: dict[str, list[float]] = {"plain": [], "follow": []}
        run = self.run()
        self.model_trt.follow()
        follow = self.model_trt._follow
        assert follow is not None
        for _ in range(7):
            for name, count in (("plain", 50), ("follow", 50)):
                self.model_trt._follow = follow if name == "follow" else None
                seconds, _ = waited(lambda run=run, count=count: [run(self.x) for _ in range(count)])  # type: ignore[misc]
                found[name].append(seconds / count * 1e6)
        looks = [waited(lambda: [follow() for _ in range(1000)])[0] * 1e3 for _ in range(5)]
        self.results["look us"] = statistics.median(looks)
        self.results["tensors looked at"] = len(follow._seen.tensors)
        self.results["call us"] = {name: statistics.median(values) for name, values in found.items()}
        self.model_trt._follow = None
        print(f"  follow: {self.results['look us']:.1f} us a look at {self.results['tensors looked at']} tensors")

    def kept(self) -> None:
        """Seconds to a first result from a folder of kept engines."""

        def first(**options: Any) -> dict[str, float]:
            stages: dict[str, float] = {}
            note = lambda stage, result, seconds: stages.update({stage: seconds})  # noqa: E731

            def convert() -> Any:
                model_trt = self.convert(on_stage=note, **options)
                return (model_trt if DEVICE.type == "cuda" else model_trt.reference())(self.x)

            seconds, result = waited(convert)
            with torch.no_grad():
                expected = self.model(self.x)
            error = ((result - expected).abs().max() / expected.abs().max()).item()
            return {"seconds": seconds, "error": error, **stages}

        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCH2RT_CACHE"] = folder
            for name, options in (("plain", dict(refittable=False)), ("refittable", {})):
                self.results[f"{name}, built"] = first(**options)
                self.results[f"{name}, kept"] = first(**options)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.01)
            self.results["refittable, kept with other weights"] = first()
            del os.environ["TORCH2RT_CACHE"]
        for name, row in self.results.items():
            if "kept" in name or "built" in name:
                print(f"  {name:<40}" + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "bert_base"])
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{FLAVOUR} {VERSION}, torch {torch.__version__}, {where}; refits in place: {builds_refittable()}")
    results = []
    for name in asked.models:
        print(name)
        results.append(Measured(name, asked.tiny).all())
        if asked.json:
            with open(asked.json, "w") as file:
                json.dump(results, file, indent=1)
    return results


if __name__ == "__main__":
    main()
