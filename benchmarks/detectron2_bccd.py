"""A detector from scratch by detectron2's trainer, with and without Q-ACON, judged on clean and degraded pictures.

    python benchmarks/detectron2_bccd.py --data DIR          # two rows, one seed: half an hour on two CPU cores

DIR holds train/, val/ and {train,val}.json in COCO format; by default QUAC_DATA/bccd. The rows share the config of the
registry, made small (ResNet-18 with batch norm, sides of 160 pixels), the pictures, their order and the steps; half of
the training pictures are degraded. Training goes on from its checkpoint when it was interrupted (--work). AP is COCO's,
on the val pictures, by detectron2's evaluator. Writes benchmarks/results/detectron2_bccd.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from tables import spread, write_tables

import quac_plugins as quac
from quac_plugins.detectron2 import CorruptImage, add_quac_config

RESULTS = Path(__file__).parent / "results/detectron2_bccd"
ROWS = {"host": "build_resnet_fpn_backbone", "qacon": "build_quac_resnet_fpn_backbone"}
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
SIDE = 160


def mapper(cfg: CfgNode, condition: tuple[str, int] | None) -> DatasetMapper:
    """Pictures for training, half of them degraded, or for judging under a corruption and a severity."""
    resize = ResizeShortestEdge(SIDE, 2 * SIDE)
    if condition is None:
        return DatasetMapper(cfg, True, augmentations=[resize, RandomFlip(), CorruptImage(CORRUPTIONS, prob=0.5)])
    name, severity = condition
    degrade = [CorruptImage(name, severity, seed=0)] if severity else []
    return DatasetMapper(cfg, False, augmentations=[resize, *degrade])


class Trainer(DefaultTrainer):
    """detectron2's, over degraded pictures."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """detectron2's own loader."""
        return build_detection_train_loader(cfg, mapper=mapper(cfg, None))


def config(args: argparse.Namespace, row: str, seed: int) -> CfgNode:
    cfg = get_cfg()
    add_quac_config(cfg)
    cfg.merge_from_file(quac.registry_file("detectron2/faster_rcnn_R_50_FPN_qacon.yaml"))
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = ROWS[row], 0
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", args.device
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64, 256
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 200, 100
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200, 100
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(MetadataCatalog.get("bccd_train").thing_classes)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (SIDE,), SIDE
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("bccd_train",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 4, 0.01, args.iterations
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (int(args.iterations * 0.8),), args.iterations // 10
    cfg.SOLVER.CHECKPOINT_PERIOD = 50
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.OUTPUT_DIR, cfg.SEED = str(args.work / f"{row}-{seed}"), seed
    return cfg


def run(args: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """Train one row and judge it; the result is kept in --work."""
    kept = args.work / f"{row}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    cfg = config(args, row, seed)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    with open(f"{cfg.OUTPUT_DIR}/metrics.json", encoding="utf-8") as lines:
        losses = [record["total_loss"] for line in lines if "total_loss" in (record := json.loads(line))]
    found: dict[str, Any] = {"losses": losses, "AP": {}}
    for condition in (("clean", 0), *((name, 3) for name in CORRUPTIONS)):
        loader = build_detection_test_loader(cfg, "bccd_val", mapper=mapper(cfg, condition))
        with contextlib.redirect_stdout(io.StringIO()):
            scores = inference_on_dataset(trainer.model, loader, COCOEvaluator("bccd_val", output_dir=cfg.OUTPUT_DIR))
        found["AP"][condition[0]] = {key: scores["bbox"][key] for key in ("AP", "AP50")}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def markdown(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# A detector from scratch, with and without Q-ACON",
        "",
        f"`python benchmarks/detectron2_bccd.py --iterations {args.iterations}`: Faster R-CNN R18-FPN from scratch, "
        f"sides of {SIDE}, {args.iterations} steps of 4 pictures, half of them degraded; AP50 on the "
        f"{len(DatasetCatalog.get('bccd_val'))} val pictures, degraded at severity 3; seeds {args.seeds}. So few steps "
        "show that it trains, not how good it gets.",
        "",
        "| | loss, first 20 steps | last 20 | clean | " + " | ".join(CORRUPTIONS) + " |",
        "|---|---|---|---|" + "---|" * len(CORRUPTIONS),
    ]
    for row, runs in found.items():
        cells = [spread([run["losses"][0] for run in runs], 3), spread([run["losses"][-1] for run in runs], 3)]
        cells += [spread([run["AP"][name]["AP50"] for run in runs], 1) for name in ("clean", *CORRUPTIONS)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUAC_DATA", "data")) / "bccd")
    parser.add_argument("--work", type=Path, default=Path("bccd-work"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for split in ("train", "val"):
        register_coco_instances(f"bccd_{split}", {}, str(args.data / f"{split}.json"), str(args.data / split))
        DatasetCatalog.get(f"bccd_{split}")  # fills the names of the classes in
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds.split(","):
        for row in args.rows.split(","):
            found.setdefault(row, []).append(run(args, row, int(seed)))
    write_tables(args.out, found, markdown(args, found))
    print(markdown(args, found))


if __name__ == "__main__":
    main()
