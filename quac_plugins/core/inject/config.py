"""The config: the whole description of what is put into a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from quac_plugins.core.activations import ACTIVATIONS, ChannelActivation, DrivenActivation, resolve_activation
from quac_plugins.core.activations.base import INITS
from quac_plugins.core.activations.driver import NORMS
from quac_plugins.core.options import QualityOptions, one_of, pattern_list, whole_number
from quac_plugins.core.quality.expansion import EXPANSIONS


@dataclass
class QuACConfig(QualityOptions):
    """The config of quality-adaptive activations: which, where, and driven by which quality function.

    Attributes:
        activation: ``"qacon"``, ``"qswish"``, ``"qprelu"``, ``"qgelu"``, ``"meta_acon"`` or ``"acon"``.
        where: ``"spatial"`` (the activations that follow a convolution of more than 1×1, the placement of the ACON
            paper), ``"all"``, ``"last"`` (one module on the backbone's output, as in the QuAC pipeline), ``"auto"``
            (spatial; all where spatial reaches less than a fifth of the activations, as in most token and
            pre-activation networks; last without any activation), or a glob
            over module names such as ``"layer3.*.act2"``, a regex written ``"re:…"``, or a list of those.
        quality: name of a quality function (``"brisque"``, ``"brisque_tone"``, ``"contrique"``, ``"pyiqa:NAME"``), or
            a callable (B, 3, H, W) RGB in [0, 1] → (B, Q).
        init: ``"preserve"`` (the host's outputs stay the same) or ``"paper"`` (p1, p2 ~ N(0, 1)).
        norm: the driver's norm: ``"batch"`` (as published), ``"layer"``, ``"group"``, ``"none"``.
        reduction: r; the driver's hidden width is max(r, (C + Q) // r).
        mean, std: normalization of the host's images, undone before the quality function. None: the host's own
            (`HostFacts.normalization`; three channels, or one number), else the images are taken to be in [0, 1].
        channel_order: ``"rgb"`` or ``"bgr"``.
        quality_grad: let gradients flow through the quality function to the images.
        quality_channels: Q of a callable ``quality``; measured when None.
        expand_q: what an activation does with a batch that is a multiple of q's where tracing the host did not show it:
            ``"error"``, ``"interleave"`` or ``"tile"``.
        tap: ``"image"``, q is computed from the images that enter the host; or ``"given"``, the host sees latents or
            noisy samples, so q always comes from the caller (:func:`use_q`, a pipeline) and never from these. A
            batch that is a multiple of the given q's is expanded as ``expand_q`` says.

    Raises:
        ValueError: a value is unknown; the message lists the known ones.

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
    tap: str = "image"

    def __post_init__(self) -> None:
        resolve_activation(self.activation)
        one_of("init", self.init, INITS)
        one_of("norm", self.norm, NORMS)
        one_of("expand_q", self.expand_q, EXPANSIONS)
        one_of("tap", self.tap, ["image", "given"])
        whole_number("reduction", self.reduction, 1, 4096)
        if not isinstance(self.where, str) and isinstance(self.where, Sequence):
            self.where = list(self.where)
        pattern_list("where", self.where)
        self.check_quality()

    @property
    def patterns(self) -> list[str]:
        """Return ``where`` as a list."""
        return pattern_list("where", self.where)

    @property
    def activation_class(self) -> type[ChannelActivation]:
        """Return the class with the name ``activation``."""
        return ACTIVATIONS[self.activation]

    @property
    def is_driven(self) -> bool:
        """Return whether the activation has a driver, which uses ``norm`` and ``reduction``."""
        return issubclass(self.activation_class, DrivenActivation)
