"""The config: the whole description of what is put into a host."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from quac_plugins.core.activations import ACTIVATIONS, ChannelActivation, DrivenActivation, resolve_activation
from quac_plugins.core.activations.base import INITS
from quac_plugins.core.activations.driver import EXPANSIONS, NORMS


def _one_of(what: str, value: Any, known: tuple[str, ...] | list[str]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {what} {value!r}{hint} Known: {', '.join(known)}")


def _numbers(what: str, value: Any) -> tuple[float, ...]:
    try:
        numbers = (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{what} must be a number or one for each channel, got {value!r}")
    return numbers


def without_path(quality: str) -> str:
    """``contrique:/some/file`` as ``contrique``: files of one machine are neither saved nor opened for another's sake.

    Example:
        >>> without_path("contrique:/some/file"), without_path("pyiqa:piqe")
        ('contrique', 'pyiqa:piqe')
    """
    prefix, _, argument = quality.partition(":")
    return prefix if any(mark in argument for mark in "/\\") else quality


@dataclass
class QuACConfig:
    """What :func:`quac_plugins.inject` puts into a host.

    Attributes:
        activation: ``"qacon"``, ``"qswish"``, ``"qprelu"``, ``"qgelu"``, ``"meta_acon"`` or ``"acon"``.
        where: ``"spatial"`` (the activations that follow a convolution of more than 1×1, the placement of the ACON
            paper), ``"all"``, ``"last"`` (one module on the backbone's output, as in the QuAC pipeline), ``"auto"``
            (spatial; all where spatial reaches less than a fifth of the activations, as in most token and
            pre-activation networks; last without any activation), or a glob
            over module names such as ``"layer3.*.act2"``, a regex written ``"re:…"``, or a list of those.
        quality: name of a quality function (``"brisque"``, ``"contrique"``, ``"pyiqa:NAME"``), or a callable
            (B, 3, H, W) RGB in [0, 1] → (B, Q).
        init: ``"preserve"`` (the host computes what it computed before) or ``"paper"``.
        norm: the driver's norm: ``"batch"`` (as published), ``"layer"``, ``"group"``, ``"none"``.
        reduction: r; the driver's hidden width is max(r, (C + Q) // r).
        mean, std: normalization of the host's images, undone before the quality function. None: the host's own
            ``pretrained_cfg`` if it has one (and three channels, or one number), else images are taken to be in [0, 1].
        channel_order: ``"rgb"`` or ``"bgr"``.
        quality_grad: let gradients flow through the quality function to the images.
        quality_channels: Q of a callable ``quality``; measured when None.
        expand_q: what an activation does with a batch that is a multiple of q's where tracing the host did not show it:
            ``"error"``, ``"interleave"`` or ``"tile"``.

    Raises:
        ValueError: a value is not known; the message lists those that are.

    Example:
        >>> QuACConfig(activation="qacon", where="spatial").norm
        'batch'
    """

    activation: str = "qacon"
    where: str | list[str] = "auto"
    quality: str | Callable[[Tensor], Tensor] = "brisque"
    init: str = "preserve"
    norm: str = "batch"
    reduction: int = 16
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_order: str = "rgb"
    quality_grad: bool = False
    quality_channels: int | None = None
    expand_q: str = "error"

    def __post_init__(self) -> None:
        resolve_activation(self.activation)
        _one_of("init", self.init, INITS)
        _one_of("norm", self.norm, NORMS)
        _one_of("channel_order", self.channel_order, ["rgb", "bgr"])
        _one_of("expand_q", self.expand_q, EXPANSIONS)
        if isinstance(self.reduction, bool) or not isinstance(self.reduction, int) or not 1 <= self.reduction <= 4096:
            raise ValueError(f"reduction must be a whole number from 1 to 4096, got {self.reduction!r}")
        if isinstance(self.where, (list, tuple)):
            self.where = list(self.where)
        if (
            not isinstance(self.where, (str, list))
            or not self.where
            or not all(w and isinstance(w, str) for w in self.patterns)
        ):
            raise ValueError(f"where must be a name, a pattern or a list of patterns, got {self.where!r}")
        if not isinstance(self.quality, str) and not callable(self.quality):
            raise TypeError(f"quality must be a name or a callable, got {type(self.quality).__name__}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                setattr(self, name, _numbers(name, getattr(self, name)))
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have as many numbers, got {self.mean} and {self.std}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if not isinstance(self.quality_grad, bool):
            raise ValueError(f"quality_grad must be True or False, got {self.quality_grad!r}")
        q = self.quality_channels
        if q is not None and (isinstance(q, bool) or not isinstance(q, int) or q < 1):
            raise ValueError(f"quality_channels must be a whole number ≥ 1, got {q!r}")

    @property
    def patterns(self) -> list[str]:
        """``where`` as a list."""
        return [self.where] if isinstance(self.where, str) else list(self.where)

    @property
    def activation_class(self) -> type[ChannelActivation]:
        """The class that ``activation`` names."""
        return ACTIVATIONS[self.activation]

    @property
    def is_driven(self) -> bool:
        """Whether the activation has a driver, and so takes norm and reduction."""
        return issubclass(self.activation_class, DrivenActivation)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable; a callable quality appears as its name, and must be given again when it is read back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.quality, str):
            values["quality"] = without_path(self.quality)
        else:
            values["quality"] = f"callable:{getattr(self.quality, '__name__', type(self.quality).__name__)}"
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuACConfig:
        """Read what :meth:`to_dict` wrote; ValueError names unknown fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown fields of QuACConfig: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")
        return cls(**values)
