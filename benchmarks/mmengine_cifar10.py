"""A classifier from scratch by MMEngine's Runner, with and without Q-ACON, judged under every corruption.

    python benchmarks/mmengine_cifar10.py --data DIR        # two rows, one seed

DIR holds train.npz and val.npz; by default QUAC_DATA/cifar10. The rows share the config (mmpretrain's ResNet-18 for
CIFAR), the pictures, their order and the steps; half of the training pictures are degraded. Training goes on from its
checkpoint when it was interrupted (--work). Writes benchmarks/results/mmengine_cifar10.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint
from tables import spread, write_tables

import quac_plugins.mmengine  # noqa: F401
from quac_plugins.evaluate.npz import unpack

RESULTS = Path(__file__).parent / "results/mmengine_cifar10"
HOST = {"type": "ResNet_CIFAR", "depth": 18, "num_stages": 4, "out_indices": (3,), "base_channels": 16}
ROWS = {
    "host": HOST,
    "qacon": {"type": "QuACBackbone", "backbone": HOST, "quac": {"where": "spatial", "quality": "brisque_tone"}},
}
CORRUPTIONS = ["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression"]


class Losses(Hook):
    """Keeps every step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """After one step."""
        self.values.append(float(outputs["loss"].detach()))


def config(args: argparse.Namespace, row: str, seed: int) -> Config:
    head = {"type": "LinearClsHead", "num_classes": 10, "in_channels": 128, "loss": {"type": "CrossEntropyLoss"}}
    model = {
        "type": "ImageClassifier", "backbone": copy.deepcopy(ROWS[row]), "neck": {"type": "GlobalAveragePooling"},
        "head": head,
        "data_preprocessor": {"mean": [125.3, 123.0, 113.9], "std": [51.6, 50.8, 51.3], "to_rgb": True},
    }  # fmt: skip
    read, keys = {"type": "LoadImageFromFile"}, ("img_path", "corruption", "severity")
    train = [
        read, {"type": "RandomCrop", "crop_size": 32, "padding": 4}, {"type": "RandomFlip", "prob": 0.5},
        {"type": "CorruptImage", "corruptions": CORRUPTIONS, "prob": 0.5}, {"type": "PackInputs"},
    ]  # fmt: skip
    judge = [read, {"type": "CorruptImage"}, {"type": "PackInputs", "meta_keys": keys}]

    def pictures(split: str, pipeline: list[Any]) -> dict[str, Any]:
        return {"type": "CustomDataset", "data_prefix": str(args.work / split), "pipeline": pipeline}

    conditions = {"type": "CorruptedDataset", "corruptions": CORRUPTIONS, "severities": [3]}
    work = args.work / f"{row}-{seed}"
    schedule = {"type": "OneCycleLR", "eta_max": 0.003, "total_steps": args.iterations, "by_epoch": False}
    checkpoint = {"type": "CheckpointHook", "interval": 50, "by_epoch": False, "max_keep_ckpts": 1}
    return Config({
        "default_scope": "mmpretrain", "model": model, "work_dir": str(work),
        "train_dataloader": {
            "batch_size": 64, "num_workers": 0, "dataset": pictures("train", train),
            "sampler": {"type": "InfiniteSampler", "shuffle": True, "seed": seed},
        },
        "test_dataloader": {
            "batch_size": 250, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {**conditions, "dataset": pictures("val", judge)},
        },
        "test_evaluator": {"type": "CorruptionAccuracy"},
        "train_cfg": {"by_epoch": False, "max_iters": args.iterations}, "test_cfg": {},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.003, "weight_decay": 0.05}},
        "param_scheduler": [schedule], "default_hooks": {"checkpoint": checkpoint},
        "randomness": {"seed": seed}, "log_level": "WARNING", "resume": find_latest_checkpoint(work) is not None,
        "experiment_name": f"{row}-{seed}",
    })  # fmt: skip


def run(args: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """Train one row and judge it; the result is kept in --work."""
    kept = args.work / f"{row}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    runner, losses = Runner.from_cfg(config(args, row, seed)), Losses()
    runner.register_hook(losses)
    runner.train()
    found = {"losses": losses.values, "top1": {k.partition("/")[2]: v for k, v in runner.test().items()}}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def markdown(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    columns = ["clean", *(f"{name}/3" for name in CORRUPTIONS), "mean"]
    lines = [
        "# A classifier from scratch by MMEngine, with and without Q-ACON",
        "",
        f"`python benchmarks/mmengine_cifar10.py --iterations {args.iterations}`: a ResNet-18 of width 16, "
        f"{args.iterations} steps of 64 pictures, half of them degraded; top-1 in percent on the 1,500 val pictures; "
        f"seeds {args.seeds}. So few steps show that it trains, not how good it gets.",
        "",
        "| | mean loss, first 20 steps | last 20 | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row, runs in found.items():
        cells = [
            spread([statistics.mean(run["losses"][part]) for run in runs], 3) for part in (slice(20), slice(-20, None))
        ]
        cells += [spread([run["top1"][name] for run in runs], 1) for name in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUAC_DATA", "data")) / "cifar10")
    parser.add_argument("--work", type=Path, default=Path("mmengine-work"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    # mmengine 0.10 reads its own checkpoints by full unpickling, which torch has to be asked for since 2.6
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    for split in ("train", "val"):
        unpack(args.data / f"{split}.npz", args.work / split)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds.split(","):
        for row in args.rows.split(","):
            found.setdefault(row, []).append(run(args, row, int(seed)))
    write_tables(args.out, found, markdown(args, found))
    print(markdown(args, found))


if __name__ == "__main__":
    main()
