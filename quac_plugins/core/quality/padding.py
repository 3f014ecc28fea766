"""Images of several sizes in one tensor: frameworks pad them to one size, and padding says nothing about quality.

A door notes on the padded tensor how large each image in it is; the tap then shows the quality function the images
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SIZES = "_quac_image_sizes"


def note_sizes(images: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Note that image i of ``images`` (B, C, H, W) is ``images[i, :, :h, :w]`` with (h, w) = ``sizes[i]``.

    Returns:
        The same tensor. What is computed from it knows nothing of the note.

    Raises:
        ValueError: there are not as many sizes as images, or one is empty or larger than the tensor.
    """
    whole = [(int(height), int(width)) for height, width in sizes]
    if len(whole) != images.shape[0]:
        raise ValueError(f"{len(whole)} sizes for a tensor of {images.shape[0]} images")
    for size in whole:
        if not (0 < size[0] <= images.shape[-2] and 0 < size[1] <= images.shape[-1]):
            raise ValueError(f"an image of size {size} does not lie in a tensor of shape {tuple(images.shape)}")
    setattr(images, _SIZES, whole)
    return images


def sizes_of(images: Tensor) -> list[tuple[int, int]] | None:
    """The sizes that were noted, None if nothing was, or if no image is padded."""
    sizes: list[tuple[int, int]] | None = getattr(images, _SIZES, None)
    return sizes if sizes is not None and set(sizes) != {tuple(images.shape[-2:])} else None


def quality_of_each(
    quality: Callable[[Tensor], Tensor], rgb: Tensor, sizes: Sequence[tuple[int, int]] | None
) -> Tensor:
    """The quality features (B, Q) of images (B, 3, H, W) without their padding: one call for each size.

    Example:
        >>> means = lambda images: images.mean((2, 3))
        >>> images = torch.zeros(2, 3, 4, 4)
        >>> images[0, :, :2, :2] = 1
        >>> quality_of_each(means, images, [(2, 2), (4, 4)])
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
    """
    if sizes is None:
        return quality(rgb)
    rows: list[Tensor | None] = [None] * len(sizes)
    for height, width in dict.fromkeys(sizes):
        alike = [i for i, size in enumerate(sizes) if size == (height, width)]
        for i, row in zip(alike, quality(rgb[alike, :, :height, :width]), strict=True):
            rows[i] = row
    return torch.stack([row for row in rows if row is not None])
