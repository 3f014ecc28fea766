"""Train a network with quality-adaptive activations on a folder of class folders, half of the pictures degraded.

    python examples/train.py --data DIR --model resnet18_qacon --epochs 30    # DIR/CLASS/*.png
    python examples/train.py                                                 # crops of scikit-image's photographs

Degradations are drawn anew in each epoch, at severities 1 to 5. Writes OUT/model.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torchvision import transforms
from torchvision.datasets import ImageFolder

import quac_plugins  # noqa: F401  (NAME_qacon)
from quac_plugins.degradations import Corrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="test_resnet_qacon")
    parser.add_argument("--corruptions", default="blur,contrast,jpeg_compression,gaussian_noise")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("train-output"))
    args = parser.parse_args()
    data = args.data or args.out / "pictures"
    for name in () if args.data else ("astronaut", "chelsea", "coffee"):
        picture = Image.fromarray(getattr(skimage.data, name)())
        (data / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            picture.crop((10 * i, 5 * i, 10 * i + 220, 5 * i + 220)).save(data / name / f"{i}.png")

    torch.manual_seed(0)
    degrade = Corrupt(args.corruptions, severities=range(1, 6), seed=None)  # drawn anew in each epoch
    steps = [transforms.Resize((args.size, args.size)), transforms.RandomApply([degrade]), transforms.ToTensor()]
    pictures = ImageFolder(data, transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(pictures, batch_size=8, shuffle=True, drop_last=True)
    model = timm.create_model(args.model, num_classes=len(pictures.classes))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3)  # leaves p1 and p2 out of weight decay
    for epoch in range(args.epochs):
        right, losses = 0, []
        for images, labels in loader:
            logits = model((images - mean) / std)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            right += int((logits.argmax(1) == labels).sum())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, right {right} of {8 * len(losses)}")
    save_file(model.state_dict(), args.out / "model.safetensors")  # quac evaluate … --checkpoint


if __name__ == "__main__":
    main()
