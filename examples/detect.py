"""Make a trained detector robust by margins on its frozen backbone, fitted on pictures without boxes; or by Q-ACON.

    python examples/detect.py                                    # coins of scikit-image, torchvision's FCOS on timm
    python examples/detect.py --way qacon                        # trained with Q-ACON and degraded copies instead
    python examples/detect.py --framework detectron2             # Faster R-CNN, by the config of the registry
    QUAC_DATA=DIR python examples/detect.py --data bccd          # DIR/bccd/{train,val}.json and pictures, as COCO

The detector is trained here first, since no weights of a detector come with the package; with your own leave that out.
Prints AP50 on clean and on degraded pictures. Writes OUT/detected.png, and the adapter to OUT/adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import label
from skimage.filters import sobel
from skimage.measure import regionprops
from skimage.segmentation import watershed
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.utils import draw_bounding_boxes

import quac_plugins as quac
from quac_plugins.degradations import Corrupt, corrupt

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pictures = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Each of RGB (H, W, 3), boxes (N, 4) as x, y, x, y, and classes (N,) from 0."""


class Pyramid(nn.Module):
    """A network of timm with a feature pyramid, as torchvision's detectors take their backbone."""

    out_channels = 64

    def __init__(self, name: str):
        super().__init__()
        self.features = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.features.feature_info.channels(), self.out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Features of three strides."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.features(images))))


class Torchvision:
    """FCOS of torchvision on a backbone of timm."""

    def __init__(self, classes: int, way: str):
        backbone = Pyramid("test_resnet_qacon" if way == "qacon" else "test_resnet")
        anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
        sides = {"min_size": 128, "max_size": 256, "image_mean": MEAN, "image_std": STD}
        self.detector = FCOS(backbone, classes, anchor_generator=anchors, **sides)

    def loss(self, pictures: Pictures) -> Tensor:
        targets = [{"boxes": torch.from_numpy(b).float(), "labels": torch.from_numpy(c)} for _, b, c in pictures]
        return sum(self.detector([pixels_of(p) for p, _, _ in pictures], targets).values())

    def find(self, picture: np.ndarray) -> dict[str, Tensor]:
        return self.detector([pixels_of(picture)])[0]

    def with_prior(self, kinds: list[str]) -> nn.Module:
        config = quac.PriorConfig(fdm="margin", experts=kinds, mean=MEAN, std=STD)
        return quac.inject(self.detector.backbone, config, example=torch.empty(1, 3, 128, 128))


class Detectron2:
    """A small Faster R-CNN with a feature pyramid, by the config of the registry."""

    def __init__(self, classes: int, way: str):
        from detectron2.config import get_cfg

        from quac_plugins.detectron2 import add_quac_config

        cfg = get_cfg()
        add_quac_config(cfg)
        cfg.merge_from_file(quac.registry_file("detectron2/faster_rcnn_R_50_FPN_qacon.yaml"))
        cfg.MODEL.QUAC.ENABLED = way == "qacon"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
        cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = 0, "", "cpu"
        cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64, 256
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
        cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 200, 100
        cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200, 100
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = classes, 64
        self.cfg, self.detector = cfg, self.build(cfg)

    def build(self, cfg: Any) -> nn.Module:
        from detectron2.modeling import build_model

        return build_model(cfg)

    def loss(self, pictures: Pictures) -> Tensor:
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        inputs = []
        for picture, boxes, classes in pictures:
            instances = Instances(picture.shape[:2])
            instances.gt_boxes, instances.gt_classes = Boxes(torch.from_numpy(boxes)), torch.from_numpy(classes)
            inputs.append({"image": 255 * pixels_of(picture).flip(0), "instances": instances})  # BGR
        with EventStorage():
            return sum(self.detector(inputs).values())

    def find(self, picture: np.ndarray) -> dict[str, Tensor]:
        instances = self.detector([{"image": 255 * pixels_of(picture).flip(0)}])[0]["instances"]
        return {"boxes": instances.pred_boxes.tensor, "scores": instances.scores, "labels": instances.pred_classes}

    def with_prior(self, kinds: list[str]) -> nn.Module:
        prior = self.cfg.MODEL.QUAC.PRIOR
        prior.ENABLED, prior.FDM, prior.EXPERTS = True, "margin", kinds
        trained = self.detector.state_dict()
        self.detector = self.build(self.cfg).eval()
        self.detector.load_state_dict(trained, strict=False)
        return self.detector.backbone


FRAMEWORKS = {"torchvision": Torchvision, "detectron2": Detectron2}


def pixels_of(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255


def coins() -> tuple[Pictures, Pictures]:
    """Crops of the upper and of the lower part of a photograph of coins, with the boxes of the coins in them."""
    picture = skimage.data.coins()
    regions = label(watershed(sobel(picture), np.select([picture < 30, picture > 150], [1, 2])) == 2)[0]
    boxes = np.array([r.bbox for r in regionprops(regions) if r.area > 400])[:, [1, 0, 3, 2]].astype(np.float32)

    def crop(x: int, y: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inside = np.clip(boxes - [x, y, x, y], 0, 128).astype(np.float32)
        area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
        whole = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        inside = inside[area > 0.5 * whole]  # a coin of which less is seen is none
        pixels = np.stack([picture[y : y + 128, x : x + 128]] * 3, axis=-1)
        return pixels, inside, np.zeros(len(inside), dtype=np.int64)

    return [crop(x, y) for y in (0, 20, 40) for x in range(0, 257, 32)], [crop(x, 175) for x in range(0, 257, 32)]


def coco(folder: Path, split: str) -> Pictures:
    told = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    kinds = {kind["id"]: place for place, kind in enumerate(told["categories"])}
    pictures = []
    for image in told["images"]:
        mine = [a for a in told["annotations"] if a["image_id"] == image["id"] and min(a["bbox"][2:]) > 0]
        boxes = np.array([a["bbox"] for a in mine], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        pixels = np.asarray(Image.open(folder / split / image["file_name"]).convert("RGB"))
        pictures.append((pixels, boxes, np.array([kinds[a["category_id"]] for a in mine], dtype=np.int64)))
    return pictures


def train(side: Any, pictures: Pictures, steps: int, kinds: list[str], degraded: float) -> None:
    random, degrade = np.random.default_rng(0), Corrupt(kinds, severities=range(1, 6), seed=None)
    optimizer = torch.optim.AdamW(side.detector.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    side.detector.train()
    for _ in range(steps):
        batch = [pictures[i] for i in random.integers(len(pictures), size=4)]
        loss = side.loss([(degrade(p) if random.random() < degraded else p, b, c) for p, b, c in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(side.detector.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    side.detector.eval()


def ap50(boxes_of: list[dict[str, Tensor]], pictures: Pictures) -> float:
    """COCO's, over boxes that overlap by half, in %."""

    def entry(image: int, box: Any, category: Any, **more: Any) -> dict[str, Any]:
        x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
        place = {"bbox": [float(v) for v in (x, y, width, height)], "area": float(width * height), "iscrowd": 0}
        return {"image_id": image, "category_id": int(category), **place, **more}

    wanted = [
        entry(i, *pair) for i, (_, boxes, classes) in enumerate(pictures) for pair in zip(boxes, classes, strict=True)
    ]
    guessed = [
        entry(i, box, category, score=float(score))
        for i, each in enumerate(boxes_of)
        for box, category, score in zip(each["boxes"], each["labels"], each["scores"], strict=True)
    ]
    if not guessed:
        return 0.0
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(pictures))],
        "categories": [{"id": i} for i in {each["category_id"] for each in wanted}],
        "annotations": [{"id": i, **each} for i, each in enumerate(wanted, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its steps
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(guessed), "bbox")
        judged.params.iouThrs = np.array([0.5])
        judged.evaluate()
        judged.accumulate()
    precision = judged.eval["precision"][:, :, :, 0, 2]  # boxes of all sizes, 100 a picture
    return 100 * float(precision[precision > -1].mean())


def judge(side: Any, pictures: Pictures, kinds: list[str]) -> tuple[dict[str, float], np.ndarray]:
    """AP50 by condition, and the first picture under each, with what was found in it."""
    scores, shown = {}, []
    for kind in ("clean", *kinds):
        all_boxes = []
        for index, (picture, _, _) in enumerate(pictures):
            seen = picture if kind == "clean" else corrupt(picture, kind, 3, seed=index)
            with torch.no_grad():
                boxes = side.find(seen)
            all_boxes.append(boxes)
            if index == 0:
                likely = boxes["boxes"][boxes["scores"] > 0.4]
                drawn = draw_bounding_boxes((255 * pixels_of(seen)).byte(), likely, colors="lime", width=2)
                shown.append(drawn.permute(1, 2, 0).numpy())
        scores[kind] = ap50(all_boxes, pictures)
    return scores, np.hstack(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(FRAMEWORKS), default="torchvision")
    parser.add_argument("--way", choices=["margins", "qacon"], default="margins")
    parser.add_argument("--data", help="a folder below QUAC_DATA in COCO format")
    parser.add_argument("--corruptions", default="contrast,fog,gaussian_noise")
    parser.add_argument("--steps", type=int, default=150, help="of the detector's training")
    parser.add_argument("--fit-steps", type=int, default=100, help="of the margins' distillation; 0: statistics alone")
    parser.add_argument("--draws", type=int, default=4, help="degraded copies of each picture of the fit")
    parser.add_argument("--limit", type=int, help="pictures to learn from, and to judge, at most")
    parser.add_argument("--out", type=Path, default=Path("detect-output"))
    args = parser.parse_args()
    kinds = args.corruptions.split(",")
    if args.data:
        folder = Path(os.environ["QUAC_DATA"]) / args.data
        learned, judged = coco(folder, "train"), coco(folder, "val")
    else:
        learned, judged = coins()
    learned, judged = learned[: args.limit], judged[: args.limit]
    torch.manual_seed(0)
    classes = 1 + max(int(c.max(initial=0)) for _, _, c in learned)
    side = FRAMEWORKS[args.framework](classes, args.way)
    train(side, learned, args.steps, kinds, degraded=0.5 if args.way == "qacon" else 0.0)
    before, pictures = judge(side, judged, kinds)
    rows, table = [pictures], {"the detector": before}
    if args.way == "margins":
        backbone = side.with_prior(kinds)
        photographs = [picture for picture, _, _ in learned]
        options = {"steps": args.fit_steps, "draws": args.draws, "views": 1, "input_size": (128, 128)}
        quac.fit_prior(backbone, photographs, corruptions=kinds, progress=False, **options)
        quac.save_adapter(backbone, args.out / "adapter")
        table["with margins"], pictures = judge(side, judged, kinds)
        rows.append(pictures)
    for name, scores in table.items():
        print(f"AP50, {name}:", ", ".join(f"{kind} {score:.1f}" for kind, score in scores.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(rows)).save(args.out / "detected.png")


if __name__ == "__main__":
    main()
