"""Quality functions as models of the registry: images in, quality features out."""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from quac_plugins.core.quality.registry import resolve_quality


@MODELS.register_module(name="QuACQuality", force=True)
class Quality(nn.Module):
    """A quality function as a model, ``dict(type="QuACQuality", name="brisque")``.

    Args:
        name: a name of :func:`quac_plugins.quality_names`.

    Raises:
        ValueError: no quality function has the name.

    Example:
        >>> import torch
        >>> Quality("brisque_tone")(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 47])
    """

    def __init__(self, name: str = "brisque"):
        super().__init__()
        self.quality = resolve_quality(name)
        self.out_channels = self.quality.channels

    def forward(self, images: Tensor) -> Tensor:
        """Compute q (B, Q) of images (B, 3, H, W), RGB in [0, 1]."""
        return self.quality(images)


def _named(title: str, name: str) -> None:
    def __init__(self: Any) -> None:
        Quality.__init__(self, name)

    cls = type(
        title, (Quality,), {"__init__": __init__, "__doc__": f"The quality function {name!r}.", "__module__": __name__}
    )
    MODELS.register_module(name=title, module=cls, force=True)
    globals()[title] = cls


for _title, _name in (
    ("BRISQUE", "brisque"),
    ("BRISQUETone", "brisque_tone"),
    ("CONTRIQUE", "contrique"),
    ("Degradation", "degradation"),
):
    _named(_title, _name)
