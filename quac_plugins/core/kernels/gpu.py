"""The native kernels in Triton, for a GPU: one pass forward, one backward with its sums.

They take strides, so that rows (NCHW) and columns (channels_last, tokens) are the same code over tiles of another
shape. Computed in float32, for x in float32, bfloat16 and float16. The equations are those of :mod:`equations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quac_plugins.core.kernels.layouts import Kernels, Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 1024
"""Numbers that a program holds at a time."""
PIECE = 128
"""Tiles' rows, at most, whose sums one program makes in columns; in rows it makes those of as many tiles."""


@triton.jit
def _gate(x, t0, t1, t2, EQUATION: tl.constexpr):
    """Compute A of y = x·A."""
    if EQUATION == "acon":
        return (t0 - t1) / (1 + tl.exp(t2 * (t1 - t0) * x)) + t1
    elif EQUATION == "swish":
        return 1 / (1 + tl.exp(-t0 * x))
    elif EQUATION == "prelu":
        return tl.where(x >= 0, 1.0, t0)
    else:
        tl.static_assert(EQUATION == "gelu")
        return 0.5 * (1 + tl.erf(t0 * x * 0.7071067811865476))


@triton.jit
def _slope(x, t0, t1, t2, EQUATION: tl.constexpr):
    """Compute ∂y/∂x and ∂y/∂θ; the caller multiplies the third by (p1 − p2)², which is constant in a channel."""
    if EQUATION == "prelu":
        below = tl.where(x >= 0, 0.0, x)
        return tl.where(x >= 0, 1.0, t0), below, below, below
    elif EQUATION == "gelu":
        z = t0 * x
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        by = x * x * density
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density, by, by, by
    else:
        beta = t0
        if EQUATION == "acon":
            beta = t2 * (t0 - t1)
        t = -beta * x
        g = 1 / (1 + tl.exp(t))
        s = g - g * g
        w = g - t * s
        if EQUATION == "acon":
            return (t0 - t1) * w + t1, x * w, x - x * w, x * x * s
        else:
            by = x * x * s
            return w, by, by, by


@triton.jit
def _host(x, HOST: tl.constexpr):
    if HOST == "identity":
        return x
    elif HOST == "relu":
        return tl.where(x > 0, x, x * 0)  # NaN stays
    elif HOST == "relu6":
        return tl.where(x > 6, 6.0, tl.where(x > 0, x, x * 0))
    else:
        up = x + 3
        return x * tl.where(up > 6, 6.0, tl.where(up > 0, up, 0.0)) / 6


@triton.jit
def _host_slope(x, HOST: tl.constexpr):
    if HOST == "identity":
        return 1.0
    elif HOST == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif HOST == "relu6":
        return tl.where((x > 0) & (x < 6), 1.0, 0.0)
    else:
        return tl.where(tl.abs(x) < 3, x / 3 + 0.5, tl.where(x > 0, 1.0, 0.0))


@triton.jit
def forward(x_of, below_of, y_of, t0_of, t1_of, t2_of, b0, b1, b2, s0, s1, s2, channels, pixels, tiles,
            by_batch, by_channel, by_pixel, EQUATION: tl.constexpr, START: tl.constexpr, HOST: tl.constexpr,
            PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Compute one tile: b0, b1, b2 are the parameters' strides along the batch, s0, s1, s2 the numbers of θ⁰."""
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    channel, pixel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tile * PIXELS + tl.arange(0, PIXELS)
    valid, inside = channel < channels, (pixel < pixels)[:, None] & (channel < channels)[None, :]
    at = b.to(tl.int64) * by_batch + pixel.to(tl.int64)[:, None] * by_pixel + channel[None, :] * by_channel
    t0 = tl.load(t0_of + b * b0 + channel, mask=valid, other=0.0)[None, :]
    t1 = tl.load(t1_of + b * b1 + channel, mask=valid, other=0.0)[None, :]
    t2 = tl.load(t2_of + b * b2 + channel, mask=valid, other=0.0)[None, :]
    x = tl.load(x_of + at, mask=inside, other=0.0).to(tl.float32)
    gate = _gate(x, t0, t1, t2, EQUATION)
    if START:
        gate -= _gate(x, s0, s1, s2, EQUATION)
    y = x * gate
    if HOST == "below":
        y += tl.load(below_of + at, mask=inside, other=0.0).to(tl.float32)
    elif HOST != "":
        y += _host(x, HOST)
    tl.store(y_of + at, y.to(y_of.dtype.element_ty), mask=inside)


@triton.jit
def backward(grad_of, x_of, by_x_of, t0_of, t1_of, t2_of, b0, b1, b2, s0, s1, s2, sums_of, channels, pixels, pieces,
             by_batch, by_channel, by_pixel, EQUATION: tl.constexpr, START: tl.constexpr, HOST: tl.constexpr,
             COUNT: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Compute ∂x of a piece of TILES tiles, and its part of the sums (B, pieces, COUNT, C) for ∂θ."""
    b, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    t0 = tl.load(t0_of + b * b0 + channel, mask=valid, other=0.0)[None, :]
    t1 = tl.load(t1_of + b * b1 + channel, mask=valid, other=0.0)[None, :]
    t2 = tl.load(t2_of + b * b2 + channel, mask=valid, other=0.0)[None, :]
    sum0 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sum1 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sum2 = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tile in range(piece * TILES, piece * TILES + TILES):
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & valid[None, :]
        at = b.to(tl.int64) * by_batch + pixel.to(tl.int64)[:, None] * by_pixel + channel[None, :] * by_channel
        x = tl.load(x_of + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_of + at, mask=inside, other=0.0).to(tl.float32)
        slope, p0, p1, p2 = _slope(x, t0, t1, t2, EQUATION)
        if START:
            before, _, _, _ = _slope(x, s0, s1, s2, EQUATION)
            slope -= before
        if HOST != "" and HOST != "below":
            slope += _host_slope(x, HOST)
        tl.store(by_x_of + at, (grad * slope).to(by_x_of.dtype.element_ty), mask=inside)
        sum0 += tl.where(inside, grad * p0, 0.0)
        if COUNT > 1:
            sum1 += tl.where(inside, grad * p1, 0.0)
            sum2 += tl.where(inside, grad * p2, 0.0)
    sums_at = sums_of + tl.program_id(0).to(tl.int64) * COUNT * channels + channel
    tl.store(sums_at, tl.sum(sum0, axis=0), mask=valid)
    if COUNT > 1:
        apart = (t0 - t1) * (t0 - t1)
        tl.store(sums_at + channels, tl.sum(sum1, axis=0), mask=valid)
        tl.store(sums_at + 2 * channels, tl.sum(sum2 * apart, axis=0), mask=valid)


def run(
    grad: Tensor | None, x: Tensor, theta: Sequence[Tensor], equation: Callable[..., Tensor],
    start: tuple[float, ...], below: Tensor | str, layout: Layout,
) -> Any:  # fmt: skip
    """Run the kernels as :func:`cpu._run` does: y, or the gradients of x and of θ."""
    batch, rows, n, by_rows = layout
    channels, pixels = (rows, n) if by_rows else (n, rows)
    strides = (channels * pixels, pixels, 1) if by_rows else (channels * pixels, 1, channels)
    count, host = len(theta), below if isinstance(below, str) else "below"
    parameters = (*theta, *theta, *theta)[:3]
    strides_of = [channels if p.numel() != channels else 0 for p in parameters]
    values = (*parameters, *strides_of, *(*map(float, start), 0.0, 0.0, 0.0)[:3])
    if by_rows:
        wide = min(TILE, triton.next_power_of_2(max(pixels, 1)))
        shape = {"PIXELS": wide, "CHANNELS": min(TILE // wide, triton.next_power_of_2(max(channels, 1)))}
    else:
        wide = min(64, triton.next_power_of_2(max(channels, 16)))
        shape = {"PIXELS": min(TILE // wide, triton.next_power_of_2(max(pixels, 1))), "CHANNELS": wide}
    options = {"EQUATION": equation.__name__, "START": bool(start), "HOST": host, **shape}
    tiles, groups = -(-pixels // shape["PIXELS"]), -(-channels // shape["CHANNELS"])
    y = torch.empty_like(x)
    if grad is None:
        if x.numel():
            with torch.cuda.device_of(x):
                forward[(batch * tiles, groups)](
                    x, x if isinstance(below, str) else below, y, *values, channels, pixels, tiles, *strides, **options
                )
        return y
    together = min(max(tiles, 1), max(PIECE // shape["PIXELS"], 4))
    pieces = -(-tiles // together)
    sums = torch.zeros(batch, pieces, count, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            backward[(batch * pieces, groups)](
                grad, x, y, *values, sums, channels, pixels, pieces, *strides, COUNT=count, TILES=together, **options
            )
    by = sums.sum(1).unbind(1)
    return y, [(b if p.numel() != channels else b.sum(0)).view_as(p) for b, p in zip(by, theta, strict=True)]


def build(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels of a dtype, or None; Triton compiles them at their first use and keeps them on disk."""
    return Kernels(run, None) if dtype in DTYPES else None
