"""Running a network on images of any size: padded by reflection, and large images in overlapping tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def reflected(x: Tensor, height: int, width: int) -> Tensor:
    """Extend (B, C, H, W) to (B, C, height, width) by reflection at its lower and right edges, however far.

    Example:
        >>> reflected(torch.tensor([[[[1.0, 2.0, 3.0]]]]), 1, 7).flatten().tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 3.0]
    """
    for axis, size in ((2, height), (3, width)):
        n = x.shape[axis]
        if size > n:
            period = max(2 * (n - 1), 1)
            index = torch.arange(size, device=x.device) % period
            x = x.index_select(axis, torch.minimum(index, period - index) if n > 1 else index * 0)
    return x


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the beginnings of the fewest tiles with at least ``overlap``, evenly spread from edge to edge.

    Example:
        >>> starts(100, 40, 10), starts(30, 40, 10)
        ([0, 30, 60], [0])
    """
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(begin: int, size: int, tile: int, overlap: int, like: Tensor) -> Tensor:
    """Return the weights of a tile along an axis: they rise over the overlap, except at the image's own edges."""
    weight = like.new_ones(tile)
    if overlap:
        rise = (torch.arange(overlap, device=like.device, dtype=like.dtype) + 0.5) / overlap
        rise = rise * rise * (3 - 2 * rise)  # smooth where it begins and ends
        if begin > 0:
            weight[:overlap] = rise
        if begin + tile < size:
            weight[-overlap:] = weight[-overlap:] * rise.flip(0)
    return weight


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, multiple: int) -> Tensor:
    """Apply a function of images of fixed sizes to images of any size.

    Args:
        function: (B, C, h, w) → (B, D, h, w); h and w are multiples of ``multiple``.
        x: images (B, C, H, W).
        tile: the largest side of the function's input, a multiple of ``multiple``.
        overlap: the least overlap of tiles, over which their results pass smoothly into each other.
        multiple: the number that divides the sides of the function's input.

    Returns:
        (B, D, H, W). The memory is that of a few copies of x and of the result, and of one tile.

    Example:
        >>> x = torch.rand(1, 3, 50, 70)
        >>> torch.allclose(tiled(lambda t: 2 * t, x, 32, 8, 8), 2 * x)
        True
    """
    height, width = x.shape[2:]
    full = [-(-size // multiple) * multiple for size in (height, width)]
    if max(full) <= tile:
        return function(reflected(x, *full))[:, :, :height, :width]
    sides = [min(tile, size) for size in full]
    x = reflected(x, max(height, sides[0]), max(width, sides[1]))
    total = result = None
    for top, left in _places(x, sides, overlap):
        part = function(x[:, :, top : top + sides[0], left : left + sides[1]])
        if result is None or total is None:
            result = part.new_zeros(*part.shape[:2], *x.shape[2:])
            total = part.new_zeros(1, 1, *x.shape[2:])
        weight = _ramp(top, x.shape[2], sides[0], min(overlap, sides[0] // 2), part)[:, None]
        weight = weight * _ramp(left, x.shape[3], sides[1], min(overlap, sides[1] // 2), part)
        window = (slice(None), slice(None), slice(top, top + sides[0]), slice(left, left + sides[1]))
        result[window] += weight * part
        total[window] += weight
    assert result is not None
    assert total is not None
    return (result / total)[:, :, :height, :width]


def _places(x: Tensor, sides: list[int], overlap: int) -> Iterator[tuple[int, int]]:
    for top in starts(x.shape[2], sides[0], overlap):
        for left in starts(x.shape[3], sides[1], overlap):
            yield top, left
