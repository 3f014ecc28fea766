"""The driver: pooled features (and quality features) → numbers for every channel. One driver, several activations.

z = [GAP(x); q];  h = σ(norm2(fc2 norm1(fc1 z)));  numbers = fc3 h.

The parameters are named fc1, bn1, fc2, bn2, fc3 and shaped as 1×1 convolutions, whatever the norm, so that the state
dicts of the published modules load.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.activations.base import ChannelActivation
from quac_plugins.core.kernels import means
from quac_plugins.core.kernels.native import DTYPES
from quac_plugins.core.kernels.plain import per_channel
from quac_plugins.core.precision import full_precision
from quac_plugins.core.quality.context import QualityError
from quac_plugins.core.quality.expansion import EXPANSIONS, can_expand, expand_rows

NORMS = ("batch", "layer", "group", "none")


def make_norm(norm: str, width: int) -> nn.Module:
    """Make a norm for (B, width, 1, 1). ``group`` takes the most groups up to 32 with four or more numbers each."""
    if norm == "batch":
        return nn.BatchNorm2d(width)
    if norm == "layer":
        return nn.GroupNorm(1, width)
    if norm == "group":
        return nn.GroupNorm(max(g for g in range(1, 33) if width % g == 0 and (width // g >= 4 or g == 1)), width)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"unknown norm {norm!r}; known: {', '.join(NORMS)}")


def _is_learning(norm: nn.Module) -> bool:
    """Return whether a norm uses the statistics of the batch; a norm may be frozen while the model trains."""
    return type(norm) is nn.BatchNorm2d and (norm.training or norm.running_mean is None)


def _saturate(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast z to ``dtype``, clamped to the range of float16 there, since a norm makes NaN of infinity."""
    return z.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else z.to(dtype)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution of (B, C, 1, 1), as a matrix product: a convolution of one pixel takes five times as long."""

    def __init__(self, width: int, outputs: int):
        super().__init__(width, outputs, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, C, 1, 1) to (B, C', 1, 1)."""
        z = F.linear(z.flatten(1), self.weight.flatten(1), self.bias)
        return z.view(*z.shape, 1, 1)  # several None in an index are several operations


class DrivenActivation(ChannelActivation):
    """An activation whose parameters (``numbers`` a channel) come from pooled x, and from q where Q > 0.

    Args:
        channels: C.
        quality_channels: Q.
        reduction: r; the hidden width is max(r, (C + Q) // r).
        norm: ``"batch"`` (as published), ``"layer"``, ``"group"`` or ``"none"``. Batch norm cannot train on one image.
        channel_dim, init, host: see :class:`ChannelActivation`.
        expand_q: what to do when x has k times as many rows as q: ``"error"``, ``"interleave"`` (rows of one image
            lie together, as windows of an image do) or ``"tile"`` (the batch is repeated whole, as classifier-free
            guidance does).
    """

    learned: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that come before the driven ones in the equation."""

    def __init__(
        self,
        channels: int,
        quality_channels: int = 36,
        reduction: int = 16,
        norm: str = "batch",
        channel_dim: int = 1,
        init: str = "paper",
        host: nn.Module | None = None,
        expand_q: str = "error",
    ):
        super().__init__(channels, channel_dim, init, host)
        if quality_channels < 0 or reduction < 1:
            raise ValueError(f"quality_channels must be ≥ 0 and reduction ≥ 1, got {quality_channels}, {reduction}")
        if expand_q not in EXPANSIONS:
            raise ValueError(f"unknown expand_q {expand_q!r}; known: {', '.join(EXPANSIONS)}")
        self.quality_channels = quality_channels
        self.reduction = reduction
        self.norm = norm
        self.expand_q = expand_q
        width = channels + quality_channels
        hidden = max(reduction, width // reduction)
        self.fc1 = Pointwise(width, hidden)
        self.bn1 = make_norm(norm, hidden)
        self.fc2 = Pointwise(hidden, width)
        self.bn2 = make_norm(norm, width)
        self.fc3: nn.Module | None = self._build_head(width)
        if init == "preserve":
            self._preserve_head()

    def _build_head(self, width: int) -> nn.Module | None:
        """Return fc3, or None where the driver's numbers are h itself."""
        return Pointwise(width, self.numbers * self.channels)

    def _preserve_head(self) -> None:
        """Set weight 0 and bias θ⁰: the numbers are exactly θ⁰ for every z, and the weight has a gradient at once."""
        assert isinstance(self.fc3, nn.Conv2d)
        assert self.fc3.bias is not None
        nn.init.zeros_(self.fc3.weight)
        driven = self.neutral[len(self.neutral) - self.numbers :]
        with torch.no_grad():
            self.fc3.bias.view(self.numbers, self.channels).copy_(
                self.fc3.bias.new_tensor(driven).unsqueeze(1).expand(-1, self.channels)
            )

    def hidden(self, z: Tensor) -> Tensor:
        """Compute h = σ(norm2(fc2 norm1(fc1 z))): z (B, C + Q) → h (B, C + Q), in the dtype of z."""
        if z.shape[0] == 1 and (_is_learning(self.bn1) or _is_learning(self.bn2)):
            raise ValueError(
                f"layer {self.layer!r}: norm='batch' cannot train on a batch of one (a variance needs two). Use "
                "norm='layer', 'group' or 'none' (timm.create_model(…, norm='layer')), or model.eval()"
            )
        dtype = z.dtype
        z = _saturate(self.fc1(z.view(*z.shape, 1, 1)), dtype)
        z = _saturate(self.fc2(_saturate(self.bn1(z), dtype)), dtype)
        return torch.sigmoid(self.bn2(z)).flatten(1)

    def values(self, x: Tensor, q: Tensor | None) -> tuple[Tensor, ...]:
        """Return the learned parameters, then the driver's for x and q; each broadcasts against x."""
        # the driver is tiny: float32 under autocast costs nothing and keeps preserve exact
        with full_precision(x):
            z = means(x, self.channel_dim)
            if self.quality_channels:
                z = torch.cat((z, self.quality_for(x, q).to(z)), dim=1)
            stored = self.fc1.weight.dtype
            dtype = stored if stored in DTYPES else x.dtype  # what is only stored so, hooks make what x is
            numbers = self.head(self.hidden(_saturate(z, dtype)))
        driven = [per_channel(part, x, self.channel_dim) for part in numbers.chunk(self.numbers, dim=1)]
        return (*[self.shaped(getattr(self, name), x) for name in self.learned], *driven)

    def head(self, h: Tensor) -> Tensor:
        """Map h (B, C + Q) to the driver's numbers (B, numbers·C)."""
        return h if self.fc3 is None else self.fc3(h.view(*h.shape, 1, 1)).flatten(1)

    def quality_for(self, x: Tensor, q: Tensor | None) -> Tensor:
        """Return the given q, or the tap's, checked and expanded to one row for every row of x: (B, Q)."""
        if q is None:
            if self.context is None:
                raise QualityError(
                    f"layer {self.layer!r} has no quality features: pass them (forward(x, q)) or put the activation "
                    "into a model with quac_plugins.inject, whose tap computes them"
                )
            q = self.context.current(x, self.layer)
        if q.ndim == 4 and q.shape[2:] == (1, 1):
            q = q.flatten(1)
        if q.ndim != 2 or q.shape[1] != self.quality_channels:
            raise ValueError(
                f"layer {self.layer!r} expects quality features (B, {self.quality_channels}), got {tuple(q.shape)}"
            )
        rows, images = x.shape[0], q.shape[0]
        if rows == images:
            return q
        if not can_expand(images, rows, self.expand_q):
            raise QualityError(
                f"layer {self.layer!r} got {rows} rows (x {tuple(x.shape)}) but quality features of {images} images "
                f"(q {tuple(q.shape)}). If every image stands for {max(rows // max(images, 1), 1)} rows, say in which "
                "order: expand_q='interleave' (rows of one image together) or 'tile' (the batch repeated)"
            )
        return expand_rows(q, rows, self.expand_q)

    def extra_repr(self) -> str:
        """Return the base class's text with Q, the hidden width and the norm."""
        return f"{super().extra_repr()}, Q={self.quality_channels}, r={self.reduction}, norm={self.norm!r}"


class QualityDriven(DrivenActivation):
    """A driven activation whose every parameter comes from the driver; a subclass gives name, equation and neutral."""

    numbers = 1
    needs_quality = True
