"""Margins from statistics alone: let degraded features get the mean and deviation of the clean ones, norm after norm.

The clean features are those of the same photographs, so what differs is the degradation and not what is in the
pictures. Each place is matched behind all places before it that were matched already, in one pass over the host. A few
photographs tell little about a channel that drifts differently in each of them: what they say is shrunk by how far they
disagree, as d² / (d² + s²/n) for a mean drift d, its variance s² over n photographs.
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
        clean: uint8 (N, H, W, 3).
        degraded: which row is written (a degradation, at one of the severities), and from which pictures: uint8
            (N, H, W, 3), the same photographs in the same order.
        normalize: uint8 (B, H, W, 3) → what the host takes.
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
    """Mean and variance of each picture's channels, (B, C)."""
    rows = x.movedim(1, -1) if margin.site.layout == "nchw" else x
    rows = rows.flatten(1, -2).float()
    return rows.mean(1), rows.var(1, correction=0)


def _pooled(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over all pictures, (C,)."""
    return means.mean(0), (variances.mean(0) + means.var(0, correction=0)).sqrt()


class _Seen:
    """What some pictures show: each one's mean and variance of every channel, place by place."""

    def __init__(self) -> None:
        self.count = 0
        self.clean: dict[int, tuple[Tensor, Tensor]] = {}
        self.moved: dict[int, Tensor] = {}  # scale and shift, (2, C)

    def note(self, margin: Margin, x: Tensor) -> Tensor:
        """The clean features, which stay as they are."""
        self.count = len(x)
        self.clean[id(margin)] = _by_picture(margin, x)
        return x

    def move(self, margin: Margin, x: Tensor) -> Tensor:
        """The degraded features, which go on as the clean ones are distributed."""
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
    """(C,) from 0 to 1: how far pictures (B, C) agree about a drift; one picture alone is believed by half."""
    if len(drift) < 2:
        return torch.full_like(drift[0], 0.5)
    square = drift.mean(0).square()
    return square / (square + drift.var(0) / len(drift)).clamp(min=1e-12)
