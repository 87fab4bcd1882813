"""Models of which TensorRT cannot take every call: what runs where, whether it is right, and how long a call takes.

    python benchmarks/whole_models.py                                  # all, small, on the CPU by the reference
    python benchmarks/whole_models.py --device cuda --size 480 640        # latencies on a GPU
    python benchmarks/whole_models.py fasterrcnn_resnet50_fpn yolo --ways fallback submodules --device cuda

Every model is one module, with its post-processing: torchvision's detectors, a YOLO of ultralytics with non-maximum
suppression, a Mask2Former of transformers with its segmentation, a model with an operator in C++, a streaming conformer
and a decoder with a static cache, which keep state. Weights are drawn. Ways to run it:

- `eager`, and `compile` (`torch.compile`),
- `fallback`: `torch2rt(..., fallback=True)` of the whole, with `state="write"` where it has state, and CUDA graphs,
- `measure`: likewise with `fallback="measure"`; needs a GPU,
- `submodules`: `convert_submodules` of a detector's backbone and heads; the rest stays Python.

A row: TensorRT and torch segments, the share of the floating-point operations in TensorRT, the largest difference from
eager in parts of the largest number (boxes: those without a partner), and the median of a call in milliseconds. Each
row runs in a process of its own and has `--limit` seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import torch2rt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import detector
import generate

WAYS = ("eager", "compile", "fallback", "measure", "submodules")


class Yolo(nn.Module):
    """A YOLO with non-maximum suppression by class, as ultralytics' own, for one image."""

    def __init__(self, threshold: float = 0.25, overlap: float = 0.45, most: int = 300) -> None:
        super().__init__()
        from ultralytics import YOLO

        self.model = YOLO("yolov8n.yaml").model
        for branch in self.model.model[-1].cv3:  # else no drawn score is above any threshold
            branch[-1].bias.data.fill_(-1.0)
        self.threshold, self.overlap, self.most = threshold, overlap, most

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        from torchvision.ops import batched_nms, box_convert

        found = self.model(image[None])[0][0].T
        scores, labels = found[:, 4:].max(1)
        kept = scores > self.threshold
        boxes, scores, labels = box_convert(found[kept, :4], "cxcywh", "xyxy"), scores[kept], labels[kept]
        best = batched_nms(boxes, scores, labels, self.overlap)[: self.most]
        return {"boxes": boxes[best], "scores": scores[best], "labels": labels[best]}


class Mask2Former(nn.Module):
    """A Mask2Former and the class of each pixel, as the processor's `post_process_semantic_segmentation` finds it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        swin = SwinConfig(embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], window_size=4)
        swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
        small = dict(
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48, dim_feedforward=48
        )
        config = Mask2FormerConfig(backbone_config=swin, encoder_layers=2, decoder_layers=3, num_queries=20, **small)
        config.num_attention_heads, config.num_labels = 4, 9
        self.model = Mask2FormerForUniversalSegmentation(config)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.model(image[None])
        classes = out.class_queries_logits.softmax(-1)[..., :-1]
        masks = F.interpolate(out.masks_queries_logits, image.shape[1:], mode="bilinear").sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", classes, masks)
        return {"scores": scores, "labels_of_pixels": scores.argmax(1)}


CPP = """
#include <torch/library.h>
#include <ATen/ATen.h>
// One row for each value that is in `of`, in order: its mean, or 0 where there is none.
at::Tensor grouped_mean(const at::Tensor& x, const at::Tensor& of, int64_t count) {
  auto sums = at::zeros({count, x.size(1)}, x.options()).index_add(0, of, x);
  auto sizes = at::zeros({count}, x.options()).index_add(0, of, at::ones_like(of).to(x.dtype()));
  return sums / sizes.clamp_min(1).unsqueeze(1);
}
TORCH_LIBRARY(torch2rt_benchmark, m) {
  m.def("grouped_mean(Tensor x, Tensor of, int count) -> Tensor");
  m.impl("grouped_mean", c10::DispatchKey::CPU, TORCH_FN(grouped_mean));
  m.impl("grouped_mean", c10::DispatchKey::CUDA, TORCH_FN(grouped_mean));
}
"""


class CustomOperator(nn.Module):
    """Features of points, their means in cells by an operator in C++ without a fake kernel, and a head."""

    def __init__(self, width: int = 256, cells: int = 64) -> None:
        super().__init__()
        from torch.utils.cpp_extension import load_inline

        load_inline("torch2rt_benchmark", CPP, is_python_module=False, no_implicit_headers=True)
        self.cells = cells
        self.points = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 10))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        of = ((points[:, 0] + 1) / 2 * self.cells).long().clamp(0, self.cells - 1)
        return self.head(torch.ops.torch2rt_benchmark.grouped_mean(self.points(points), of, self.cells)).softmax(-1)


class ConformerLayer(nn.Module):
    """Half a feed-forward layer, attention to what was heard before, a causal convolution, and another half."""

    def __init__(self, width: int, past: int, heads: int = 4, kernel: int = 9) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.first, self.second = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.last = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depthwise, self.heads = nn.Conv1d(width, width, kernel, groups=width), heads
        self.register_buffer("heard", torch.zeros(2, 1, heads, past, width // heads))
        self.register_buffer("frames", torch.zeros(1, width, kernel - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(self.norms[0](x)) / 2
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norms[1](x)).chunk(3, -1))
        heard = torch.cat([self.heard, torch.stack([k, v])], 3)
        self.heard.copy_(heard[:, :, :, k.shape[2] :])
        x = x + self.out(F.scaled_dot_product_attention(q, *heard).transpose(1, 2).flatten(2))
        frames = torch.cat([self.frames, F.glu(self.gate(self.norms[2](x).mT), 1)], 2)
        self.frames.copy_(frames[:, :, x.shape[1] :])
        x = x + self.last(F.silu(self.depthwise(frames))).mT
        return x + self.second(self.norms[3](x)) / 2


def conformer(layers: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(80, width), *(ConformerLayer(width, past=64) for _ in range(layers)), nn.Linear(width, 30)
    )


def made(
    name: str, size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, list[torch.Tensor], dict[str, Any]]:
    """A model, its inputs and options of `torch2rt`."""
    torch.manual_seed(3)
    is_large, options = device.type == "cuda", {}
    image = torch.rand(3, *size)
    model: nn.Module
    inputs: list[torch.Tensor] = [image]
    if name in detector.DETECTORS:
        model = detector.OneImage(detector.detector(name, size, False))
    elif name == "yolo":
        model = Yolo(threshold=0.5)
        detector.fit_statistics(model.model, image[None])
    elif name == "mask2former":
        model = Mask2Former()
    elif name == "custom_operator":
        model, inputs = CustomOperator(), [torch.rand(20_000 if is_large else 500, 3) * 2 - 1]
    elif name == "conformer":
        model, inputs = conformer(*((12, 256) if is_large else (2, 64))), [torch.randn(1, 8, 80)]
        options["state"] = "write"
    else:
        model = generate.Decoder(*((4, 256) if is_large else (2, 64)))
        inputs, options["state"] = [torch.tensor([[17]]), torch.tensor([5])], "write"
    return model.eval().to(device), [x.to(device) for x in inputs], options


NAMES = (*detector.DETECTORS, "yolo", "mask2former", "custom_operator", "conformer", "decoder")


def difference(actual: Any, expected: Any) -> str:
    """How far off a result is, in words."""
    if isinstance(expected, dict) and "boxes" in expected:
        lost = detector.unmatched(expected, actual) + detector.unmatched(actual, expected)
        return f"{lost} of {len(expected['boxes'])} boxes"
    worst = 0.0
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if not b.is_floating_point():
            worst = max(worst, (a != b).float().mean().item())
        else:
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return f"{worst:.1e}"


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of a call until its results are there, on a stream of its own: TensorRT waits on the default one."""
    if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        with torch.cuda.stream(torch.cuda.Stream()):
            return milliseconds(call, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times = []
    end = time.perf_counter() + 8
    while len(times) < 30 or (len(times) < 200 and time.perf_counter() < end - 4):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    half = sorted(times[len(times) // 4 :])
    return half[len(half) // 2] * 1e3


@torch.no_grad()
def row(name: str, way: str, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """What is measured of a model run in one way."""
    model, inputs, options = made(name, size, device)
    found: dict[str, Any] = {}
    run: Callable[..., Any] = model
    expected = [copy.deepcopy(model)(*[x.clone() for x in inputs])]
    if "state" in options:
        other = copy.deepcopy(model)
        expected = [other(*[x.clone() for x in inputs]) for _ in range(3)]
    start = time.perf_counter()
    if way == "compile":
        run = torch.compile(model)
    elif way == "submodules":
        parts = torch2rt.convert_submodules(model.model, detector.DETECTORS[name], [inputs], unserved="torch")
        if device.type == "cpu":
            for path, part in parts.items():
                parent, _, child = path.rpartition(".")
                setattr(model.model.get_submodule(parent), child, part.converted.reference())
    elif way in ("fallback", "measure"):
        original = copy.deepcopy(model)
        fallback = True if way == "fallback" else "measure"
        with detector.loops_in_torch():
            converted = torch2rt.torch2rt(model, inputs, fallback=fallback, cuda_graph=device.type == "cuda", **options)
            if "state" not in options:
                found["flops"] = torch2rt.plan(original, inputs).share_of_flops
        found["segments"] = segments(converted)
        run = converted if device.type == "cuda" else converted.reference()
    actual = [run(*inputs) for _ in expected]
    found["seconds to convert"] = time.perf_counter() - start
    found["difference"] = ", ".join(dict.fromkeys(map(difference, actual, expected)))
    if device.type == "cuda" or way == "eager":
        found["ms"] = milliseconds(lambda: run(*inputs), device)
    return found


def segments(converted: Any) -> str:
    """How many TensorRT and torch segments there are."""
    lines = getattr(converted, "report", None)
    lines = lines.segments if lines is not None and lines.segments else []
    ours = sum(": TensorRT" in line for line in lines)
    return f"{ours} + {len(lines) - ours}" if lines else "1 + 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--size", nargs=2, type=int, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a row")
    parser.add_argument("--alone", action="store_true", help="one row in this process, as JSON")
    options = parser.parse_args()
    if options.alone:
        found = row(options.names[0], options.ways[0], tuple(options.size), torch.device(options.device))
        print("\n" + json.dumps(found))
        return
    ways = options.ways or (WAYS if options.device != "cpu" else ("eager", "fallback", "submodules"))
    print("| model | way | TensorRT + torch segments | share of the operations | difference | ms | s to convert |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.names:
        for way in ways:
            if way != "submodules" or name in detector.DETECTORS:
                found = _in_a_process(name, way, options)
                share = f"{found['flops']:.1%}" if "flops" in found else ""
                ms = f"{found['ms']:.3f}" if "ms" in found else ""
                cells = [name, way, found.get("segments", ""), share, found.get("difference", found.get("error")), ms]
                print(f"| {' | '.join(map(str, cells))} | {found.get('seconds to convert', 0):.0f} |", flush=True)


def _in_a_process(name: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    size = [str(number) for number in options.size]
    command = [sys.executable, __file__, name, "--ways", way, "--device", options.device, "--alone", "--size", *size]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=options.limit)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"error": f"more than {options.limit:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        lines = [line for line in done.stderr.strip().splitlines() if ": " in line] or ["no output"]
        return {"error": f"exit code {done.returncode}: {lines[-1][:300]}"}


if __name__ == "__main__":
    main()
