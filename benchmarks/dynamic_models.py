"""Models whose batch, height and width, or length are dynamic: how many engines serve the range, and how exactly.

    python benchmarks/dynamic_models.py [NAME ...] [--device cuda] [--list] [--report]

For each model (small, with random weights), a row of a table: the range, the engines that serve it, the seconds to
trace and to build them, and the largest error at six sizes, both ends among them, as a part of the output's largest
value. On a CPU it is the error of `model_trt.reference()`, on a GPU the engine's. Models come from timm, torchvision,
transformers, diffusers and ultralytics; a row whose package is missing says so. NAME is a part of the names to take.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from torch2rt import torch2rt
from torch2rt.tracing.sizes.coverage import MAX_VARIANTS

Sizes = tuple[int, ...]
SIZES = 6  # at which a model is compared


@dataclasses.dataclass
class Row:
    """A model and the sizes to serve: from `low` to `high`, in steps of `step`, as `call` makes a call of them."""

    name: str
    make: Callable[[], torch.nn.Module]
    call: Callable[..., tuple[list[Any], dict[str, Any]]]
    low: Sizes
    high: Sizes
    step: Sizes = ()

    def sizes(self, count: int = SIZES) -> list[Sizes]:
        """Some of the sizes: both ends, and others that are drawn between them."""
        generator = random.Random(self.name)
        steps = self.step or (1,) * len(self.low)
        ranges = [range(low, high + 1, step) for low, high, step in zip(self.low, self.high, steps, strict=True)]
        drawn = [tuple(map(generator.choice, ranges)) for _ in range(count - 2)]
        return [self.low, self.high, *drawn]

    def middle(self) -> Sizes:
        """A size between the ends, for the example."""
        steps = self.step or (1,) * len(self.low)
        return tuple(
            low + (high - low) // (2 * step) * step for low, high, step in zip(self.low, self.high, steps, strict=True)
        )

    def shapes(self, sizes: Sizes) -> list[Sizes]:
        args, kwargs = self.call(*sizes)
        return [tuple(x.shape) for x in tensors([args, kwargs])]

    def range(self) -> str:
        steps = self.step or (1,) * len(self.low)
        parts = zip(self.low, self.high, steps, strict=True)
        return " x ".join(f"{a}..{b}{f':{step}' if step > 1 else ''}" for a, b, step in parts)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, however nested."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


def on(device: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, item) for key, item in value.items()}
    return type(value)(on(device, item) for item in value) if isinstance(value, (list, tuple)) else value


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference as a part of the largest value."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item() if theirs.numel() else 0.0


# Calls ----------------------------------------------------------------------------------------------------------------


def image(batch: int, height: int, width: int, channels: int = 3) -> tuple[list[Any], dict[str, Any]]:
    return [torch.randn(batch, channels, height, width)], {}


def resized_image(batch: int, height: int, width: int) -> tuple[list[Any], dict[str, Any]]:
    return [torch.randn(batch, 3, height, width)], {"interpolate_pos_encoding": True}


def tokens(batch: int, length: int) -> tuple[list[Any], dict[str, Any]]:
    return [torch.randint(3, 99, (batch, length))], {}


def noisy_image(batch: int, height: int, width: int) -> tuple[list[Any], dict[str, Any]]:
    steps = torch.randint(0, 1000, (batch,))
    return [torch.randn(batch, 4, height, width), steps, torch.randn(batch, 5, 32)], {"return_dict": False}


def labelled_image(batch: int, size: int) -> tuple[list[Any], dict[str, Any]]:
    steps, labels = torch.randint(0, 1000, (batch,)), torch.randint(0, 10, (batch,))
    return [torch.randn(batch, 4, size, size)], {"timestep": steps, "class_labels": labels, "return_dict": False}


def described_image(batch: int, height: int, width: int) -> tuple[list[Any], dict[str, Any]]:
    return [], {
        "hidden_states": torch.randn(batch, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, 6, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch) * 1000,
        "return_dict": False,
    }


def described_tokens(batch: int, length: int) -> tuple[list[Any], dict[str, Any]]:
    return [], {
        "hidden_states": torch.randn(batch, length, 4),
        "encoder_hidden_states": torch.randn(batch, 6, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch) * 3,
        "img_ids": torch.rand(length, 3) * 4,
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


# Models of packages ---------------------------------------------------------------------------------------------------


def from_timm(name: str, **options: Any) -> torch.nn.Module:
    return importlib.import_module("timm").create_model(name, **options)


def from_torchvision(name: str, **options: Any) -> torch.nn.Module:
    return getattr(importlib.import_module("torchvision.models"), name)(**options)


def from_transformers(name: str, config: str, **options: Any) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    options = {key: value() if callable(value) else value for key, value in options.items()}
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def from_diffusers(name: str, **options: Any) -> torch.nn.Module:
    return getattr(importlib.import_module("diffusers"), name)(**options)


def from_ultralytics(name: str) -> torch.nn.Module:
    return importlib.import_module("ultralytics.nn.tasks").DetectionModel(f"{name}.yaml", verbose=False)


# Networks that pad and crop -------------------------------------------------------------------------------------------


class PadAndCrop(torch.nn.Module):
    """Pads to a multiple, goes down and up again, and crops, as networks for super-resolution and optical flow do."""

    def __init__(self, multiple: int = 16, scale: int = 2, mode: str = "reflect") -> None:
        super().__init__()
        self.multiple, self.scale, self.mode = multiple, scale, mode
        self.down = torch.nn.Conv2d(3, 12, 4, stride=4)
        self.up = torch.nn.Conv2d(12, 3 * (4 * scale) ** 2, 3, padding=1)
        self.shuffle = torch.nn.PixelShuffle(4 * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, height, width = x.size()
        rows = (self.multiple - height % self.multiple) % self.multiple
        columns = (self.multiple - width % self.multiple) % self.multiple
        x = F.pad(x, (0, columns, 0, rows), self.mode)
        x = self.shuffle(self.up(F.leaky_relu(self.down(x), 0.2)))
        return x[:, :, : height * self.scale, : width * self.scale]


class PadWhereNeeded(torch.nn.Module):
    """Rounds sizes up and resizes if that changes them, as PWC-Net and RAFT do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 5, stride=8, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        high, wide = 32 * ((height + 31) // 32), 32 * ((width + 31) // 32)
        if (high, wide) != (height, width):
            x = F.interpolate(x, size=(high, wide), mode="bilinear", align_corners=False)
        flow = F.interpolate(self.conv(x), size=(height, width), mode="bilinear", align_corners=False)
        return flow * torch.tensor([width / wide, height / high]).repeat(3).view(1, -1, 1, 1)


class Windows(torch.nn.Module):
    """Attention within windows of a padded image, every second time shifted, with the mask computed for its size."""

    def __init__(self, dim: int = 12, window: int = 7, heads: int = 2) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.first, self.last = torch.nn.Conv2d(3, dim, 3, padding=1), torch.nn.Conv2d(dim, 3, 3, padding=1)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(dim, 3 * dim) for _ in range(2))

    def mask(self, height: int, width: int) -> torch.Tensor:
        window, shift = self.window, self.window // 2
        regions = torch.zeros((1, height, width, 1))
        places = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        number = 0
        for rows in places:
            for columns in places:
                regions[:, rows, columns, :] = number
                number += 1
        parts = self.split(regions).view(-1, window * window)
        different = parts.unsqueeze(1) - parts.unsqueeze(2)
        return different.masked_fill(different != 0, -100.0).masked_fill(different == 0, 0.0)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window * self.window, channels)

    def joined(self, windows: torch.Tensor, height: int, width: int) -> torch.Tensor:
        rows, columns = height // self.window, width // self.window
        batch = int(windows.shape[0] / (height * width / self.window / self.window))
        x = windows.view(batch, rows, columns, self.window, self.window, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)

    def block(self, x: torch.Tensor, qkv: torch.nn.Module, shift: int) -> torch.Tensor:
        _, height, width, channels = x.shape
        shifted = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        parts = self.split(shifted)
        q, k, v = qkv(parts).view(*parts.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (channels // self.heads) ** 0.5
        if shift:
            mask = self.mask(height, width)
            scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask[None, :, None]
            scores = scores.view(-1, *scores.shape[2:])
        parts = (scores.softmax(-1) @ v).transpose(1, 2).reshape(parts.shape)
        x_shifted = self.joined(parts, height, width)
        return x + (torch.roll(x_shifted, (shift, shift), (1, 2)) if shift else x_shifted)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.window, 0, -height % self.window), "reflect")
        y = self.first(x).permute(0, 2, 3, 1)
        for number, qkv in enumerate(self.qkv):
            y = self.block(y, qkv, number % 2 * (self.window // 2))
        return (x + self.last(y.permute(0, 3, 1, 2)))[..., :height, :width]


# The table ------------------------------------------------------------------------------------------------------------

SWIN = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 3), num_classes=7)
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=99,
    max_position_embeddings=64,
    pad_token_id=0,
    use_cache=False,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, use_cache=False)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=8
)
UNET = dict(
    sample_size=16,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=4,
    norm_num_groups=4,
)
DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    num_layers=2,
    sample_size=16,
    patch_size=2,
    num_embeds_ada_norm=10,
    norm_num_groups=2,
)
SD3 = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=16,
    pooled_projection_dim=32,
    out_channels=4,
    pos_embed_max_size=24,
)
FLUX = dict(
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=[4, 4, 8],
    guidance_embeds=True,
)


def _resnet() -> Any:
    return importlib.import_module("transformers").ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


DEFORMABLE = dict(
    backbone_config=_resnet,
    use_timm_backbone=False,
    use_pretrained_backbone=False,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_queries=5,
    num_feature_levels=3,
)


def rows() -> Iterator[Row]:
    """All rows of the table."""
    made = functools.partial
    timm, hugging_face, diffusers = from_timm, from_transformers, from_diffusers
    swin = dict(SWIN, img_size=224, strict_img_size=False)
    yield Row(
        "timm Swin", made(timm, "swin_tiny_patch4_window7_224", **swin), image, (1, 96, 96), (4, 260, 224), (1, 4, 4)
    )
    window8 = dict(SWIN, img_size=256, strict_img_size=False)
    yield Row(
        "timm SwinV2", made(timm, "swinv2_tiny_window8_256", **window8), image, (1, 96, 96), (4, 260, 256), (1, 4, 4)
    )
    vit = dict(embed_dim=24, depth=2, num_heads=2, num_classes=7, img_size=96, dynamic_img_size=True)
    yield Row("timm ViT", made(timm, "vit_tiny_patch16_224", **vit), image, (1, 64, 64), (4, 160, 224), (1, 16, 16))
    padded = dict(vit, dynamic_img_pad=True)
    yield Row("timm ViT, padded", made(timm, "vit_tiny_patch16_224", **padded), image, (1, 50, 64), (4, 130, 224))
    yield Row("torchvision swin_t", made(from_torchvision, "swin_t"), image, (1, 224, 224), (2, 448, 448))
    yield Row("pad and crop (ESRGAN)", PadAndCrop, image, (1, 20, 24), (4, 130, 100))
    yield Row("resize to a multiple (PWC-Net)", PadWhereNeeded, image, (1, 24, 32), (4, 130, 100))
    yield Row("padded shifted windows (SwinIR)", Windows, image, (1, 14, 16), (4, 50, 45))
    swin2sr = dict(image_size=32, patch_size=1, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, upscale=2)
    yield Row(
        "HF Swin2SR",
        made(hugging_face, "Swin2SRForImageSuperResolution", "Swin2SRConfig", **swin2sr),
        image,
        (1, 16, 16),
        (3, 40, 44),
        (1, 4, 4),
    )
    for name in ("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"):
        yield Row(f"ultralytics {name}", made(from_ultralytics, name), image, (1, 32, 32), (4, 160, 192), (1, 32, 32))
    yield Row(
        "diffusers UNet2DCondition",
        made(diffusers, "UNet2DConditionModel", **UNET),
        noisy_image,
        (1, 8, 8),
        (4, 33, 40),
    )
    yield Row("diffusers DiT", made(diffusers, "DiTTransformer2DModel", **DIT), labelled_image, (1, 8), (4, 40), (1, 2))
    yield Row(
        "diffusers SD3",
        made(diffusers, "SD3Transformer2DModel", **SD3),
        described_image,
        (1, 8, 8),
        (4, 32, 40),
        (1, 2, 2),
    )
    yield Row("diffusers FLUX", made(diffusers, "FluxTransformer2DModel", **FLUX), described_tokens, (1, 4), (4, 64))
    yield Row(
        "HF ViT",
        made(hugging_face, "ViTModel", "ViTConfig", **VISION),
        resized_image,
        (1, 32, 32),
        (4, 96, 112),
        (1, 8, 8),
    )
    yield Row(
        "HF DINOv2",
        made(hugging_face, "Dinov2Model", "Dinov2Config", **VISION),
        image,
        (1, 32, 32),
        (4, 96, 112),
        (1, 8, 8),
    )
    yield Row(
        "HF Deformable DETR",
        made(hugging_face, "DeformableDetrForObjectDetection", "DeformableDetrConfig", **DEFORMABLE),
        image,
        (1, 64, 64),
        (3, 160, 130),
    )
    decoders = {
        "GPT2Model": ("GPT2Config", GPT2),
        "LlamaModel": ("LlamaConfig", TEXT),
        "Qwen2Model": ("Qwen2Config", TEXT),
        "MistralModel": ("MistralConfig", dict(TEXT, sliding_window=5)),
        "PhiModel": ("PhiConfig", TEXT),
        "GemmaModel": ("GemmaConfig", dict(TEXT, head_dim=8)),
    }
    for name, (config, options) in decoders.items():
        yield Row(f"HF {name}", made(hugging_face, name, config, **options), tokens, (1, 1), (4, 48))


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """What a row came to: `layers` is of the largest network."""

    variants: int
    notes: list[str]
    trace: float
    build: float
    error: float
    model_trt: Any


def measure(row: Row, device: str = "cpu", max_variants: int = MAX_VARIANTS) -> Measured:
    """Convert a row's model for its range, and compare it at some sizes."""
    torch.manual_seed(0)
    model = row.make().eval().to(device)
    args, kwargs = on(device, row.call(*row.middle()))
    seconds = dict.fromkeys(("trace", "lower", "build"), 0.0)

    def note(stage: str, result: Any, took: float) -> None:
        seconds[stage] = seconds.get(stage, 0.0) + took

    ranges = {
        f"{which}_shapes": row.shapes(sizes)
        for which, sizes in (("min", row.low), ("opt", row.middle()), ("max", row.high))
    }
    model_trt = torch2rt(
        model, args, kwargs=kwargs, **ranges, max_variants=max_variants, verify=False, on_stage=note, progress=False
    )
    run = model_trt if device == "cuda" else model_trt.reference()
    worst = 0.0
    for sizes in row.sizes():
        args, kwargs = on(device, row.call(*sizes))
        with torch.no_grad():
            theirs = tensors(model(*args, **kwargs))
        for one, other in zip(tensors(run(*args, **kwargs)), theirs, strict=True):
            worst = max(worst, difference(one, other))
    engines = model_trt.built.each()
    variants = getattr(model_trt.built, "variants", [])
    notes = [note for variant in variants for note in variant.notes]
    return Measured(len(engines), notes, seconds["trace"], seconds["build"], worst, model_trt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    parser.add_argument("--report", action="store_true", help="also print what the report says of variants")
    arguments = parser.parse_args()
    chosen = [
        row for row in rows() if not arguments.names or any(n.lower() in row.name.lower() for n in arguments.names)
    ]
    if arguments.list:
        print("\n".join(row.name for row in chosen))
        return
    print("| model | range | engines | s to trace | s to build | worst error |\n|---|---|---|---|---|---|", flush=True)
    for row in chosen:
        start = time.perf_counter()
        try:
            found = measure(row, arguments.device)
        except Exception as error:
            took, text = time.perf_counter() - start, str(error).replace("\n", " / ")
            print(f"| {row.name} | {row.range()} | {type(error).__name__}, {took:.1f} s: {text[:600]} |", flush=True)
            continue
        numbers = f"{found.trace:.1f} | {found.build:.1f} | {found.error:.1e}"
        print(f"| {row.name} | {row.range()} | {found.variants} | {numbers} |", flush=True)
        if arguments.report:
            print(found.model_trt.report)


if __name__ == "__main__":
    main()
