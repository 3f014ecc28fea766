"""Hosts of a few layers for what is compiled and exported: the time goes by the number of operations."""

from collections import OrderedDict

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def small_host(name, classes=5):
    """Of convolutions, or of tokens; both take 32×32, and `layer1` or `blocks.0` is a place for a prior."""
    torch.manual_seed(0)
    if name == "tokens":
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        return VisionTransformer(num_classes=classes, **shape).eval()
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, stride=2), bn1=nn.BatchNorm2d(8), act1=nn.ReLU(),
        layer1=nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, classes),
    )  # fmt: skip
    return nn.Sequential(layers).eval()
