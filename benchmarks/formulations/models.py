"""Whole models with random weights, in the shapes that the blocks are taken from."""

from __future__ import annotations

import functools

import torch
from parts import Pattern, image
from torch import nn

VISION = ["resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t"]


def vision(name: str) -> nn.Module:
    """With normalizations that keep the values in the range of half precision, and no parameter that is all zeros."""
    import torchvision

    model = getattr(torchvision.models, name)()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        for norm in norms:
            norm.momentum = 1.0  # the statistics of one batch
        if norms:
            model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def ids_and_mask(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 30000, (batch, 128)), torch.ones(batch, 128, dtype=torch.int64)


MODELS = {name: Pattern(functools.partial(vision, name), image(3, 224, 224), {}) for name in VISION}
MODELS["bert"] = Pattern(bert, ids_and_mask, {})
