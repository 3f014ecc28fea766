"""The features of a network at places inside it: collecting them, and their statistics by channel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.module_names import module_at

LOGITS = "logits"


class Watch:
    """A collector of the features at places of a running network, which can end the run after the last place."""

    def __init__(self, model: nn.Module, places: list[str]):
        self.places = places
        self.features: dict[str, Tensor] = {}
        self.until: str | None = None
        self.gives_logits = not facts_of(model).gives_features
        self._handles = [module_at(model, name).register_forward_hook(self._hook(name)) for name in places]

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if name == self.until:
                self.features[name] = output
                raise _EnoughError
            self.features[name] = output.clone()  # what comes after may work in place

        return keep

    def run(self, model: nn.Module, images: Tensor, until: str | None = None) -> dict[str, Tensor]:
        """Run the network: return place → features, and its output as ``"logits"`` if it is a tensor (B, K)."""
        self.features, self.until = {}, until
        with contextlib.suppress(_EnoughError):
            output = model(images)
            if self.gives_logits and isinstance(output, Tensor) and output.ndim == 2:
                self.features[LOGITS] = output
        self.until = None
        return self.features

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class _EnoughError(Exception):
    """The run has computed all wanted features."""


class Moments:
    """A running mean and deviation of each channel over many rows."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows (N, C)."""
        rows = rows.double()
        self.count += rows.shape[0]
        self.total = self.total.to(rows) + rows.sum(0)
        self.squares = self.squares.to(rows) + rows.square().sum(0)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, (C,) each, float32."""
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        # channels that hardly vary (dead ones) must not rule the loss
        return mean.float(), std.clamp(min=max(1e-3 * float(std.max()), 1e-12)).float()


def channel_statistics(
    model: nn.Module,
    axes: dict[str, int],
    prefixes: dict[str, int],
    normalize: Callable[[Tensor], Tensor],
    pictures: np.ndarray,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute mean and deviation of each channel of a network's features, place by place.

    Args:
        model: the network, which runs up to the last place.
        axes: place → axis of its channels, in the order of the network's computation.
        prefixes: place → number of leading tokens that do not count.
        normalize: uint8 (B, H, W, 3) → the network's input.
        pictures: (V, H, W, 3) uint8.
        device: the device of the network.
    """
    watch, moments = Watch(model, list(axes)), {name: Moments() for name in axes}
    try:
        for start in range(0, len(pictures), 8):
            images = normalize(torch.from_numpy(np.ascontiguousarray(pictures[start : start + 8])).to(device))
            with torch.no_grad():
                for name, value in watch.run(model, images, watch.places[-1]).items():
                    value = value[:, prefixes[name] :] if prefixes[name] else value
                    moments[name].add(by_channel(value, axes[name]))
    finally:
        watch.close()
    return {name: moment.mean_and_std() for name, moment in moments.items()}


def by_channel(value: Tensor, channel_dim: int) -> Tensor:
    """Reshape features of any layout to (rows, C)."""
    return value.movedim(channel_dim, -1).reshape(-1, value.shape[channel_dim])
