"""The preprocessing of a network: timm's data config and transforms, with single settings overridden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from quac_plugins.core.colours import in_order
from quac_plugins.core.inject import Injection, injection_of
from quac_plugins.core.inject.images import same
from quac_plugins.core.quality.tap import QualityTap

__all__ = ["Crop", "data_config", "per_channel", "sources_of", "square_or_not"]


def data_config(
    model: nn.Module,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | Sequence[int] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """Return the model's timm data config; settings that are not None replace the model's own.

    The record of an injection counts as the model's own: its normalization, and the settings of its fit.

    Args:
        model: the network; without a ``pretrained_cfg`` timm's defaults hold.
        mean: the mean of the normalization, in [0, 1], one number or one for each channel.
        std: the standard deviation likewise, above 0.
        input_size: the side of a square, (H, W) or (3, H, W).
        crop_pct: the side of the crop over the side of the resized image, in (0, 1].
        interpolation: ``"bilinear"``, ``"bicubic"``, or another name of timm.

    Raises:
        ValueError: a setting is out of range, the network does not take images of three channels, or a tap in it undoes
            another normalization.
    """
    args = _known(model)
    if mean is not None:
        args["mean"] = per_channel(mean, "mean")
    if std is not None:
        args["std"] = per_channel(std, "std")
        if min(args["std"]) <= 0:
            raise ValueError(f"std must be above 0, got {std}")
    if input_size is not None:
        args["input_size"] = (3, *square_or_not(input_size))
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
        args["crop_pct"] = crop_pct
    if interpolation is not None:
        try:
            str_to_interp_mode(interpolation)
        except KeyError:
            raise ValueError(f"unknown interpolation {interpolation!r}") from None
        args["interpolation"] = interpolation
    config = timm.data.resolve_model_data_config(model, args=args)
    if config["input_size"][0] != 3:
        raise ValueError(f"only networks of three input channels can be evaluated, this has {config['input_size'][0]}")
    for tap in taps_of(model):
        if tap.mean is not None:
            check_tap(tap, config)
    return config


def _known(model: nn.Module) -> dict[str, Any]:
    """Return the settings that an injection, a fit or a load has noted."""
    record = injection_of(model)
    images = record.images if record is not None else None
    if images is None:
        return {}
    known = {key: value for key, value in images.settings.items() if value is not None}
    if "input_size" in known:
        known["input_size"] = (3, *known["input_size"])
    if images.normalization is not None and all(len(values) in (1, 3) for values in images.normalization):
        known |= {what: per_channel(v, what) for what, v in zip(("mean", "std"), images.normalization, strict=True)}
    return known


def channel_order_of(model: nn.Module) -> str:
    """Return the order of a network's images, ``"rgb"`` or ``"bgr"``, by the configs of its injections.

    Raises:
        ValueError: the configs disagree.
    """
    record = injection_of(model) or Injection()
    configs = [record.config, record.prior.config if record.prior is not None else None]
    orders = {config.channel_order for config in configs if config is not None}
    if len(orders) > 1:
        raise ValueError("the configs of what was put in disagree about channel_order, 'rgb' or 'bgr'")
    return orders.pop() if orders else "rgb"


def normalized(pixels: Tensor, model: nn.Module, config: Mapping[str, Any]) -> Tensor:
    """Normalize pictures (B, 3, H, W) in RGB, uint8 or in [0, 1], by a network's `data_config` and channel order."""
    mean, std = (torch.tensor(config[key], device=pixels.device).view(1, -1, 1, 1) for key in ("mean", "std"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = in_order(pixels, channel_order_of(model))
    images = images if images.is_floating_point() else images.float() / 255
    return ((images - mean) / std).to(dtype)


def taps_of(model: nn.Module) -> list[QualityTap]:
    """Return the taps of a network that compute q of its images."""
    return [module for module in model.modules() if isinstance(module, QualityTap) and module.given is None]


def check_tap(tap: QualityTap, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a tap undoes another normalization than the images get."""
    ours, theirs = (config["mean"], config["std"]), (tap.mean or (0.0,), tap.std or (1.0,))
    if not same(ours, theirs):
        raise ValueError(
            f"images are normalized with mean {tuple(ours[0])} and std {tuple(ours[1])} here, but the tap of the model "
            f"undoes mean {theirs[0]} and std {theirs[1]}: give these, or inject a config with those"
        )


def sources_of(model: nn.Module, options: Mapping[str, Any]) -> dict[str, str]:
    """Return where each setting of `data_config` came from.

    The values are ``"given"``, ``"adapter"`` (the record of the injection), ``"network"`` and ``"timm"`` (a default).

    Example:
        >>> sources_of(nn.Identity(), {"mean": 0.5, "std": None})
        {'mean': 'given', 'std': 'timm'}
    """
    pretrained_cfg, known = getattr(model, "pretrained_cfg", None) or {}, _known(model)
    settings = {key for key, value in known.items() if key not in ("mean", "std") or value != pretrained_cfg.get(key)}
    places = (("adapter", settings), ("network", {key for key, value in pretrained_cfg.items() if value is not None}))
    return {
        key: "given" if value is not None else next((name for name, keys in places if key in keys), "timm")
        for key, value in options.items()
    }


class Crop:
    """Resize and crop as timm does, without the normalization: PIL image in RGB → uint8 tensor (3, H, W).

    Args:
        config: a dict of `data_config`.
        keep_ready: leave an image of the network's size unchanged. The files of ImageNet-C and of other prepared sets
            are resized and cropped already; a second crop would cut their borders off.
    """

    def __init__(self, config: dict[str, Any], keep_ready: bool):
        height, width = config["input_size"][-2:]
        self.ready = (width, height) if keep_ready else None
        self.transform = timm.data.create_transform(**config, is_training=False, normalize=False)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels (3, H, W), uint8, for the network."""
        return pil_to_tensor(image) if image.size == self.ready else self.transform(image)


def per_channel(value: float | Sequence[float], what: str) -> tuple[float, ...]:
    """Return three numbers from one or three.

    Raises:
        ValueError: there are other values.

    Example:
        >>> per_channel(0.5, "mean")
        (0.5, 0.5, 0.5)
    """
    values = tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    if len(values) not in (1, 3):
        raise ValueError(f"{what} must be one number or three, got {len(values)}")
    return values * (3 // len(values))


def square_or_not(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) from a side, (H, W) or (3, H, W).

    Raises:
        ValueError: the size has another form.

    Example:
        >>> square_or_not(224), square_or_not((3, 192, 256))
        ((224, 224), (192, 256))
    """
    sides = tuple(int(s) for s in size) if isinstance(size, Sequence) else (int(size), int(size))
    if len(sides) not in (2, 3) or min(sides) < 1 or (len(sides) == 3 and sides[0] != 3):
        raise ValueError(f"input_size must be a side, (H, W) or (3, H, W), got {size}")
    return sides[-2], sides[-1]
