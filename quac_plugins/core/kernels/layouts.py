"""How tensors lie in memory, and what every kind of kernel offers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

Layout = tuple[int, int, int, bool]
"""Batch, rows, numbers a row, and whether a row is a channel; in columns each of its numbers is of another channel."""
WIDE = {
    torch.float32: torch.float32, torch.float64: torch.float64, torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}  # fmt: skip
"""dtype of x → of the arithmetic."""
BELOW = ("", "below", "identity", "relu", "relu6", "hardswish")
"""The summands of y: none, a tensor, or a function of x that kernels compute themselves; numbers in C++."""


class Kernels(NamedTuple):
    """Kernels of a dtype on a kind of device.

    Attributes:
        run: (grad or None, x, θ, equation, start, below, layout) → y; or, of a gradient, those of x and of θ. All is
            without gradients, x is dense, grad and below are laid out as x, θ are contiguous, (C,) or (B, C) numbers
            each, in the dtype of the arithmetic; the rest as :func:`operator.activate` takes it, but for functions. On
            a CPU y may be given after them.
        means: (x, layout) → (B, C); None: torch's own are fast.
    """

    run: Callable[..., Any]
    means: Callable[..., Any] | None


@lru_cache(maxsize=1024)
def layout_of(shape: torch.Size, stride: tuple[int, ...], channel: int) -> Layout | None:
    """Return the layout of a tensor whose channels are on axis ``channel``; None: it has gaps, or another order."""
    x = torch.empty_strided(shape, stride, device="meta")
    batch, channels = shape[0], shape[channel]
    pixels = x.numel() // max(batch * channels, 1)
    by_rows = channel == 1 and x.is_contiguous()
    if x.movedim(channel, -1).is_contiguous() and (channels > 1 or not by_rows):
        return batch, pixels, channels, False
    return (batch, channels, pixels, True) if by_rows else None
