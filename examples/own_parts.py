"""A quality function, an activation and a prior's module of one's own, in one network, saved and loaded by their names.

    python examples/own_parts.py [--out own-parts-output]

An adapter names its parts; the module that defines them has to be imported before it is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from torch import Tensor, nn

import quac_plugins as quac


@quac.quality_function("contrast", channels=2)
def contrast(images: Tensor) -> Tensor:
    """Mean and standard deviation of the pixels of images (B, 3, H, W), RGB in [0, 1]: (B, 2)."""
    flat = images.flatten(1)
    return torch.stack((flat.mean(1), flat.std(1, unbiased=False)), dim=1)


class QSoft(quac.QualityDriven):
    """y = x·σ(x) + a·x, with a from the quality driver; a = 0 keeps the host's function."""

    name, neutral = "qsoft", (0.0,)

    @staticmethod
    def equation(x: Tensor, a: Tensor) -> Tensor:
        """X (B, C, H, W) and a number for each channel: the activation's output."""
        return x * x.sigmoid() + a * x


class Tiny(quac.FDM):
    """One 1×1 convolution in, one out."""

    name = "tiny"

    def build(self, channels: int, width: int | None, act: str, quality_channels: int) -> nn.Sequential:
        """Give the network whose last layer is set to zero at first."""
        width = width or 8
        return nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("own-parts-output"))
    args = parser.parse_args()
    torch.manual_seed(0)
    host = timm.create_model("test_resnet", num_classes=10).eval()
    bright = torch.from_numpy(np.ascontiguousarray(skimage.data.chelsea()[:160, :160])).permute(2, 0, 1)[None] / 255
    flat = 0.5 + (bright - 0.5) / 4
    before = host(bright)

    model = quac.inject(host, quac.QuACConfig(activation="qsoft", quality="contrast"))
    quac.inject(model, quac.PriorConfig(fdm="tiny"))
    print(f"the host's answers, kept: {torch.equal(model(bright), before)}")
    for name, picture in (("the picture", bright), ("a flat copy", flat)):
        print(f"q of {name}:", *(f"{number:.2f}" for number in contrast(picture)[0]))
    quac.save_adapter(model, args.out)
    fresh = timm.create_model("test_resnet", num_classes=10).eval()
    fresh.load_state_dict(quac.remove(model).state_dict())
    loaded = quac.load_adapter(fresh, args.out)  # needs this module imported, and no more
    print("put in again:", [type(m).__name__ for m in loaded.modules() if isinstance(m, (QSoft, Tiny))])


if __name__ == "__main__":
    main()
