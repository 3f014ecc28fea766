"""A figure of a restoration: before and after, the difference, q, and the shapes of activations."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quac_plugins.core.activations.base import ChannelActivation
from quac_plugins.core.curves import activation_curves
from quac_plugins.core.inject import injection_of
from quac_plugins.evaluate.plot import require_matplotlib, write_figure

_SHAPES = 3  # activations drawn
_BEFORE, _AFTER = "#b5651d", "#1f6fb4"


def draw_comparison(
    path: str | os.PathLike[str], pipe: Any, degraded: Tensor, restored: Tensor, tile_size: int = 512
) -> None:
    """Draw one image before and after restoration.

    Args:
        path: the file: .png, .jpg, .pdf or .svg.
        pipe: the restoration pipeline, with ``unet`` and ``quality_of``.
        degraded, restored: images (3, H, W), RGB in [0, 1].
        tile_size: the largest side, in pixels, that goes through the network at once.

    Raises:
        ImportError: matplotlib is not installed.
    """
    q = pipe.quality_of(torch.stack([degraded, restored]))
    curves = _curves(pipe, degraded, restored, tile_size) if q is not None else {}
    figure = require_matplotlib()(figsize=(13, 4.6 if q is None else 9.5), layout="constrained")
    grid = figure.add_gridspec(1 if q is None else 3, 6, height_ratios=None if q is None else [1.5, 0.8, 1])
    change = (restored - degraded).abs().mean(dim=0).cpu().numpy()
    shown = ((degraded, "degraded"), (restored, "restored"))
    for place, (image, title) in enumerate(shown):
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        axes.imshow(image.permute(1, 2, 0).cpu().numpy())
        axes.set_title(title)
        axes.axis("off")
    axes = figure.add_subplot(grid[0, 4:])
    drawn = axes.imshow(change * 255, cmap="magma", vmin=0, vmax=max(float(np.percentile(change, 99.5)) * 255, 1))
    axes.set_title("difference, of 255")
    axes.axis("off")
    figure.colorbar(drawn, ax=axes, fraction=0.05)
    if q is not None:
        _quality(figure.add_subplot(grid[1, :]), q.cpu(), injection_of(pipe.unet))
        for place, (name, y) in enumerate(curves.items()):
            _shape(figure.add_subplot(grid[2, 2 * place : 2 * place + 2]), name, y)
    write_figure(figure, path, 110)


_X = torch.linspace(-4, 4, 161)


def _curves(pipe: Any, degraded: Tensor, restored: Tensor, tile_size: int) -> dict[str, Tensor]:
    """Return layer → curves (2, N) of the channel that q moves most, for the q before and after the restoration."""
    sites = [
        name
        for name, module in pipe.unet.named_modules()
        if isinstance(module, ChannelActivation) and module.needs_quality
    ]
    chosen = [sites[round(i * (len(sites) - 1) / (_SHAPES - 1))] for i in range(_SHAPES)] if sites else []
    by_quality = []
    for image in (degraded, restored):  # the same features, another q
        q = pipe.quality_of(image[None])

        def run(q: Any = q) -> None:
            pipe(degraded[None], q=q, output_type="pt", tile_size=tile_size)

        by_quality.append(activation_curves(pipe.unet, list(dict.fromkeys(chosen)), run, _X))
    curves = {}
    for name, before in by_quality[0].items():
        after = by_quality[1][name]
        channel = int((before[0] - after[0]).abs().amax(dim=-1).argmax())
        curves[f"{name}, channel {channel}"] = torch.stack([before[0, channel], after[0, channel]]).cpu()
    return curves


def _quality(axes: Any, q: Tensor, record: Any) -> None:
    scale = q.abs().amax(dim=0).clamp(min=1e-9)
    for index, (label, colour) in enumerate((("degraded", _BEFORE), ("restored", _AFTER))):
        axes.bar(np.arange(q.shape[1]) + 0.4 * index - 0.2, (q[index] / scale).numpy(), 0.4, color=colour, label=label)
    axes.set(
        title=f"quality features ({record.quality.name}), each divided by its largest", xlim=(-0.7, q.shape[1] - 0.3)
    )
    axes.legend(ncol=2, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1))


def _shape(axes: Any, name: str, y: Tensor) -> None:
    for curve, colour, label in zip(y, (_BEFORE, _AFTER), ("q of the degraded", "q of the restored"), strict=True):
        axes.plot(_X.numpy(), curve.numpy(), color=colour, label=label)
    axes.set_title(name, fontsize=9)
    axes.set(xlabel="x", ylabel="y(x)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
