"""Margins from statistics alone: degraded features get the mean and deviation of the clean ones, norm after norm.

Both come from the same photographs, so that only the degradation differs. Each place is matched behind all earlier
places, which are matched already, in one pass over the host. A few photographs tell little about a channel that drifts
differently in each of them: the drift is shrunk by the photographs' disagreement, as d² / (d² + s²/n) for a mean drift
d with variance s² over n photographs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.prior.margins import Margin

_MOST = 32  # pictures at once: all of their features at one place are in memory
_LEAST = 0.05  # of a place's mean deviation: channels that hardly vary are not blown up


def match(
    model: nn.Module,
    margins: list[Margin],
    clean: np.ndarray,
    degraded: Iterable[tuple[int, np.ndarray]],
    normalize: Callable[[np.ndarray], Tensor],
) -> None:
    """Write rows of every margin.

    Args:
        model: the host with the margins inside, in eval mode.
        margins: all of its margins.
        clean: clean pictures, uint8 (N, H, W, 3).
        degraded: pairs of a row's index (a degradation at one severity) and its pictures, uint8 (N, H, W, 3), the same
            photographs in the same order.
        normalize: uint8 (B, H, W, 3) → the host's input.
    """
    chunks = [slice(start, start + _MOST) for start in range(0, len(clean), _MOST)]
    seen = [_Seen() for _ in chunks]
    for chunk, part in zip(chunks, seen, strict=True):
        with _observed(margins, part.note):
            model(normalize(clean[chunk]))
    for row, pictures in degraded:
        for chunk, part in zip(chunks, seen, strict=True):
            with _observed(margins, part.move):
                model(normalize(pictures[chunk]))
        with torch.no_grad():
            for margin in margins:
                share = torch.stack([part.moved[id(margin)] * part.count for part in seen]).sum(0) / len(clean)
                margin.table[row] = share.flatten().to(margin.table)


@contextlib.contextmanager
def _observed(margins: list[Margin], observer: Callable[[Margin, Tensor], Tensor]) -> Iterator[None]:
    for margin in margins:
        margin.observer = observer
    try:
        with torch.no_grad():
            yield
    finally:
        for margin in margins:
            margin.observer = None


def _by_picture(margin: Margin, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each picture's channels, (B, C)."""
    rows = x.movedim(1, -1) if margin.site.layout == "nchw" else x
    rows = rows.flatten(1, -2).float()
    return rows.mean(1), rows.var(1, correction=0)


def _pooled(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation over all pictures, (C,)."""
    return means.mean(0), (variances.mean(0) + means.var(0, correction=0)).sqrt()


class _Seen:
    """The statistics of some pictures: mean and variance of every channel for each picture, place by place."""

    def __init__(self) -> None:
        self.count = 0
        self.clean: dict[int, tuple[Tensor, Tensor]] = {}
        self.moved: dict[int, Tensor] = {}  # scale and shift, (2, C)

    def note(self, margin: Margin, x: Tensor) -> Tensor:
        """Note the statistics of clean features, and return the features unchanged."""
        self.count = len(x)
        self.clean[id(margin)] = _by_picture(margin, x)
        return x

    def move(self, margin: Margin, x: Tensor) -> Tensor:
        """Note the statistics of degraded features, and return them with the distribution of the clean ones."""
        theirs, ours = self.clean[id(margin)], _by_picture(margin, x)
        (clean_mean, clean_std), (mean, std) = _pooled(*theirs), _pooled(*ours)
        least = _LEAST * clean_std.mean() + 1e-6
        scale = (clean_std + least) / (std + least)
        ratio = ((theirs[1] + least**2) / (ours[1] + least**2)).log() / 2  # of each picture
        scale = 1 + (scale - 1) * _agreement(ratio)
        shift = (clean_mean - scale * mean) * _agreement(theirs[0] - scale * ours[0])
        self.moved[id(margin)] = torch.stack([scale - 1, shift])
        shape = (-1, 1, 1) if margin.site.layout == "nchw" else (-1,)
        return torch.addcmul(shift.view(shape).to(x), x, scale.view(shape).to(x))


def _agreement(drift: Tensor) -> Tensor:
    """Return (C,), from 0 to 1, the agreement of pictures (B, C) about a drift; a single picture counts by half."""
    if len(drift) < 2:
        return torch.full_like(drift[0], 0.5)
    square = drift.mean(0).square()
    return square / (square + drift.var(0) / len(drift)).clamp(min=1e-12)
