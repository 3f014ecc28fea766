"""Degradations among detectron2's augmentations."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data.transforms import Augmentation, ColorTransform, NoOpTransform, Transform

from quac_plugins.core.colours import CHANNEL_ORDERS, in_order
from quac_plugins.core.deprecated import renamed
from quac_plugins.degradations import Corrupt


@renamed(image_format="channel_order")
class CorruptImage(Augmentation):
    """Degrade an image by a corruption of ImageNet-C (Hendrycks and Dietterich, ICLR 2019); boxes and masks stay.

    Args:
        corruptions: names or sets of :func:`quac_plugins.degradations.corruption_names`; each image draws one.
        severities: a severity from 1 to 5, or several; each image draws one.
        prob: the share of images that are degraded.
        channel_order: ``"bgr"`` or ``"rgb"``; capitals, as in ``INPUT.FORMAT``, too.
        seed: an integer makes the draws functions of the image alone, for validation. None: numpy's generator draws.

    Raises:
        ValueError: a name, a severity or a probability is wrong; the image is not uint8 (H, W, 3).

    Example:
        >>> import numpy as np
        >>> image = np.full((64, 64, 3), 128, np.uint8)
        >>> transform = CorruptImage("gaussian_noise", 3, seed=0).get_transform(image)
        >>> bool(transform.apply_image(image).std() > 10)
        True
    """

    def __init__(
        self,
        corruptions: str | Sequence[str] = "all",
        severities: int | Sequence[int] = (1, 2, 3, 4, 5),
        prob: float = 1.0,
        channel_order: str = "bgr",
        seed: int | None = None,
    ):
        super().__init__()
        checked = Corrupt(corruptions, severities)  # which knows what cannot be
        self.corruptions, self.severities = checked.names, checked.severities
        if isinstance(prob, bool) or not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
            raise ValueError(f"prob must lie between 0 and 1, got {prob!r}")
        if str(channel_order).lower() not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order must be 'bgr' or 'rgb', got {channel_order!r}")
        self.prob, self.channel_order, self.seed = prob, channel_order.lower(), seed

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the degradation of an image, uint8 (H, W, 3), and return it as a transform."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"CorruptImage takes uint8 images (H, W, 3), got {image.dtype} {image.shape}")
        rng: Any = np.random
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, zlib.crc32(image.tobytes())])
        if rng.random() >= self.prob:
            return NoOpTransform()
        # the transform may be applied again, and is then the same: what is drawn depends on this seed and the pixels
        transform = Corrupt(
            self.corruptions, self.severities, int(rng.random() * 2**31) if self.seed is None else self.seed
        )
        order = self.channel_order
        return ColorTransform(
            lambda pixels: np.ascontiguousarray(
                in_order(transform(np.ascontiguousarray(in_order(pixels, order, -1))), order, -1)
            )
        )
