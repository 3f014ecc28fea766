"""The order of an image's colours: RGB in this package, BGR for hosts that take BGR."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

CHANNEL_ORDERS = ("rgb", "bgr")
Images = TypeVar("Images", Tensor, np.ndarray)


def in_order(images: Images, order: str, axis: int = 1) -> Images:
    """Turn RGB images into a host's order of channels, or a host's images into RGB: both are the same step.

    Args:
        images: a tensor or array with three channels on ``axis``.
        order: the host's order, ``"rgb"`` or ``"bgr"``.
        axis: the axis of the channels.

    Example:
        >>> in_order(np.array([[1, 2, 3]]), "bgr").tolist()
        [[3, 2, 1]]
    """
    if order == "rgb":
        return images
    return images.flip(axis) if isinstance(images, Tensor) else np.flip(images, axis)
