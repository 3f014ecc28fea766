"""torchvision's detectors: q is computed from each image without the batch's padding.

A detector takes a list of images, pads them into one tensor and calls its backbone with it. So inject the backbone:

    >>> import torch, quac_plugins as quac
    >>> from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    >>> detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    >>> config = quac.QuACConfig(mean=detector.transform.image_mean, std=detector.transform.image_std)
    >>> _ = quac.inject(detector.backbone, config, example=torch.empty(1, 3, 320, 320))
    >>> len(detector([torch.rand(3, 100, 130), torch.rand(3, 120, 100)]))
    2
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.detection.image_list import ImageList

from quac_plugins.core.host.facts import add_reader
from quac_plugins.core.quality.padding import let_lists_note_sizes

let_lists_note_sizes(ImageList)


@add_reader
def read_facts(model: nn.Module) -> dict[str, Any]:
    """Return mean and std with which a detector's transform normalizes its backbone's images."""
    for module in model.modules():
        mean, std = getattr(module, "image_mean", None), getattr(module, "image_std", None)
        if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)):
            return {"inner_normalization": (tuple(mean), tuple(std))}
    return {}
