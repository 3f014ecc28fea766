"""The facts of transformers' vision models, from their ``config``."""

from __future__ import annotations

from typing import Any

from torch import nn

from quac_plugins.core.host.facts import add_reader


@add_reader
def read_facts(model: nn.Module) -> dict[str, Any]:
    """Read the size and the channels of the images of transformers' models."""
    config = getattr(model, "config", None)
    size, chans = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (tuple, list)) else []
    chans = chans if isinstance(chans, int) else None
    known = len(sides) == 2 and all(isinstance(side, int) for side in sides)
    return {"input_size": (chans or 3, *sides) if known else None, "in_chans": chans}
