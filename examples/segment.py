"""Train a segmentation network with quality-adaptive activations, half of the pictures degraded, and judge it.

    python examples/segment.py                                   # coins of scikit-image; smp.Unet on timm's network
    python examples/segment.py --network fcn                     # torchvision's; or fpn, detectron2's semantic FPN
    python examples/segment.py --images DIR --masks DIR --classes 11 --encoder resnet18_qacon --steps 2000

DIR of --masks holds a PNG with a class number a pixel for each picture, of the same name; 255 is nothing. The coins are
learned in the upper part of the photograph and judged in the lower. Writes OUT/segmented.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from PIL import Image
from skimage.filters import sobel
from skimage.segmentation import watershed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import quac_plugins as quac
from quac_plugins.degradations import Corrupt, corrupt

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pair = tuple[np.ndarray, np.ndarray]


def unet(encoder: str, classes: int) -> nn.Module:
    """Of segmentation_models_pytorch."""
    import segmentation_models_pytorch as smp

    return smp.Unet(f"tu-{encoder}", encoder_weights=None, classes=classes)  # tu-: a name of timm, ours among them


class Stage(nn.Module):
    """A network of timm as torchvision's FCN takes its backbone."""

    def __init__(self, encoder: str):
        super().__init__()
        self.features = timm.create_model(encoder, features_only=True)
        self.channels = self.features.feature_info.channels()[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of stride 8, under the name that FCN asks for."""
        return {"out": self.features(images)[2]}


def fcn(encoder: str, classes: int) -> nn.Module:
    """Of torchvision."""
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    stage = Stage(encoder)
    return FCN(stage, FCNHead(stage.channels, classes))


class SemanticFPN(nn.Module):
    """Of detectron2, by the config of the registry; small, and trained here and not by DefaultTrainer."""

    def __init__(self, encoder: str, classes: int):
        super().__init__()
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model

        from quac_plugins.detectron2 import add_quac_config

        cfg = get_cfg()
        add_quac_config(cfg)
        cfg.merge_from_file(quac.registry_file("detectron2/semantic_R_50_FPN_qacon.yaml"))
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.BACKBONE.FREEZE_AT = 18, 64, 0
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.DEVICE = "BN", classes, "cpu"
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = ([255 * v for v in values[::-1]] for values in (MEAN, STD))  # BGR
        self.inner = build_model(cfg)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W), RGB: logits (B, classes, H, W)."""
        head = self.inner.sem_seg_head
        return nn.functional.interpolate(head.layers(self.inner.backbone(images.flip(1))), scale_factor=4.0)


NETWORKS: dict[str, Callable[[str, int], nn.Module]] = {"unet": unet, "fcn": fcn, "fpn": SemanticFPN}


def coins() -> tuple[list[Pair], list[Pair]]:
    """Crops of a photograph of coins with what is coin, by scikit-image's watershed of its edges."""
    picture = skimage.data.coins()
    seeds = np.select([picture < 30, picture > 150], [1, 2])
    mask = (watershed(sobel(picture), seeds) - 1).astype(np.uint8)
    crops = [
        (np.stack([picture[y : y + 96, x : x + 96]] * 3, axis=-1), mask[y : y + 96, x : x + 96], y)
        for y in (0, 40, 80, 207)
        for x in range(0, 280, 40)
    ]
    return [(p, m) for p, m, y in crops if y <= 80], [(p, m) for p, m, y in crops if y > 80]


def batch_of(pictures: list[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    output = network(images)
    return output["out"] if isinstance(output, dict) else output  # torchvision's networks give their answers a name


def train(network: nn.Module, pairs: list[Pair], steps: int, batch: int, corruptions: str) -> None:
    random, degrade = np.random.default_rng(0), Corrupt(corruptions, severities=range(1, 6), seed=None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)  # which would pull p1 and p2 to 0
    for _ in range(steps):
        chosen = [pairs[i] for i in random.integers(len(pairs), size=batch)]
        images = batch_of([degrade(picture) if random.random() < 0.5 else picture for picture, _ in chosen])
        masks = torch.from_numpy(np.stack([mask for _, mask in chosen])).long()
        loss = cross_entropy(logits_of(network, images), masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mean_iou(network: nn.Module, pairs: list[Pair], condition: str | None) -> tuple[float, np.ndarray]:
    """Mean over the classes, in %, and the first picture, as it was judged, beside what was found in it."""
    pictures = [p if condition is None else corrupt(p, condition, 3, seed=i) for i, (p, _) in enumerate(pairs)]
    with torch.no_grad():
        predicted = np.concatenate([logits_of(network, batch_of([p])).argmax(1).numpy() for p in pictures])
    masks = np.stack([mask for _, mask in pairs])
    predicted[masks == 255] = 255
    classes = [c for c in np.unique(masks) if c != 255]
    ious = [((predicted == c) & (masks == c)).sum() / ((predicted == c) | (masks == c)).sum() for c in classes]
    shown = np.stack([predicted[0] * (255 // max(1, max(classes)))] * 3, axis=-1).astype(np.uint8)
    return 100 * float(np.mean(ious)), np.vstack([pictures[0], shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument("--encoder", default="test_resnet_qacon", help="of unet and fcn: a name of timm")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--corruptions", default="contrast,fog,gaussian_noise")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("segment-output"))
    args = parser.parse_args()
    if args.images:
        paths = sorted(args.images.iterdir())
        pairs = [
            (np.asarray(Image.open(p).convert("RGB")), np.asarray(Image.open(args.masks / f"{p.stem}.png")))
            for p in paths
        ]
        learned, judged = pairs[: -len(pairs) // 4], pairs[-len(pairs) // 4 :]
    else:
        learned, judged = coins()
    torch.manual_seed(0)
    network = NETWORKS[args.network](args.encoder, args.classes)
    train(network.train(), learned, args.steps, args.batch, args.corruptions)
    shown = []
    for condition in (None, *args.corruptions.split(",")):
        iou, picture = mean_iou(network.eval(), judged, condition)
        shown.append(picture)
        print(f"{args.network}, {condition or 'clean'}: mean IoU {iou:.1f} %")
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack(shown)).save(args.out / "segmented.png")


if __name__ == "__main__":
    main()
