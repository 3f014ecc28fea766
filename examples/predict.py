"""Ask a pretrained network what is on a picture.

    python examples/predict.py [photo.jpg] [--model dla46_c_qacon.cifar10]

The default network is small, was trained on CIFAR-10, and comes with the package: nothing is downloaded. Any name of
timm does, also those with ``_qacon`` and ``_ddp``. Without a picture it is shown scikit-image's cat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_data_config

import quac_plugins  # noqa: F401  (gives timm the names)

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture_of(path: Path | None) -> Image.Image:
    if path is not None:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    from skimage import data

    return Image.fromarray(data.chelsea())


def names_of(model: torch.nn.Module) -> list[str]:
    if model.num_classes == len(CIFAR10):
        return list(CIFAR10)
    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(model.num_classes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--model", default="dla46_c_qacon.cifar10")
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        probabilities = model(transform(picture_of(args.picture))[None]).softmax(dim=1)[0]
    names = names_of(model)
    for probability, index in zip(*probabilities.topk(3), strict=True):
        print(f"{probability:6.1%}  {names[index]}")


if __name__ == "__main__":
    main()
