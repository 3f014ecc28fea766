"""Images of several sizes in one tensor: frameworks pad them to one size, and padding says nothing about quality.

A door notes on the padded tensor how large each image in it is; the tap then shows the quality function the images
alone. While a detector is traced or exported its sizes are no numbers: then q is that of the padded tensor,
which is said.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SIZES = "_quac_image_sizes"
_MARK = "_quac_notes_sizes"
_TRACED = "_quac_traced_images"  # attribute of a list's tensor while it is traced


def is_traced() -> bool:
    """Return whether a detector is being traced or exported now, rather than run or compiled."""
    return torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)()


def let_lists_note_sizes(cls: Any) -> None:
    """Let every ``cls(tensor, sizes)`` note the sizes from now on; its result stays the same.

    For detectron2's and torchvision's ImageList: between the padding and the backbone, which gets the tensor alone,
    there is no other place to hook into.
    """
    if getattr(cls.__init__, _MARK, False):
        return
    original = cls.__init__

    @functools.wraps(original)
    def noting(self: Any, tensor: Tensor, sizes: Any) -> None:
        original(self, tensor, sizes)
        if is_traced() or torch.jit.is_scripting():
            setattr(tensor, _TRACED, True)
            return
        with contextlib.suppress(TypeError, ValueError):  # a list that holds something else than images of these sizes
            note_sizes(tensor, sizes)

    setattr(noting, _MARK, True)
    cls.__init__ = noting


def note_sizes(images: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Note that image i of ``images`` (B, C, H, W) is ``images[i, :, :h, :w]`` with (h, w) = ``sizes[i]``.

    Returns:
        The same tensor, with the note; tensors that are computed from it have none.

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
    """Return the noted sizes (h, w); None without a note or padding. Warn while a detector is traced."""
    if getattr(images, _TRACED, False) and is_traced():
        warnings.warn(
            "the network is traced with its detector, and a trace knows the images' sizes no more: the quality "
            "features of the traced detector are of the padded tensor. Give it images that need no padding (of the "
            "traced size, whose sides the detector's divisor divides), one size in a batch",
            stacklevel=2,
        )
    sizes: list[tuple[int, int]] | None = getattr(images, _SIZES, None)
    return sizes if sizes is not None and set(sizes) != {tuple(images.shape[-2:])} else None


def quality_of_each(
    quality: Callable[[Tensor], Tensor], rgb: Tensor, sizes: Sequence[tuple[int, int]] | None
) -> Tensor:
    """Compute the quality features (B, Q) of images (B, 3, H, W) without their padding: one call for each size.

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
