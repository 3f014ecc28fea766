"""A restoration pipeline with Q-ACON, with meta-ACON, and as diffusers has it (SiLU): PSNR and SSIM, three seeds.

    python benchmarks/restoration.py --data DIR                # nine trainings of about twenty minutes of one core
    python benchmarks/restoration.py --data DIR --publish      # and a seed of Q-ACON into hub/ and the registry

DIR holds train/ and val/ with clean photographs; by default QUAC_DATA/bsds. Each training is
``examples/train_restoration.py``, once and then several times from there; runs go on if interrupted.
Judged is the middle 192×192 of every photograph of val/, degraded by each kind that was trained on: with one step at
severities 1, 3 and 5, and with ten at severity 3. Writes benchmarks/results/restoration.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tables import spread, write_tables

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/restoration"
ROWS = {"qacon": "Q-ACON", "meta_acon": "meta-ACON", "silu": "SiLU"}
NAME = "restoration_qacon.bsds"
_EACH = ("--batch-size", 16, "--clean", 0.1, "--degradations")
_EVEN = "haze,rain,low_light=2,noise,blur=3,downscale=2,jpeg=3"  # more of those that change a picture least
# stage → options: those first that need a sharper or smoother picture and nothing else, which wakes the network; then
# all; at last weighed alike, since the gradients of those that change a picture most drown the others'
STAGES = {
    "-first": ("--steps", 200, *_EACH, "blur,downscale,jpeg"),
    "-second": ("--steps", 800, *_EACH, "haze,rain,low_light,noise,blur,downscale,jpeg"),
    "-third": ("--steps", 900, "--patch", 48, *_EACH, _EVEN),
    "": ("--steps", 1200, "--patch", 48, "--lr", 7e-4, "--loss", "psnr", *_EACH, _EVEN),
}
STEPS = sum(int(options[1]) for options in STAGES.values())
OTHERS = {stage: 10 * number for number, stage in enumerate(STAGES)}  # added to the seed: other patches
MOST = 6_000_000  # bytes that an embedded pipeline may have


def train(job: tuple[argparse.Namespace, str, int]) -> dict[str, Any]:
    """The stages of one row and seed; what is there already is not done again."""
    args, row, seed = job
    scores = args.work / f"{row}-{seed}.json"
    previous: list[Any] = []
    for stage, options in STAGES.items():
        out = args.work / f"{row}-{seed}{stage}"
        last = not stage
        if not (scores.exists() if last else (out / "model_index.json").exists()):
            command = [
                sys.executable, ROOT / "examples/train_restoration.py", "--activation", row, "--out", out,
                "--seed", seed + OTHERS[stage], "--data", args.data / "train",
                "--val", args.data / "val", "--store-fp16", *previous, *options,
                "--validate-every", options[1], "--val-limit", 1, *(["--scores", scores] if last else []),
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
            with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
                subprocess.run(list(map(str, command)), check=True, env=environment, stderr=log)
        previous = ["--start", out]
    print(f"{row} seed {seed}: {mean(json.loads(scores.read_text()), 'psnr'):.2f} dB", file=sys.stderr, flush=True)
    return json.loads(scores.read_text(encoding="utf-8"))


def mean(run: dict[str, Any], score: str, steps: str = "1 steps", after: int = 1) -> float:
    """Over the degradations and severities, without the clean picture."""
    return statistics.mean(found[score][after] for name, found in run[steps].items() if name != "clean")


def least(run: dict[str, Any]) -> float:
    """Of what the degradations gain after one step and after ten, in dB over their severities, the smallest."""
    gains: dict[Any, list[float]] = {}
    for steps in ("1 steps", "10 steps"):
        for name, found in run[steps].items():
            if name != "clean":
                before, after = found["psnr"]
                gains.setdefault((steps, name.rpartition("-")[0]), []).append(after - before)
    return min(map(statistics.mean, gains.values()))


def markdown(table: dict[str, Any]) -> str:
    rows = table["rows"]
    first = next(iter(rows.values()))[0]
    lines = [
        "# Restoration by activation",
        "",
        f"`{table['command']}`: the middle 192×192 of {table['judged']} photographs that were not trained on, mean ± "
        f"standard deviation over the seeds {', '.join(map(str, table['seeds']))}; {table['machine']}; "
        + ", ".join(f"{k} {v}" for k, v in table["versions"].items())
        + ". The rows share the network, the pictures, their order and the steps.",
    ]
    for steps, title in (("1 steps", "one step"), ("10 steps", "ten steps")):
        for score, heading, digits in (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3), ("haarpsi", "HaarPSI", 3)):
            lines += [
                "",
                f"## {heading}, {title}",
                "",
                "| | as it came | " + " | ".join(ROWS[row] for row in rows) + " |",
                "|---|---|" + "---|" * len(rows),
            ]
            for name, found in first[steps].items():
                after = (spread([run[steps][name][score][1] for run in runs], digits) for runs in rows.values())
                lines.append(f"| {name} | {found[score][0]:.{digits}f} | " + " | ".join(after) + " |")
            means = (spread([mean(run, score, steps) for run in runs], digits) for runs in rows.values())
            lines.append(f"| mean, degraded | {mean(first, score, steps, 0):.{digits}f} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def publish(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """The pipeline of the seed that mends every degradation best into hub/ with its card, and into the registry."""
    from huggingface_hub import ModelCard, ModelCardData

    from quac_plugins.hub.fetch import PIPELINE_FILES
    from quac_plugins.hub.verify import sha256_of
    from quac_plugins.registry import write_entry

    psnr = [mean(run, "psnr") for run in runs]
    best = max(range(len(runs)), key=lambda index: least(runs[index]))
    source, target = args.work / f"qacon-{args.seeds[best]}", ROOT / "hub" / NAME
    weights = source / PIPELINE_FILES[-1]
    if (size := weights.stat().st_size) > MOST:
        raise SystemExit(f"{weights} has {size} bytes, at most {MOST} are embedded")
    for name in PIPELINE_FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    (target / "metrics.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    data = ModelCardData(
        library_name="diffusers", license="apache-2.0", pipeline_tag="image-to-image",
        tags=["quac-plugins", "q-acon", "image-restoration"],
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(ROOT / "hub/pipeline_card_template.md"), name=NAME, seed=args.seeds[best],
        stages=len(STAGES), steps=f"{STEPS:,}", seeds=len(runs), psnr=f"{psnr[best]:.2f}", rows=runs[best]["1 steps"],
        args=runs[best]["args"],
    )  # fmt: skip
    (target / "README.md").write_text(str(card), encoding="utf-8")
    figures = {
        "psnr_before": mean(runs[0], "psnr", after=0), "psnr": statistics.mean(psnr),
        "psnr_std": statistics.stdev(psnr) if len(psnr) > 1 else None,
    }  # fmt: skip
    entry = {
        "kind": "pipeline", "sha256": sha256_of(weights), "size": size, "license": "apache-2.0",
        "metrics": {key: round(value, 4) for key, value in figures.items() if value is not None},
    }  # fmt: skip
    write_entry(ROOT / "registry/diffusers.toml", NAME, entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUAC_DATA", "data")) / "bsds")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(ROWS), help="activations, comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("restoration-work"), help="checkpoints, pipelines, scores")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--publish", action="store_true", help="write hub/ and registry/diffusers.toml")
    args = parser.parse_args()
    args.seeds, rows = [int(seed) for seed in args.seeds.split(",")], args.rows.split(",")
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = [(args, row, seed) for seed in args.seeds for row in rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(((row, seed) for _, row, seed in jobs), pool.map(train, jobs), strict=True))
    import diffusers
    import torch

    table = {
        "command": "python benchmarks/restoration.py",
        "seeds": args.seeds,
        "judged": len(list((args.data / "val").iterdir())),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        },
        "machine": f"{os.cpu_count()} CPU cores, {args.jobs} processes of {args.threads} threads",
        "rows": {row: [results[row, seed] for seed in args.seeds] for row in rows},
    }  # fmt: skip
    text = markdown(table)
    write_tables(args.out, table, text)
    print(text)
    if args.publish:
        publish(args, table["rows"]["qacon"])


if __name__ == "__main__":
    main()
