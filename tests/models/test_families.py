"""Whole models of other people's libraries: detectors, segmenters and diffusion transformers, with a dynamic batch.

`pip install 'torch2rt[families]'` brings ultralytics and diffusers (which want packages of their own that nothing here
uses: `pip install --no-deps` will do), transformers comes with `torch2rt[test]`. What is not installed is skipped. By
default a few rows; `--all-models` takes every one.
"""

import functools

import pytest
import torch
from harness import zoo

from torch2rt import lower, torch2rt, trace
from torch2rt.runtime.module import ReferenceModule

BATCH = {"max_batch_size": 4}
TINY_RESNET = dict(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic")
OWN_BACKBONE = dict(use_timm_backbone=False, use_pretrained_backbone=False)


def installed(name):
    """A module, or else a skipped test; some raise other errors where what they want is missing."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def ranges(example, *fixed):
    """Shapes with a batch of 1 to 4, but for these inputs."""
    args, kwargs = example(2)
    tensors = [(n, x) for n, x in [*enumerate(args), *kwargs.items()] if isinstance(x, torch.Tensor)]
    return {
        f"{which}_shapes": [tuple(x.shape) if n in fixed else (batch, *x.shape[1:]) for n, x in tensors]
        for which, batch in (("min", 1), ("opt", 2), ("max", 4))
    }


# Ultralytics ---------------------------------------------------------------------------------------------------------

TASKS = {
    "-cls": "ClassificationModel",
    "-seg": "SegmentationModel",
    "-pose": "PoseModel",
    "-obb": "OBBModel",
    "rtdetr": "RTDETRDetectionModel",
    "-world": "WorldModel",
    "yoloe": "YOLOEModel",
}
YOLO = """
    yolov3-tiny yolov5n yolov6n yolov8n yolov8n-cls yolov8n-ghost yolov8n-obb yolov8n-p2 yolov8n-pose
    yolov8n-rtdetr yolov8n-seg yolov8n-world yolov8n-worldv2 yolov9t yolov10n yolo11n yolo11n-cls yolo11n-obb
    yolo11n-pose yolo11n-seg yolo12n yolo12n-obb yolo12n-pose yolo12n-seg yolo26n yolo26n-obb yolo26n-pose
    yolo26n-seg
""".split()


def yolo(name):
    tasks = installed("ultralytics.nn.tasks")
    kind = next((task for key, task in TASKS.items() if key in name), "DetectionModel")
    return getattr(tasks, kind)(f"{name}.yaml", verbose=False)


# Transformers --------------------------------------------------------------------------------------------------------


def hugging_face(model, config, **options):
    transformers = installed("transformers")
    options = {k: v(transformers) if callable(v) else v for k, v in options.items()}
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def resnet(transformers):
    return transformers.ResNetConfig(**TINY_RESNET, out_features=["stage4"])


def rt_detr_resnet(transformers):
    return transformers.RTDetrResNetConfig(**TINY_RESNET, out_features=["stage2", "stage3", "stage4"])


def swin(transformers):
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


DETR = dict(
    backbone_config=resnet,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_queries=5,
    **OWN_BACKBONE,
)
RT_DETR = dict(
    backbone_config=rt_detr_resnet,
    encoder_hidden_dim=16,
    encoder_in_channels=[12, 16, 24],
    encoder_ffn_dim=32,
    encoder_attention_heads=2,
    d_model=16,
    decoder_in_channels=[16, 16, 16],
    decoder_layers=2,
    decoder_ffn_dim=32,
    decoder_attention_heads=2,
    num_queries=8,
    hidden_expansion=1.0,
    num_labels=7,
    **OWN_BACKBONE,
)
MASK2FORMER = dict(
    backbone_config=swin,
    feature_size=32,
    mask_feature_size=32,
    hidden_dim=32,
    encoder_feedforward_dim=32,
    encoder_layers=1,
    decoder_layers=2,
    num_attention_heads=2,
    dim_feedforward=32,
    num_queries=5,
    **OWN_BACKBONE,
)
DECODER = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=99,
    max_position_embeddings=64,
    use_cache=False,
)
QWEN3_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **DECODER)


def text(batch):
    mask = torch.ones(batch, 4 + batch, dtype=torch.long)
    mask[1:, 3:] = 0
    return [], {"input_ids": torch.randint(3, 99, (batch, 4 + batch)), "attention_mask": mask}


TEXT = {f"{which}_shapes": [size] * 2 for which, size in (("min", (1, 3)), ("opt", (2, 6)), ("max", (4, 12)))}

# Diffusers -----------------------------------------------------------------------------------------------------------


def diffuser(name, **options):
    return getattr(installed("diffusers"), name)(**options)


DIT = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    norm_num_groups=2,
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


def noisy_image(batch):
    steps, labels = torch.randint(0, 1000, (batch,)), torch.randint(0, 10, (batch,))
    return [torch.randn(batch, 4, 8, 8)], {"timestep": steps, "class_labels": labels, "return_dict": False}


def noisy_tokens(batch):
    return [], {
        "hidden_states": torch.randn(batch, 16, 4),
        "encoder_hidden_states": torch.randn(batch, 6, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch) * 3,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


def row(title, make, example, shapes=BATCH, quick=False, ranked=False, **options):
    return zoo.Row(title, functools.partial(make, **options), example, shapes, quick, ranked)


IMAGE = zoo.images(3, 64, 64)
ROWS = [
    *(
        row(name, yolo, IMAGE, quick=name in ("yolov8n", "yolov10n"), ranked="rtdetr" in name, name=name)
        for name in YOLO
    ),
    row("DETR", hugging_face, IMAGE, model="DetrForObjectDetection", config="DetrConfig", **DETR),
    row(
        "Mask2Former",
        hugging_face,
        IMAGE,
        model="Mask2FormerForUniversalSegmentation",
        config="Mask2FormerConfig",
        **MASK2FORMER,
    ),
    row("RT-DETR", hugging_face, IMAGE, model="RTDetrForObjectDetection", config="RTDetrConfig", **RT_DETR),
    row("RT-DETR v2", hugging_face, IMAGE, model="RTDetrV2ForObjectDetection", config="RTDetrV2Config", **RT_DETR),
    row(
        "Mixtral",
        hugging_face,
        text,
        TEXT,
        model="MixtralModel",
        config="MixtralConfig",
        num_local_experts=4,
        **DECODER,
    ),
    row("Qwen3-MoE", hugging_face, text, TEXT, quick=True, model="Qwen3MoeModel", config="Qwen3MoeConfig", **QWEN3_MOE),
    row("DiT", diffuser, noisy_image, name="DiTTransformer2DModel", **DIT),
    row(
        "FLUX",
        diffuser,
        noisy_tokens,
        ranges(noisy_tokens, "img_ids", "txt_ids"),
        quick=True,
        name="FluxTransformer2DModel",
        **FLUX,
    ),
]


def pytest_generate_tests(metafunc):
    zoo.parametrize(metafunc, ROWS)
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-models")
        metafunc.parametrize("name", YOLO if everything else [])


def test_architecture(row, device):
    zoo.check_row(row, device)


def test_height_and_width(name, device):
    """Detectors take all multiples of 32."""
    if name.endswith(("-cls", "rtdetr")):
        pytest.skip("its size is fixed")
    torch.manual_seed(0)
    model = yolo(name).eval()
    zoo.settle(model, zoo.images(3, 96, 96))
    model = model.to(device)
    shapes = {"min_shapes": [(1, 3, 32, 32)], "opt_shapes": [(2, 3, 64, 64)], "max_shapes": [(4, 3, 128, 160)]}
    x = torch.randn(2, 3, 64, 64, device=device)
    if device.type == "cuda":
        run = torch2rt(model, [x], **shapes)
    else:
        run = ReferenceModule(lower(trace(model, [x], **shapes)))
    for shape in [(1, 3, 32, 96), (3, 3, 128, 32), (4, 3, 64, 160)]:
        x = torch.randn(shape, device=device)
        with torch.no_grad():
            expected = model(x)
        for ours, theirs in zip(zoo.tensors(run(x)), zoo.tensors(expected), strict=True):
            assert zoo.difference(ours, theirs) < (5e-3 if device.type == "cuda" else 1e-3)
