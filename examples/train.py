"""Train a network with quality-adaptive activations on a folder of class folders, half of the pictures degraded.

    python examples/train.py --data DIR --model resnet18_qacon --epochs 30    # DIR/CLASS/*.png
    python examples/train.py                                                 # crops of scikit-image's photographs
    python examples/train.py --loop trainer                                  # or lightning

Three loops train the same network on the same pictures: PyTorch's own, the Trainer of transformers, and Lightning.
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
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import quac_plugins  # noqa: F401  (NAME_qacon)
from quac_plugins.degradations import Corrupt

BATCH, RATE = 8, 2e-3


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, "adamw", lr=RATE)  # leaves p1 and p2 out of weight decay


def train_plain(model: nn.Module, pictures: ImageFolder, epochs: int, out: Path) -> list[float]:
    optimizer, losses = optimizer_of(model), []
    for _ in range(epochs):
        for images, labels in DataLoader(pictures, BATCH, shuffle=True, drop_last=True):
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def train_trainer(model: nn.Module, pictures: ImageFolder, epochs: int, out: Path) -> list[float]:
    from transformers import (
        PrinterCallback,
        TimmWrapperConfig,
        TimmWrapperForImageClassification,
        Trainer,
        TrainingArguments,
    )

    name = model.pretrained_cfg["architecture"]
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=model.num_classes))
    wrapper.timm_model = model  # as timm has initialized it, or with its weights
    settings = TrainingArguments(
        str(out / "trainer"), num_train_epochs=epochs, per_device_train_batch_size=BATCH, dataloader_drop_last=True,
        logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        wrapper, settings, train_dataset=pictures, optimizers=(optimizer_of(model), None), data_collator=as_batch
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()  # AutoModelForImageClassification.from_pretrained(OUT/trainer), QuAC inside
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def as_batch(pairs: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*pairs, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def train_lightning(model: nn.Module, pictures: ImageFolder, epochs: int, out: Path) -> list[float]:
    import lightning.pytorch as lightning

    losses = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            images, labels = batch
            loss = cross_entropy(self.model(images), labels)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=out / "lightning", **quiet)
    trainer.fit(Classifier(), DataLoader(pictures, BATCH, shuffle=True, drop_last=True))  # writes a checkpoint
    return losses


LOOPS = {"plain": train_plain, "trainer": train_trainer, "lightning": train_lightning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="test_resnet_qacon")
    parser.add_argument("--loop", choices=list(LOOPS), default="plain")
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
    model = timm.create_model(args.model, num_classes=sum(path.is_dir() for path in data.iterdir()))
    degrade = Corrupt(args.corruptions, severities=range(1, 6), seed=None)  # drawn anew in each epoch
    steps = [transforms.Resize((args.size, args.size)), transforms.RandomApply([degrade]), transforms.ToTensor()]
    steps += [transforms.Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])]
    pictures = ImageFolder(data, transforms.Compose(steps))
    losses = LOOPS[args.loop](model, pictures, args.epochs, args.out)
    each = len(losses) // args.epochs
    for epoch in range(args.epochs):
        print(f"epoch {epoch}: loss {sum(losses[epoch * each : (epoch + 1) * each]) / each:.3f}")
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(pictures, BATCH))
    print(f"right, half of them degraded: {right} of {len(pictures)}")
    save_file(model.state_dict(), args.out / "model.safetensors")  # quac evaluate … --checkpoint


if __name__ == "__main__":
    main()
