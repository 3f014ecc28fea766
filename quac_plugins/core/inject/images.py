"""The form of a host's images at an injection and at a fit, kept for the load of an adapter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from quac_plugins.core.host.facts import Normalization, facts_of
from quac_plugins.core.options import QualityOptions, numbers

SETTINGS = ("input_size", "crop_pct", "crop_mode", "interpolation")
_MOST = 1 << 26  # numbers of an image


@dataclass(frozen=True)
class Images:
    """The form of a host's images.

    Attributes:
        normalization: mean and std of the images, which a tap undoes. None: the images are in [0, 1].
        host: mean and std by the host's own facts (:func:`facts_of`); None if it has none.
        shape: (C, H, W) of the images of the trace. None: the host takes tokens, or more than images.
        settings: ``input_size`` (H, W), ``crop_pct``, ``crop_mode`` and ``interpolation`` of a fit's pictures; empty
            without a fit.
    """

    normalization: Normalization | None = None
    host: Normalization | None = None
    shape: tuple[int, int, int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for an adapter's config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Images:
        """Read the dict of :meth:`to_dict`; ValueError, TypeError or KeyError for wrong values."""
        shape, settings = values["shape"], dict(values["settings"])
        sides = [*(shape or ()), *(settings.get("input_size") or ())]
        if not all(type(side) is int and 0 < side < 1 << 16 for side in sides):
            raise ValueError(f"sizes of images are {sides}")
        if shape is not None and math.prod(shape) > _MOST:  # a host that fake tensors cannot run is run on such images
            raise ValueError(f"shape {shape} has more than {_MOST} numbers")
        if (shape is not None and len(shape) != 3) or len(settings.get("input_size") or (1, 1)) != 2:
            raise ValueError(f"a size of images is {shape}, {settings.get('input_size')}")
        if surplus := set(settings) - set(SETTINGS):
            raise ValueError(f"unknown settings of images: {', '.join(sorted(surplus))}")
        if not all(isinstance(settings.get(key, ""), str) for key in ("crop_mode", "interpolation")):
            raise ValueError(f"settings of images are {settings}")
        if not isinstance(settings.get("crop_pct", 1.0), (int, float)) or not 0 < settings.get("crop_pct", 1.0) <= 1:
            raise ValueError(f"crop_pct is {settings['crop_pct']!r}")
        return cls(
            _read(values["normalization"]), _read(values["host"]), tuple(shape) if shape is not None else None, settings
        )


def _read(value: Any) -> Normalization | None:
    if value is None:
        return None
    mean, std = (numbers(what, numbers_of) for what, numbers_of in zip(("mean", "std"), value, strict=True))
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(f"mean and std are {value!r}")
    return mean, std


def same(first: Normalization | None, second: Normalization | None) -> bool:
    """Return whether two normalizations are equal; None, images in [0, 1], is a mean of 0 and a std of 1.

    Example:
        >>> same(((0.5,), (0.5,)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))), same(None, ((0.0,), (1.0,)))
        (True, True)
    """
    return np.allclose(_three(first), _three(second), rtol=0, atol=1e-6)


def _three(value: Normalization | None) -> list[tuple[float, ...]]:
    """Expand mean and std to three channels: one number stands for all, and of many the first three are colours."""
    return [((*v, *v[-1:], *v[-1:]))[:3] for v in value or ((0.0,), (1.0,))]


def normalization_of(model: nn.Module, config: QualityOptions, in_chans: int) -> Normalization | None:
    """Return mean and std from the config, else from the host, for as many channels as a tap reads.

    Raises:
        ValueError: mean and std have another number of channels than the images.
    """
    explicit = (config.mean, config.std) if config.mean is not None and config.std is not None else None
    normalization = explicit or facts_of(model).normalization
    return for_channels(normalization, in_chans) if normalization is not None else None


def for_channels(normalization: Normalization, in_chans: int) -> Normalization:
    """Expand a normalization to ``in_chans`` channels, at most three; errors as :func:`normalization_of`."""
    mean, std = normalization
    wanted = min(in_chans, 3)
    if len(mean) == 1 or len(mean) == wanted:
        return mean, std
    if len(mean) == in_chans:  # more than colours: the first three are RGB
        return mean[:wanted], std[:wanted]
    if len(mean) == 3:  # a grey host of a colour recipe: timm normalizes by the mean of the three
        return (sum(mean) / 3,) * wanted, (sum(std) / 3,) * wanted
    raise ValueError(f"mean and std have {len(mean)} numbers, the host's images have {in_chans} channels")


def in_words(value: Normalization | None) -> str:
    """Return a normalization in words, for messages."""
    return "none (images in [0, 1])" if value is None else f"mean {value[0]} and std {value[1]}"
