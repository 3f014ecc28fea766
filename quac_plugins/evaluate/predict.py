"""The prediction of a classifier for one picture, with its injected modules and without, and the picture's quality."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from quac_plugins.core.inject.record import injection_of, unwrap
from quac_plugins.core.inject.surgery import remove
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.evaluate.preprocessing import Crop, data_config, normalized
from quac_plugins.images import to_rgb

__all__ = ["Prediction", "predict"]


@dataclass
class Prediction:
    """The most likely classes of one picture.

    Attributes:
        classes: pairs (class, probability in percent) of the network, the most likely first.
        host: such pairs of the host alone; None if nothing was injected.
        quality: degradation → probability in percent, for degradations above one percent, and ``"severity"`` (0 to 5);
            empty if the quality function tells no degradations.
    """

    classes: list[tuple[str, float]]
    host: list[tuple[str, float]] | None = None
    quality: dict[str, float] = field(default_factory=dict)


def predict(
    model: nn.Module, picture: Image.Image, top: int = 5, host: nn.Module | None = None, **look: Any
) -> Prediction:
    """Classify a picture.

    Args:
        model: a classifier of colour images, with or without QuAC or a prior inside.
        picture: a picture of any size, which is resized and cropped for the network.
        top: the number of classes.
        host: the network without injected modules. None: a copy of the model without them.
        **look: ``mean``, ``std``, ``input_size``, ``crop_pct``, ``interpolation``; the others are the network's own.

    Raises:
        TypeError: the network returns no scores (B, K).

    Example:
        >>> import timm, quac_plugins
        >>> model = timm.create_model("test_resnet_qacon").eval()
        >>> predicted = predict(model, Image.new("RGB", (80, 60)), top=2)
        >>> len(predicted.classes), len(predicted.host)
        (2, 2)
    """
    config = data_config(model, **look)
    pixels = Crop(config, keep_ready=look.get("crop_pct") is None)(to_rgb(picture, upright=False))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = normalized(pixels[None].to(device), model, config)
    names = _class_names(model)
    inside = injection_of(model) is not None
    host = host if host is not None else remove(copy.deepcopy(unwrap(model))) if inside else None
    return Prediction(
        classes=_top(model, images, names, top),
        host=_top(host, images, names, top) if inside and host is not None else None,
        quality=_said(model, images),
    )


def _top(model: nn.Module, images: Tensor, names: list[str] | None, top: int) -> list[tuple[str, float]]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            scores = model(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise TypeError(f"{type(model).__name__} returns no scores (B, K), so there are no classes to tell")
    best = scores.float().softmax(1)[0].topk(min(top, scores.shape[1]))
    known = names is not None and len(names) == scores.shape[1]
    return [
        (names[index] if known and names is not None else f"class {index}", 100 * value)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _class_names(model: nn.Module) -> list[str] | None:
    """Return the class names of an ImageNet classifier of timm, or of its config; None if they are unknown."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(cfg, dict) and cfg.get("label_names"):
        return list(cfg["label_names"])
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(info.num_classes())]


def _said(model: nn.Module, images: Tensor) -> dict[str, float]:
    tap = next((m for m in model.modules() if isinstance(m, QualityTap) and m.quality.kinds), None)
    if tap is None:
        return {}
    q = tap.quality(tap.to_rgb(images))[0].tolist()
    kinds = tap.quality.kinds
    told = sorted(zip(kinds, q[: len(kinds)], strict=True), key=lambda pair: -pair[1])
    said = {kind: 100 * value for kind, value in told if value > 0.01}
    return said | ({"severity": q[len(kinds)]} if len(q) > len(kinds) else {})
