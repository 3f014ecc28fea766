"""BRISQUE with tone: 36 natural-scene statistics and 11 numbers about brightness, colour and contrast.

BRISQUE divides local contrast away, so it cannot tell fog from low contrast, or night from day. What it loses is
little and simple: means and standard deviations of the channels, and percentiles of the luminance.

Percentiles come from a histogram of 2^16 levels. Sorting the pixels would give them to the last bit, and take three
times as long as BRISQUE itself; counting them is exact to 1e-5, cheap, and independent of the order of the pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quac_plugins.core.graphs import exporting
from quac_plugins.core.quality.brisque import blocks, brisque
from quac_plugins.core.quality.registry import quality_function

PERCENTILES = (1.0, 25.0, 50.0, 75.0, 99.0)
# Luminance of RGB (Rec. 601).
_LUMA = (0.299, 0.587, 0.114)
_LEVELS = 1 << 16

# One image of 224×224: larger temporaries are fetched from the system and given back, at twice the time.
_BLOCK_PIXELS = 224 * 224


@quality_function("brisque_tone", channels=47)
def brisque_tone(images: Tensor) -> Tensor:
    """Compute the 36 BRISQUE features of each image, followed by 11 tone statistics.

    The tone statistics are the means of the three channels, their standard deviations (over all pixels, not n - 1),
    and the percentiles 1, 25, 50, 75 and 99 of the luminance, interpolated linearly as ``numpy.percentile`` does.

    Args:
        images: as :func:`~quac_plugins.core.quality.brisque.brisque` takes them: (B, 3, H, W) RGB or (B, 1, H, W)
            grey, any floating dtype, any H, W ≥ 1, values in [0, 1]. Values outside are clamped, ±inf with them; a
            pixel with a NaN in any channel is black.

    Returns:
        (B, 47) on the device of the images, float64 for float64 images and float32 otherwise, always finite. Columns
            0 to 35 are ``brisque(images)``; 36 to 46 lie in [0, 1].

    Raises:
        TypeError: ``images`` is not a tensor, or not of a floating dtype.
        ValueError: ``images`` is not (B, 3, H, W) or (B, 1, H, W), or has no pixels.

    Note:
        Means and deviations are of the values as they are (BRISQUE rounds them to 8 bits), percentiles of the luminance
        rounded to 16 bits. If the images require a gradient, it flows through BRISQUE's variances and means and
        through the means and deviations of the channels; the percentiles, which are counted, contribute none.

    Example:
        >>> ramp = torch.linspace(0, 1, 101).expand(2, 3, 64, 101)
        >>> q = brisque_tone(ramp)
        >>> q.shape
        torch.Size([2, 47])
        >>> [round(value, 2) for value in q[0, 36:].tolist()]
        [0.5, 0.5, 0.5, 0.29, 0.29, 0.29, 0.01, 0.25, 0.5, 0.75, 0.99]
    """
    features = brisque(images)  # first, since it names what is wrong with the images
    tones = torch.cat([tone(block) for block in finite_blocks(images)])
    return torch.cat([features, tones.to(features.dtype)], dim=1)


def tone(pixels: Tensor) -> Tensor:
    """Compute the 11 tone statistics (B, 11) of finite pixels (B, 3, H, W) in [0, 1]."""
    wide = torch.float32 if pixels.device.type == "mps" else torch.float64  # MPS has no float64
    mean, deviation = _moments(pixels, wide)
    return torch.cat([mean, deviation, _percentiles(pixels.detach(), wide)], dim=1)


def finite_blocks(images: Tensor) -> list[Tensor]:
    """Split images (B, 1 or 3, H, W) into blocks (b, 3, H, W) in [0, 1], float32 or float64; NaN pixels are black."""
    return [_finite(block) for block in blocks(images, _BLOCK_PIXELS)]


def _finite(images: Tensor) -> Tensor:
    pixels = images if images.dtype == torch.float64 else images.float()
    # contiguous, so that the order of summation does not depend on the memory format
    pixels = pixels.contiguous().clamp(0.0, 1.0)
    broken = pixels.detach().sum(dim=1, keepdim=True).isnan()
    return pixels.masked_fill_(broken, 0.0).expand(-1, 3, -1, -1)


def luminance(pixels: Tensor) -> Tensor:
    """Compute the luminance (B, H, W) of RGB (B, 3, H, W)."""
    red, green, blue = pixels.unbind(1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _moments(pixels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel of (B, 3, H, W): (B, 3) each, in the dtype ``wide``."""
    count = pixels.shape[2] * pixels.shape[3]
    # rows first: the same order of summation in every batch
    mean = pixels.sum(-1).sum(-1, dtype=wide) / count
    rows = torch.linalg.vector_norm(pixels - mean[..., None, None].to(pixels.dtype), dim=-1)
    variance = rows.to(wide).square().sum(-1) / count
    return mean, (variance + 1e-30).sqrt()  # the root has no gradient at 0


def _percentiles(pixels: Tensor, wide: torch.dtype) -> Tensor:
    """Compute percentiles (B, 5) of the luminance of (B, 3, H, W) in [0, 1], in the dtype ``wide``."""
    levels = (luminance(pixels) * (_LEVELS - 1)).round_().clamp_(max=_LEVELS - 1).flatten(1)
    last = torch.zeros_like(levels[:, :1], dtype=torch.int32) + (levels.shape[1] - 1)  # rank of the brightest pixel
    position = torch.cat([last.to(wide) * (percentile / 100.0) for percentile in PERCENTILES], dim=1)
    lower = position.floor()
    ranks = lower.to(torch.int32)
    ranks = torch.cat([ranks, torch.minimum(ranks + 1, last)], dim=1)
    low, high = _of_ranks(levels, ranks).to(wide).chunk(2, dim=1)
    return (low + (high - low) * (position - lower)) / (_LEVELS - 1)


def _of_ranks(levels: Tensor, ranks: Tensor) -> Tensor:
    """Select the levels at ranks (B, M) of the sorted levels (B, N), whole numbers below 2^16: (B, M)."""
    if exporting():  # slower, in two operations that every format knows
        return levels.sort(dim=1).values.gather(1, ranks.long())
    # integers: a sum that is the same in whatever order a GPU adds
    counts = torch.zeros((levels.shape[0], _LEVELS), dtype=torch.int32, device=levels.device)
    counts = counts.scatter_add(1, levels.long(), torch.ones_like(levels, dtype=torch.int32))
    # as many levels lie below that of a rank as have no more than ``rank`` pixels up to them
    return torch.searchsorted(counts.cumsum(1, dtype=torch.int32), ranks, right=True)
