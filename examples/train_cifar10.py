"""Train the small published models on CIFAR-10, clean and degraded.

    python examples/train_cifar10.py --data DIR                # four forms, three seeds, benchmarks/results/cifar10.md
    python examples/train_cifar10.py --data DIR --publish      # and the best of each form into hub/ and the registry

DIR holds train.npz and val.npz (jpeg: all bytes, offsets, labels, classes); by default QUAC_DATA/cifar10. A run goes
on after its last whole epoch when it was interrupted (--work), and uses a GPU if there is one. The forms share the
network, the pictures, their order and the number of steps:

    act        the network's own activation, on clean and degraded pictures alike
    meta_acon  the same with meta-ACON, which sees features alone
    qacon      the same with Q-ACON, which sees the image's quality
    ddp        the network's own activation on clean pictures alone, which is judged too; then a degradation prior,
               routed by quality and fitted on a few pictures without labels

Weights are rounded to half precision before they are judged, so that what is published is what was judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

import quac_plugins as quac
from quac_plugins.degradations import CORRUPTIONS, corrupt, image_seed
from quac_plugins.evaluate import EvaluationReport, evaluate
from quac_plugins.evaluate.npz import unpack
from quac_plugins.registry import write_entry

ROOT = Path(__file__).parents[1]
NETWORK, SIDE = "dla46_c", 32
QUAC: dict[str, Any] = {"where": "spatial", "quality": "brisque_tone", "init": "preserve"}
OVERLAY = {
    "mean": (0.491, 0.482, 0.447),
    "std": (0.247, 0.243, 0.262),
    "input_size": (3, SIDE, SIDE),
    "crop_pct": 1.0,
    "num_classes": 10,
    "tag": "cifar10",
}
NAMES = {
    "act": f"{NETWORK}.cifar10",
    "meta_acon": f"{NETWORK}_qacon.cifar10_meta",
    "qacon": f"{NETWORK}_qacon.cifar10",
    "ddp": f"{NETWORK}_ddp.cifar10",
}
PRIOR: dict[str, Any] = {"experts": list(CORRUPTIONS), "fdm_width": 20, "quality": "brisque_tone"}
HOST = "ddp-{}-host.json"  # the report of ddp's network before its prior
SEVERITIES = (1, 3, 5)
COPIES = 2  # degraded copies of every training picture, beside the clean one


def build(form: str) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 10, "pretrained_cfg_overlay": OVERLAY}
    if form in ("act", "ddp"):
        model = timm.create_model(NETWORK, **options)
    else:
        model = timm.create_model(f"{NETWORK}_qacon", activation=form, **options, **QUAC)
    nn.init.normal_(model.get_classifier().weight, std=0.01)  # this network's own gives logits of 5.5 and a loss of 10
    return model


# -- pictures


def pictures(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and class indices of class folders."""
    files = sorted(folder.glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return images, np.array([classes.index(file.parent.name) for file in files])


def degraded(images: np.ndarray, copy: int, kept: Path) -> np.ndarray:
    """Every picture with a corruption and a severity of its own, made once."""
    if not kept.exists():
        rng = np.random.default_rng([7, copy])
        kinds, levels = rng.choice(CORRUPTIONS, len(images)), rng.integers(1, 6, len(images))
        pictures = [
            corrupt(image, kind, int(level), image_seed(copy, kind, int(level), str(index)))
            for index, (image, kind, level) in enumerate(zip(images, kinds, levels, strict=True))
        ]
        np.save(kept.with_suffix(".part.npy"), np.stack(pictures))
        os.replace(kept.with_suffix(".part.npy"), kept)
    return np.load(kept)


class Pictures(Dataset[Any]):
    """Arrays, shifted and mirrored at random; timm's loader sets ``transform``."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.transform: Any = None
        shift = transforms.RandomCrop(SIDE, padding=4, padding_mode="reflect")
        self.augment = transforms.Compose([shift, transforms.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.augment(Image.fromarray(self.images[index]))), int(self.labels[index])


def loader_of(args: argparse.Namespace, form: str) -> Any:
    """timm's loader over the clean pictures and their copies: degraded, or for ``ddp`` clean as often."""
    images, labels = pictures(args.work / "train")
    clean = form == "ddp"
    copies = [images if clean else degraded(images, c, args.work / f"degraded-{c}.npy") for c in range(COPIES)]
    dataset = Pictures(np.concatenate([images, *copies]), np.concatenate([labels] * (1 + COPIES)))
    return create_loader(
        dataset, OVERLAY["input_size"], args.batch_size, is_training=True, no_aug=True, mean=OVERLAY["mean"],
        std=OVERLAY["std"], crop_pct=1.0, num_workers=args.num_workers, use_prefetcher=False,
        persistent_workers=args.num_workers > 0, device=torch.device(args.device),
    )  # fmt: skip


# -- training


def train(args: argparse.Namespace, form: str, seed: int) -> nn.Module:
    """The network after the last epoch; goes on from its checkpoint."""
    random_seed(seed)
    model = build(form).to(args.device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)
    checkpoint, first = args.work / f"{form}-{seed}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        if state["epochs"] != args.epochs:
            raise SystemExit(
                f"{checkpoint} is of {state['epochs']} epochs; give --epochs {state['epochs']} or another --work"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["done"]
    loader = loader_of(args, form)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-5, step_on_epochs=False,
        updates_per_epoch=len(loader),
    )  # fmt: skip
    for epoch in range(first, args.epochs):
        random_seed(1000 * seed + epoch)  # an interrupted run goes on as it would have
        started = time.perf_counter()
        loss = one_epoch(args, model.train(), loader, optimizer, scheduler, epoch * len(loader))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "done": epoch + 1, "epochs": args.epochs}, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
        print(
            f"{form} seed {seed} epoch {epoch}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr
        )
    return model.eval()


def one_epoch(
    args: argparse.Namespace, model: nn.Module, loader: Any, optimizer: Any, scheduler: Any, first: int
) -> float:
    """The mean loss; ``first`` is the number of the first step."""
    total = torch.zeros((), device=args.device)
    for update, (images, target) in enumerate(loader, first):
        scheduler.step_update(update)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(images.to(args.device, memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), target.to(args.device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    mean = float(total) / len(loader)
    if not np.isfinite(mean):
        raise SystemExit("the loss is not finite: take a smaller --lr")
    return mean


def rounded(model: nn.Module) -> nn.Module:
    """The parameters as half precision holds them; the statistics of batch norm stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def halved(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


def run(args: argparse.Namespace, form: str, seed: int) -> EvaluationReport:
    """Train and judge one form from one seed; the report and the model's folder are kept in --work."""
    kept = args.work / f"{form}-{seed}"
    if kept.with_suffix(".json").exists():
        return EvaluationReport.from_json(kept.with_suffix(".json"))
    model = rounded(train(args, form, seed))
    if form == "ddp":
        judge(args, model, HOST.format(seed))
        model = rounded(repaired(args, model, seed))
    report = judge(args, model, kept.with_suffix(".json").name)
    quac.push(halved(model.cpu()), NAMES[form], whole=True, dry_run=kept, overwrite=True)
    return report


def repaired(args: argparse.Namespace, clean: nn.Module, seed: int) -> nn.Module:
    """A network that was trained on clean pictures, with a prior fitted on a few of them without their labels."""
    model = timm.create_model(f"{NETWORK}_ddp", num_classes=10, pretrained_cfg_overlay=OVERLAY, **PRIOR)
    model.load_state_dict(clean.state_dict(), strict=False)
    images, _ = pictures(args.work / "train")
    few = [images[i] for i in np.random.default_rng(seed).permutation(len(images))[: args.few]]
    report = quac.fit_prior(
        model,
        few,
        corruptions="all",
        severities=SEVERITIES,
        steps=args.fit_steps,
        near=0.5,
        least_positions=0,
        seed=seed,
        progress=False,
    )
    report.to_json(args.work / f"ddp-{seed}-fit.json")
    return model


def judge(args: argparse.Namespace, model: nn.Module, name: str) -> EvaluationReport:
    """Clean and under every corruption, kept in --work."""
    if (args.work / name).exists():
        return EvaluationReport.from_json(args.work / name)
    options: dict[str, Any] = {"corruptions": "all", "severities": SEVERITIES, "progress": False, "batch_size": 250}
    report = evaluate(model.eval(), args.work / "val", outcomes=False, **options)
    report.data = "CIFAR-10 val"
    report.to_json(args.work / name)
    return report


# -- what comes out


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(args: argparse.Namespace, runs: dict[str, list[EvaluationReport]]) -> str:
    lines = [
        "# CIFAR-10, clean and degraded",
        "",
        f"`python examples/train_cifar10.py --epochs {args.epochs}`: {NETWORK}, {args.epochs} epochs of "
        f"12,000 pictures {1 + COPIES} times, judged on the 1,500 of the val split; top-1 in percent, mean ± standard "
        f"deviation over the seeds {', '.join(map(str, args.seeds))}; each corruption at the severities "
        f"{', '.join(map(str, SEVERITIES))}.",
        "",
        "| | " + " | ".join(runs) + " |",
        "|---|" + "---|" * len(runs),
        "| published as | " + " | ".join(f"`{NAMES[form]}`" if form in NAMES else "" for form in runs) + " |",
        "| clean | "
        + " | ".join(spread([r.clean["top1"] for r in reports if r.clean]) for reports in runs.values())
        + " |",
        "| mean of the 15 | " + " | ".join(spread([mean_of(r) for r in reports]) for reports in runs.values()) + " |",
    ]
    for name in CORRUPTIONS:
        lines.append(f"| {name} | " + " | ".join(spread([mean_of(r, name) for r in rs]) for rs in runs.values()) + " |")
    return "\n".join(lines) + "\n"


def mean_of(report: EvaluationReport, *names: str) -> float:
    return statistics.mean(s["top1"] for name in names or CORRUPTIONS for s in report.corruptions[name].values())


def publish(args: argparse.Namespace, form: str, reports: list[EvaluationReport]) -> None:
    """The best seed's model into hub/ with its card, and its entry into the registry."""
    name = NAMES[form]
    best = max(range(len(reports)), key=lambda i: reports[i].clean["top1"] + mean_of(reports[i]))  # type: ignore[index]
    kept, fit = args.work / f"{form}-{args.seeds[best]}", args.work / f"{form}-{args.seeds[best]}-fit.json"
    top1 = reports[best].clean["top1"]  # type: ignore[index]
    pushed = quac.push(
        kept, name, metrics=reports, fit=fit if fit.exists() else None, license="apache-2.0",
        description=f"Trained by examples/train_cifar10.py on pictures of CIFAR-10, 32×32. The weights here are those "
        f"of seed {args.seeds[best]}, the best of {len(reports)} on the val split: clean {top1:.2f} %, mean over the "
        f"corruptions {mean_of(reports[best]):.2f} %.",
        dry_run=ROOT / "hub" / name, overwrite=True,
    )  # fmt: skip
    config = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    size, sha256 = pushed.files["model.safetensors"]
    clean = [r.clean["top1"] for r in reports if r.clean]
    metrics = {"top1": statistics.mean(clean), "top1_std": statistics.stdev(clean) if len(clean) > 1 else 0.0}
    entry = {
        "kind": "model", "sha256": sha256, "size": size, "license": "apache-2.0",
        "input": {key: config["pretrained_cfg"][key] for key in ("mean", "std", "input_size", "crop_pct")},
        "model_args": config.get("model_args") or {},
        "metrics": {key: round(value, 4) for key, value in {**metrics, "val_top1": top1}.items()},
    }  # fmt: skip
    entry["input"]["num_classes"] = 10
    write_entry(ROOT / "registry/timm.toml", name, entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUAC_DATA", "data")) / "cifar10")
    parser.add_argument(
        "--work", type=Path, default=Path("cifar10-work"), help="checkpoints and pictures are kept here"
    )
    parser.add_argument("--forms", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--few", type=int, default=100, help="pictures without labels that the prior is fitted on")
    parser.add_argument("--fit-steps", type=int, default=240)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cifar10")
    parser.add_argument("--publish", action="store_true", help="write hub/NAME.TAG and registry/timm.toml")
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    forms = args.forms.split(",")
    if unknown := set(forms) - set(NAMES):
        parser.error(f"unknown forms {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    for split in ("train", "val"):
        unpack(args.data / f"{split}.npz", args.work / split)
    runs: dict[str, list[EvaluationReport]] = {form: [] for form in forms}
    for seed in args.seeds:
        for form in forms:
            runs[form].append(run(args, form, seed))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = dict(runs)
    if "ddp" in forms:  # beside what its network was before
        table.pop("ddp")
        table["clean pictures alone"] = [
            EvaluationReport.from_json(args.work / HOST.format(seed)) for seed in args.seeds
        ]
        table["ddp"] = runs["ddp"]
    results = {column: [report.to_dict() for report in reports] for column, reports in table.items()}
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(args, table), encoding="utf-8")
    print(markdown(args, table))
    for form in forms if args.publish else ():
        publish(args, form, runs[form])


if __name__ == "__main__":
    main()
