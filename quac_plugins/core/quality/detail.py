"""The places, directions and scales of an image's detail: 16 numbers that BRISQUE does not see.

BRISQUE pools over the image, so it takes a zoom blur, which spares the middle and the tangents, for a clean picture,
and cannot tell noise that grows with brightness (shot noise) from noise that does not. Both are visible in ratios of
mean absolute differences.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.quality.brisque_tone import luminance

CHANNELS = 16
_LEAST = 1e-4  # a fortieth of a level of 8 bits: what is flat has the logarithm of that
_RINGS = (0.4, 0.8)  # of half the shorter side
_DARK, _BRIGHT = 0.33, 0.6
_CELL = 8  # pixels of the halved image


def detail(pixels: Tensor) -> Tensor:
    """Compute the statistics of each image.

    Args:
        pixels: (B, 3, H, W), float32 or float64, in [0, 1], finite.

    Returns:
        (B, 16) in the dtype of the pixels, finite. Logarithms of radial over tangential differences in three rings
            around the middle, of the image halved and quartered; of its halved horizontal over vertical differences,
            and of one diagonal's over the other's; of the finest over the next detail, at three scales; of the finest
            detail in dark and in bright parts over all of it; of the finest detail itself; and the mean and deviation,
            over cells of 16 pixels, of finest over next detail.

    Example:
        >>> detail(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 16])
    """
    brightness = luminance(pixels)[:, None]
    scales = [brightness]
    for _ in range(3):
        scales.append(_halved(scales[-1]))
    framed = [F.pad(scale, (1, 1, 1, 1), mode="replicate") for scale in scales]
    details = [(scale - F.avg_pool2d(frame, 3, 1)).abs() for scale, frame in zip(scales, framed, strict=True)]
    finest, means = details[0], [_log(each.flatten(1).mean(1)) for each in details]
    numbers = [*_directions(framed[1], diagonals=True), *_directions(framed[2])]
    numbers += [fine - coarse for fine, coarse in itertools.pairwise(means)]
    for part in (brightness < _DARK, brightness > _BRIGHT):
        share = part.to(finest.dtype).flatten(1)
        numbers.append(_log((finest.flatten(1) * share).sum(1) / share.sum(1).clamp(min=1)) - means[0])
    cells = (_log(_cells(_halved(finest))) - _log(_cells(details[1]))).flatten(1)
    deviation = (cells.var(1, correction=0) + 1e-12).sqrt()  # the root has no gradient at 0
    return torch.stack([*numbers, means[0], cells.mean(1), deviation], dim=1)


def _log(x: Tensor) -> Tensor:
    return (x + _LEAST).log()


def _halved(x: Tensor) -> Tensor:
    """Average four pixels each; the last ones of an odd side count twice."""
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)


def _cells(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (0, _CELL - 1, 0, _CELL - 1), mode="replicate"), _CELL)


def _directions(framed: Tensor, diagonals: bool = False) -> list[Tensor]:
    """Compute logarithms of ratios of differences across and along directions, of images with a frame of one pixel."""
    right = framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2]
    down = framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]
    y, x = (torch.arange(n, device=right.device).to(right.dtype) for n in right.shape[-2:])
    y, x = (y - y[-1] / 2)[:, None], (x - x[-1] / 2)[None]
    radius = (x.square() + y.square()).sqrt()
    half = torch.minimum(y[-1, 0], x[0, -1]) + 0.5
    inner, middle = radius < _RINGS[0] * half, radius < _RINGS[1] * half
    rings = torch.stack([inner, middle & ~inner, ~middle]).to(right.dtype).flatten(1)
    away = radius.clamp(min=0.5)
    radial, tangential = (right * x + down * y) / away, (down * x - right * y) / away
    sums = ((each.abs().flatten(1)[:, None] * rings).sum(2) for each in (radial, tangential))
    across, along = (_log(total / rings.sum(1).clamp(min=1)) for total in sums)
    numbers = list((across - along).unbind(1))
    if diagonals:
        falling = framed[..., 2:, 2:] - framed[..., :-2, :-2]
        rising = framed[..., 2:, :-2] - framed[..., :-2, 2:]
        for first, other in ((right, down), (falling, rising)):
            numbers.append(_log(first.abs().flatten(1).mean(1)) - _log(other.abs().flatten(1).mean(1)))
    return numbers
