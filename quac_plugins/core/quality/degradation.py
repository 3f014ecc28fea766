"""Degradation: which of the 15 corruptions of ImageNet-C an image went through, if any, and how severely.

A small network (63 → 128 → 128 → 17) on the 47 features of ``brisque_tone`` and the 16 of
:func:`~quac_plugins.core.quality.detail.detail`. Its weights, beside this file, were trained
by ``examples/train_degradation.py`` on real photographs, degraded at all severities, at the sizes that networks take;
``benchmarks/results/degradation.md`` tells how often it is right about photographs that it has not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from quac_plugins.core.precision import full_precision
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.brisque_tone import finite_blocks, tone
from quac_plugins.core.quality.detail import detail
from quac_plugins.core.quality.registry import quality_function

CLEAN = "clean"
GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
"""The four groups of corruptions of ImageNet-C, in the paper's order."""

KINDS = (CLEAN, *(name for group in GROUPS.values() for name in group))
"""The names of the first 16 numbers of q, which are probabilities."""

MOST_SEVERE = 5.0
_FARTHEST = 5.0  # deviations: far from all that was trained on, no answer may grow without bounds
_FILE = Path(__file__).with_suffix(".safetensors")
_WEIGHTS = load_file(_FILE)
_COPIES: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}


@quality_function(
    "degradation",
    channels=len(KINDS) + 1,
    kinds=KINDS,
    weights=hashlib.sha256(_FILE.read_bytes()).hexdigest()[:16],
)
def degradation(images: Tensor) -> Tensor:
    """Tell for each image which degradation it went through, and how severe that is.

    Args:
        images: (B, 3, H, W) RGB or (B, 1, H, W) grey, any floating dtype, values in [0, 1]. The network was trained on
            pictures with sides of 112 to 512 pixels; what it says of much smaller ones is less reliable.

    Returns:
        (B, 17) on the device of the images, float64 for float64 images and float32 otherwise, always finite. Columns 0
            to 15 are the probabilities of :data:`KINDS`, the first of them that the image is clean, and sum to one.
            Column 16 is the severity in ImageNet-C's levels, from 0 (clean) to 5.

    Raises:
        TypeError: ``images`` is not a tensor, or not of a floating dtype.
        ValueError: ``images`` is not (B, 3, H, W) or (B, 1, H, W), or has no pixels.

    Example:
        >>> q = degradation(torch.rand(2, 3, 64, 64))  # nothing but noise
        >>> q.shape, bool((q[:, 0] < 0.5).all())
        (torch.Size([2, 17]), True)
    """
    features = described(images)
    return classify(features, _weights(features))


def described(images: Tensor) -> Tensor:
    """Compute the network's features (B, 63), ``brisque_tone`` and ``detail``, of images as in :func:`degradation`."""
    features = brisque(images)  # first, since its errors name what is wrong with the images
    with full_precision(features):
        pixels = finite_blocks(images)
        tones = torch.cat([tone(block) for block in pixels]).to(features.dtype)
        return torch.cat([features, tones, torch.cat([detail(block) for block in pixels])], dim=1)


def _weights(like: Tensor) -> dict[str, Tensor]:
    """Return the weights on the device and in the dtype of a tensor; they are copied once."""
    where = (like.device, like.dtype)
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return {name: tensor.to(like) for name, tensor in _WEIGHTS.items()}
    if where not in _COPIES:
        _COPIES[where] = {name: tensor.to(like) for name, tensor in _WEIGHTS.items()}
    return _COPIES[where]


def classify(features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute q (B, 17), as :func:`degradation` returns it, of features (B, 63)."""
    with full_precision(features):
        outputs = network(features, weights)
    severity = outputs[:, -1:].clamp(0.0, MOST_SEVERE)
    return torch.cat([outputs[:, :-1].softmax(dim=1), severity], dim=1)


def network(features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute the logits of :data:`KINDS` and the severity, (B, 17), of features (B, 63)."""
    h = ((features - weights["mean"]) / weights["std"]).clamp(-_FARTHEST, _FARTHEST)
    for layer in ("fc1", "fc2"):
        h = F.linear(h, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).relu()
    return F.linear(h, weights["fc3.weight"], weights["fc3.bias"])
