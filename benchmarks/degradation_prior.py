"""What the degradation prior and distilled Q-ACON give a frozen network, on corruptions of ImageNet-C.

    python benchmarks/degradation_prior.py --data DIR --checkpoint F     # all rows, three seeds; an hour or more
    python benchmarks/degradation_prior.py --seeds 0 --rows host,prior-each --severities 3

DIR holds class folders (synsets); by default QUAC_DATA/imagenet_sample, and F lies in QUAC_DATA/weights. The
photographs are split once: those that are fitted on are never judged. Each unit of work (a fit and its counts) is a
file in --work, so the script goes on where it was interrupted, also with more seeds. The table is written to
benchmarks/results/degradation_prior.{json,md} after every unit; what an earlier table holds of the same recipes and
photographs stays in it and is not done again.

Rows
    host            the untouched network
    restored        the same behind a restorer that knows nothing of it: total variation denoising of scikit-image
    prior-each      one FDM for each corruption, 10 images; all options and settings are the defaults
    prior-all       one FDM for all corruptions, 100 images
    qacon-fdm-all   the same, its activations Q-ACON
    routed          the routed prior, 100 images
    qacon-10        Q-ACON by distillation, 10 images
    qacon-100       Q-ACON by distillation, 100 images
    both            the routed prior and Q-ACON, 100 images
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import spread, write_tables

RESULTS = Path(__file__).parent / "results"
ROWS = (
    "host",
    "restored",
    "prior-each",
    "prior-all",
    "qacon-fdm-all",
    "routed",
    "qacon-10",
    "qacon-100",
    "both",
)
TITLES = {
    "host": "host",
    "restored": "total variation denoising in front of the host",
    "prior-each": "host + FDM of the default width, one per corruption, 10 images",
    "prior-all": "host + one FDM for all, 100 images",
    "qacon-fdm-all": "host + one Q-ACON FDM for all, 100 images",
    "routed": "host + routed prior, 100 images",
    "qacon-10": "host + Q-ACON by distillation, 10 images",
    "qacon-100": "host + Q-ACON by distillation, 100 images",
    "both": "routed prior + Q-ACON, 100 images",
}
UNFITTED = ("host", "restored")  # nothing is drawn: one run
QUALITY = "brisque_tone"  # the gate of the rows that were measured learned from the photographs of the fit
FIT_POOL = 130  # photographs that may be fitted on; the rest judge


def build(args: argparse.Namespace) -> Any:
    import timm

    overlay = {
        "file": str(args.checkpoint),
        "source": None,
        "custom_load": False,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    kwargs = {"pad_type": "same"} if args.model == "mobilenetv2_100" else {}
    return timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).float().eval()


def photographs(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Items to fit on and to judge, disjoint, the same in every run."""
    from quac_plugins.evaluate.data import CLEAN, ImageDirectory

    items = ImageDirectory(args.data, num_classes=1000).conditions[CLEAN]
    order = np.random.default_rng(0).permutation(len(items))
    fit = [items[i] for i in order[:FIT_POOL]]
    judge = [items[i] for i in sorted(order[FIT_POOL:])][: args.judge]
    return fit, judge


def chosen(fit: list[Any], count: int, seed: int) -> list[str]:
    """The images of one fit: other ones for every seed."""
    order = np.random.default_rng([1, seed]).permutation(len(fit))
    return [str(fit[i].path) for i in order[:count]]


# -- pictures that judge: made once


def judged(args: argparse.Namespace, condition: tuple[str, int]) -> Any:
    return np.load(args.work / f"judge-{condition[0]}-{condition[1]}.npy", mmap_mode="r")


def make_judged(job: tuple[argparse.Namespace, tuple[str, int]]) -> None:
    args, (name, severity) = job
    path = args.work / f"judge-{name}-{severity}.npy"
    if path.exists():
        return
    import torch

    from quac_plugins.degradations import corrupt, image_seed
    from quac_plugins.evaluate.preprocessing import Crop, data_config
    from quac_plugins.images import read_image

    torch.set_num_threads(1)
    crop = Crop(data_config(build(args)), keep_ready=True)
    pictures = []
    for item in photographs(args)[1]:
        pixels = np.ascontiguousarray(crop(read_image(item.path)).permute(1, 2, 0).numpy())
        if severity:
            pixels = corrupt(pixels, name, severity, image_seed(0, name, severity, item.key))
        pictures.append(pixels)
    beside = path.with_suffix(".tmp.npy")
    np.save(beside, np.stack(pictures))
    os.replace(beside, path)


def count(args: argparse.Namespace, model: Any, conditions: list[tuple[str, int]]) -> dict[str, float]:
    """Top-1 in percent under each condition."""
    import torch

    from quac_plugins.evaluate.preprocessing import data_config

    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    targets = torch.tensor([item.target for item in photographs(args)[1]])
    scores = {}
    for condition in conditions:
        pictures, right = judged(args, condition), 0
        for start in range(0, len(pictures), 16):
            images = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 16])).permute(0, 3, 1, 2).float()
            with torch.inference_mode():
                logits = model((images / 255 - mean) / std)
            right += int((logits.argmax(1) == targets[start : start + 16]).sum())
        scores[f"{condition[0]}/{condition[1]}"] = 100 * right / len(pictures)
    return scores


# -- units of work


def unit(job: tuple[argparse.Namespace, str, int, str]) -> None:
    args, row, seed, corruption = job
    path = args.work / f"unit-{row}-{seed}{'-' + corruption if corruption else ''}.json"
    if path.exists():
        return
    import torch

    import quac_plugins as quac
    from quac_plugins.degradations import CORRUPTIONS
    from quac_plugins.fit import fit_prior, fit_qacon

    torch.set_num_threads(args.threads)
    torch.manual_seed(seed)
    model, fit = build(args), photographs(args)[0]
    every = [("clean", 0)] + [(name, severity) for severity in args.severities for name in CORRUPTIONS]
    conditions = every if not corruption else [c for c in every if c[0] in ("clean", corruption)]
    options: dict[str, Any] = {"severities": args.fit_severities, "seed": seed, "progress": False}
    reports = []
    started = time.perf_counter()
    if row in EACH:
        quac.inject(model, quac.PriorConfig(**EACH[row]["config"]))
        reports.append(fit_prior(model, chosen(fit, 10, seed), corruptions=corruption, **EACH[row]["fit"], **options))
    elif row == "restored":
        model = quac.restore_then(model, total_variation, restorer_input="np")
    elif row in ("prior-all", "qacon-fdm-all"):
        act = {"fdm_act": "qacon"} if row == "qacon-fdm-all" else {}
        quac.inject(model, quac.PriorConfig(**{**ALL["config"], **act}, quality=QUALITY))
        reports.append(fit_prior(model, chosen(fit, 100, seed), corruptions="all", **ALL["fit"], **options))
    elif row == "routed":
        quac.inject(model, quac.PriorConfig(**ROUTED["config"], experts=list(CORRUPTIONS), quality=QUALITY))
        reports.append(fit_prior(model, chosen(fit, 100, seed), corruptions="all", **ROUTED["fit"], **options))
        quac.save_adapter(model, args.work / f"routed-{seed}")
    elif row in ("qacon-10", "qacon-100"):
        quac.inject(model, quac.QuACConfig(**QACON["config"]))
        images = chosen(fit, int(row[6:]), seed)
        reports.append(fit_qacon(model, images, corruptions="all", **QACON["fit"], **options))
    elif row == "both":
        quac.load_adapter(model, args.work / f"routed-{seed}")
        quac.inject(model, quac.QuACConfig(**QACON["config"]))
        reports.append(fit_qacon(model, chosen(fit, 100, seed), corruptions="all", **QACON["fit"], **options))
    seconds = time.perf_counter() - started
    result = {"scores": count(args, model, conditions), "seconds": seconds, "reports": [r.to_dict() for r in reports]}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result))
    os.replace(beside, path)
    kept = {k: v for k, v in result["scores"].items() if not corruption or k.startswith(corruption)}
    mean = statistics.mean(v for k, v in kept.items() if not k.startswith("clean"))
    print(f"{row} seed {seed} {corruption}: mean {mean:.1f}, {seconds:.0f} s", file=sys.stderr, flush=True)


def total_variation(images: Any) -> Any:
    """Denoise (B, H, W, 3) float images in [0, 1]."""
    from skimage.restoration import denoise_tv_chambolle

    options = {"weight": 0.1, "max_num_iter": 12, "channel_axis": -1}
    return np.stack([denoise_tv_chambolle(image, **options) for image in images]).astype(np.float32)


def units(args: argparse.Namespace) -> list[list[tuple[argparse.Namespace, str, int, str]]]:
    """Batches of units that may run side by side; later batches need earlier ones."""
    from quac_plugins.degradations import CORRUPTIONS

    known = {row: {run["seed"] for run in runs} for row, runs in earlier(args).items()}
    batches = []
    for seed in args.seeds:
        rows = [row for row in args.rows if seed not in known.get(row, ())]
        if "both" in rows and "routed" not in rows and not (args.work / f"routed-{seed}").is_dir():
            rows.append("routed")  # its adapter is what goes under
        whole = [(args, row, seed, "") for row in rows if row not in (*EACH, "both", *UNFITTED)]
        each = [(args, row, seed, name) for row in rows if row in EACH for name in CORRUPTIONS]
        longest_first = sorted(whole, key=lambda job: job[1] != "routed")
        batches.append(longest_first[:1] + each + longest_first[1:])
        batches.append([(args, "both", seed, "")] if "both" in rows else [])
    return [[(args, row, 0, "") for row in UNFITTED if row in args.rows], *batches]


# -- the table


def recipe_of(row: str) -> Any:
    """What a row's numbers depend on, as the table's file holds it."""
    recipes = {
        **EACH,
        "host": {},
        "restored": {},
        "prior-all": ALL,
        "qacon-fdm-all": ALL,
        "routed": ROUTED,
        "both": [ROUTED, QACON],
    }
    return json.loads(json.dumps(recipes.get(row, QACON)))


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """Row → runs of the table that is there, as far as they are of the same photographs and recipes."""
    path = args.out.with_suffix(".json")
    table = json.loads(path.read_text()) if path.is_file() else {}
    now = {"model": args.model, "judged": len(photographs(args)[1]), "fit_severities": args.fit_severities}
    if any(table.get(key) != value for key, value in now.items()):
        return {}
    same = {row: runs for row, runs in table["rows"].items() if table["recipes"].get(row) == recipe_of(row)}
    wanted = [f"fog/{severity}" for severity in args.severities]
    return {row: [run for run in runs if all(key in run["scores"] for key in wanted)] for row, runs in same.items()}


def collect(args: argparse.Namespace) -> dict[str, Any]:
    from quac_plugins.degradations import CORRUPTIONS

    rows: dict[str, Any] = {}
    known = earlier(args)
    for row in ROWS:
        by_seed = []
        for seed in range(1 + max(args.seeds)) if row not in UNFITTED else [0]:
            scores: dict[str, float] = {}
            seconds, adds, parameters = [], None, None
            names = CORRUPTIONS if row in EACH else ("",)
            paths = [args.work / f"unit-{row}-{seed}{'-' + n if n else ''}.json" for n in names]
            if not all(path.exists() for path in paths):
                by_seed += [run for run in known.get(row, ()) if run["seed"] == seed]
                continue
            for name, path in zip(names, paths, strict=True):
                found = json.loads(path.read_text())
                clean = found["scores"].pop("clean/0")
                scores[f"clean/{name}" if name else "clean"] = clean
                scores |= found["scores"]
                seconds.append(found["seconds"])
                for report in found["reports"]:
                    adds, parameters = report["multiply_adds"], report["parameters"]
            by_seed.append(
                {"seed": seed, "scores": scores, "seconds": seconds, "multiply_adds": adds, "parameters": parameters}
            )
        if by_seed:
            rows[row] = by_seed
    import timm
    import torch

    return {
        "command": "python benchmarks/degradation_prior.py",
        "model": args.model,
        "judged": len(photographs(args)[1]),
        "fit_severities": args.fit_severities,
        "recipes": {row: recipe_of(row) for row in rows},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "machine": f"{os.cpu_count()} CPU cores, {args.jobs} processes of {args.threads} threads",
        "rows": rows,
    }


def markdown(table: dict[str, Any], severities: list[int]) -> str:
    from quac_plugins.degradations import CORRUPTIONS

    rows = table["rows"]
    lines = [
        "# The degradation prior and distilled Q-ACON",
        "",
        f"`{table['command']}`: {table['model']}, {table['judged']} photographs judged, others fitted on without "
        f"labels; fitted at severity {', '.join(map(str, table['fit_severities']))}; {table['machine']}; "
        + ", ".join(f"{k} {v}" for k, v in table["versions"].items())
        + ". Top-1 in percent, mean ± standard deviation over seeds (other images fitted on, draws, initial weights).",
        "",
        "| | seeds | clean | "
        + " | ".join(f"mean of 15, severity {s}" for s in severities)
        + " | multiply-adds | fit |",
        "|---|---|---|" + "---|" * (len(severities) + 2),
    ]
    for row, runs in rows.items():
        clean = [r["scores"]["clean"] for r in runs] if "clean" in runs[0]["scores"] else None
        means = [
            spread([statistics.mean(r["scores"][f"{c}/{s}"] for c in CORRUPTIONS) for r in runs]) for s in severities
        ]
        adds = runs[0]["multiply_adds"]
        fit = "" if row in UNFITTED else f"{statistics.mean(t for r in runs for t in r['seconds']):.0f} s"
        lines.append(
            f"| {TITLES[row]} | {'' if row in UNFITTED else len(runs)} | {spread(clean) if clean else 'one each'} | "
            + " | ".join(means)
            + f" | {'' if adds is None else f'+{adds:.1%}'} | {fit} |"
        )
    for severity in severities:
        lines += ["", f"## Severity {severity}", "", "| corruption | " + " | ".join(rows) + " |"]
        lines.append("|---|" + "---|" * len(rows))
        for name in CORRUPTIONS:
            cells = [spread([r["scores"][f"{name}/{severity}"] for r in runs]) for runs in rows.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("QUAC_DATA", "data"))
    parser.add_argument("--data", type=Path, default=root / "imagenet_sample")
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--checkpoint", type=Path, default=root / "weights/mobilenetv2_100.tf2_in1k.safetensors")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--severities", default="3,5", help="judged")
    parser.add_argument("--fit-severities", default="3", help="fitted on")
    parser.add_argument("--judge", type=int, default=None, help="at most so many photographs judge")
    parser.add_argument("--work", type=Path, default=Path("degradation-prior-work"), help="units of work are kept here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--out", type=Path, default=RESULTS / "degradation_prior")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    for name in ("seeds", "severities", "fit_severities"):
        setattr(args, name, [int(part) for part in getattr(args, name).split(",")])
    args.work.mkdir(parents=True, exist_ok=True)
    from quac_plugins.degradations import CORRUPTIONS

    conditions = [("clean", 0)] + [(c, s) for s in args.severities for c in CORRUPTIONS]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(make_judged, [(args, condition) for condition in conditions], chunksize=1)
        for batch in units(args):
            for _ in pool.imap_unordered(unit, batch, chunksize=1):
                table = collect(args)
                write_tables(args.out, table, markdown(table, args.severities))
    print(args.out.with_suffix(".md").read_text())


# What each row puts in and how it is fitted; chosen on photographs of the fit's side
_WIDE = {"site": "stages", "fdm": "light", "fdm_width": 48}
EACH: dict[str, dict[str, Any]] = {
    "prior-each": {"config": {}, "fit": {}},
}
ALL: dict[str, Any] = {"config": _WIDE, "fit": {"steps": 400, "near": 0.3, "views": 2}}
ROUTED: dict[str, Any] = {"config": _WIDE, "fit": {"steps": 240, "near": 0.5, "views": 2}}
QACON: dict[str, Any] = {"config": {"quality": "brisque_tone"}, "fit": {"steps": 300, "lr": 2e-4}}


if __name__ == "__main__":
    main()
