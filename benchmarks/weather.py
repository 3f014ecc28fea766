"""What margins give a frozen ImageNet network on bad pictures, beside simpler ways.

    python benchmarks/weather.py --host tf_efficientnet_lite0=F.safetensors --gates DIR --seeds 0,1,2
    python benchmarks/weather.py --host mobilenetv2_100=F.safetensors --rows host,margins --photographs 10
    python benchmarks/weather.py --host tf_efficientnet_lite0=F.safetensors --publish  # what was fitted, into hub/

DIR is the --work folder of examples/train_degradation.py: each photograph is then judged with a gate that has not seen
it. F holds the host's weights (mean = std = 0.5). Each unit of work is a file in --work, so the script goes on where it
was interrupted; the table is written to benchmarks/results/weather.{json,md} after every unit.

Rows
    host          the untouched network
    bn-10, bn-100 batch norms take the statistics of 10 or 100 test pictures of the same condition
    tent          Tent (Wang et al., ICLR 2021): the same, and one step of entropy minimization for each batch of 50 at
                  rate 2.5e-4 on the batch norms' scale and shift, from the host anew for each condition
    single        one margin for all corruptions, no q, a tenth clean pictures
    statistics    margins from statistics alone
    margins       margins, all at the default
    margins+13    margins and the FDMs that a budget of 13 % more multiply-adds pays for; likewise +50 and +100
    shuffled      margins, each picture with the q of another one of its batch of all conditions
Conditions: clean, the 15 corruptions at each severity, and mixtures that no margin was fitted on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import degradation_prior as common
import numpy as np
from tables import spread, write_tables

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"margins+13": 0.13, "margins+50": 0.5, "margins+100": 1.0}
FITTED = ("single", "statistics", "margins", *BUDGETS, "shuffled")
ROWS = ("host", "bn-10", "bn-100", "tent", *FITTED)
MIXTURES = (("fog", "gaussian_noise"), ("defocus_blur", "jpeg_compression"), ("brightness", "gaussian_noise"))
CLEAN = ("clean", 0)


def conditions(args: argparse.Namespace) -> list[tuple[str, int]]:
    from quac_plugins.degradations import CORRUPTIONS

    mixed = [("+".join(pair), 3) for pair in MIXTURES]
    return [CLEAN, *((name, severity) for severity in args.severities for name in CORRUPTIONS), *mixed]


def pictures_of(args: argparse.Namespace, condition: tuple[str, int]) -> np.ndarray:
    """uint8 (N, H, W, 3); a mixture is its first corruption and then its second."""
    from quac_plugins.degradations import corrupt

    name, severity = condition
    if "+" not in name:
        common.make_judged((args, condition))
        return np.load(common_path(args, condition))
    path = common_path(args, condition)
    if not path.exists():
        first, second = name.split("+")
        np.save(
            path,
            np.stack([corrupt(p, second, severity, i) for i, p in enumerate(pictures_of(args, (first, severity)))]),
        )
    return np.load(path)


def common_path(args: argparse.Namespace, condition: tuple[str, int]) -> Path:
    return args.work / f"judge-{condition[0]}-{condition[1]}.npy"


class Gates:
    """The weights of ``degradation`` that have not seen a photograph."""

    def __init__(self, folder: Path | None, items: list[Any]):
        self.folds = np.zeros(len(items), int)
        self.weights: list[dict[str, Any]] = []
        if folder is not None:
            from safetensors.torch import load_file

            told = json.loads((folder / "folds.json").read_text())
            fold = dict(zip(told["names"], told["fold"], strict=True))
            self.folds = np.array([fold["/".join(Path(item.path).parts[-3:])] for item in items])
            for part in range(max(told["fold"]) + 1):
                self.weights.append(load_file(folder / f"fold-{part}.safetensors"))
                self.weights[-1]["fc3.bias"][0] += told["raised"]

    def use(self, part: int) -> None:
        """Let ``degradation`` compute with the gate of a part."""
        from quac_plugins.core.quality import degradation

        if self.weights:
            degradation._WEIGHTS.update(self.weights[part])
            degradation._COPIES.clear()


def logits_of(model: Any, pictures: np.ndarray, config: Any) -> Any:
    import torch

    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    found = []
    for start in range(0, len(pictures), 25):
        images = torch.from_numpy(pictures[start : start + 25]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            found.append(model((images - mean) / std))
    return torch.cat(found)


def on_batches(adapt: Callable[[Any, Any], Any], size: int) -> Callable[..., Any]:
    """Logits of a network that is adapted to batches of test pictures of one condition."""

    def run(model: Any, pictures: np.ndarray, config: Any) -> Any:
        import torch

        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        network, found = copy.deepcopy(model), []
        for start in range(0, len(pictures), size):
            images = torch.from_numpy(pictures[start : start + size]).permute(0, 3, 1, 2).float() / 255
            found.append(adapt(network, (images - mean) / std))
        return torch.cat(found)

    return run


def batch_statistics(network: Any, images: Any) -> Any:
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training, module.momentum = True, 0.0
    with torch.no_grad():
        return network(images)


def tent(network: Any, images: Any) -> Any:
    import torch

    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
    if not hasattr(network, "_tent"):
        network.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        network._tent = torch.optim.SGD(parameters, lr=2.5e-4, momentum=0.9)
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    logits = network(images)
    loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    network._tent.zero_grad()
    loss.backward()
    network._tent.step()
    return logits.detach()


ADAPTED = {
    "bn-10": on_batches(batch_statistics, 10),
    "bn-100": on_batches(batch_statistics, 100),
    "tent": on_batches(tent, 50),
}


def fitted(args: argparse.Namespace, row: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The network of a row, from the folder of an earlier run if there is one, and what its fit says."""
    import quac_plugins as quac

    model, name = common.build(args), "margins" if row == "shuffled" else row
    folder = args.work / f"{args.model}-{name}-{args.photographs}-{seed}"
    if not (folder / "adapter_config.json").is_file():
        options: dict[str, Any] = {"seed": seed, "progress": False, "checkpoint": folder.with_suffix(".fit")}
        if name == "statistics":
            options["steps"] = 0
        if name in BUDGETS:
            options["budget"] = BUDGETS[name]
        if name == "single":
            options |= {"config": quac.PriorConfig(fdm="margin"), "corruptions": "all"}
        report = quac.fit_prior(model, common.chosen(common.photographs(args)[0], args.photographs, seed), **options)
        quac.save_adapter(model, folder)
        report.to_json(folder / "fit_report.json")
        return model.eval(), report.to_dict()
    return quac.load_adapter(model, folder).eval(), json.loads((folder / "fit_report.json").read_text())


def shuffled(model: Any, pictures: np.ndarray, config: Any) -> Any:
    """Logits where each picture is told the q of the next but seven, which went through another corruption."""
    import torch

    import quac_plugins as quac
    from quac_plugins.core.quality.degradation import degradation

    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    found = []
    for start in range(0, len(pictures), 25):
        images = torch.from_numpy(pictures[start : start + 25]).permute(0, 3, 1, 2).float() / 255
        q = degradation(images)
        q = torch.cat([q[:, :1], q[:, 1:16].roll(7, dims=1), q[:, 16:]], dim=1)
        with torch.no_grad(), quac.use_q(model, q):
            found.append(model((images - mean) / std))
    return torch.cat(found)


def unit(args: argparse.Namespace, row: str, seed: int) -> None:
    path = args.work / f"unit-{args.model}-{row}-{args.photographs if row in FITTED else 0}-{seed}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"scores": {}}
    missing = [c for c in conditions(args) if f"{c[0]}/{c[1]}" not in kept["scores"]]
    if not missing:
        return
    import torch

    from quac_plugins.evaluate.preprocessing import data_config

    torch.set_num_threads(args.threads)
    items = common.photographs(args)[1]
    gates, targets = Gates(args.gates, items), torch.tensor([item.target for item in items])
    gates.use(0)
    started = time.perf_counter()
    model, report = fitted(args, row, seed) if row in FITTED else (common.build(args), {})
    run = ADAPTED.get(row, shuffled if row == "shuffled" else logits_of)
    config, scores = data_config(model), kept["scores"]
    for condition in missing:
        pictures, right = pictures_of(args, condition), 0
        for part in sorted(set(gates.folds.tolist())) if row in FITTED else [None]:
            here = np.flatnonzero(gates.folds == part) if part is not None else np.arange(len(items))
            gates.use(part or 0)
            right += int((run(model, pictures[here], config).argmax(1) == targets[here]).sum())
        scores[f"{condition[0]}/{condition[1]}"] = 100 * right / len(items)
    result = {"scores": scores, "seconds": report.get("seconds"), "multiply_adds": report.get("multiply_adds")}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result))
    os.replace(beside, path)
    print(f"{args.model} {row} {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def publish(args: argparse.Namespace) -> None:
    """The margins of the first seed in half precision into hub/, with a card, and an entry in the registry."""
    import tempfile

    import torch

    import quac_plugins as quac
    from quac_plugins.evaluate import evaluate
    from quac_plugins.registry import write_entry

    seed, name = int(args.seeds.split(",")[0]), f"{args.model}_ddp.in1k_weather"
    kept = args.work / f"{args.model}-margins-{args.photographs}-{seed}"
    scores = collect(args)[args.model]
    ours, host = scores["margins"][str(args.photographs)][str(seed)]["scores"], scores["host"]["0"]["0"]["scores"]
    told = ", ".join(_sentences(host, ours))
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        half, data = Path(temporary) / "adapter", Path(temporary) / f"{args.data.name}-judged"
        model = quac.load_adapter(common.build(args), kept)
        quac.save_adapter(model, half, dtype=torch.float16)
        if (kept / "fit_report.json").is_file():
            shutil.copyfile(kept / "fit_report.json", half / "fit_report.json")
        for item in common.photographs(args)[1]:
            link = data / Path(item.path).parent.name / Path(item.path).name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(item.path).resolve())
        model = quac.load_adapter(common.build(args), half).eval()
        report = evaluate(model, data, corruptions="all", severities=args.severities, num_workers=0, progress=False)
        pushed = quac.push(
            half, name, metrics=report, license="apache-2.0", base_model=f"timm/{args.model}.in1k",
            dry_run=RESULTS.parents[1] / "hub" / name, overwrite=True,
            description=f"Margins for the 15 corruptions of ImageNet-C, fitted by benchmarks/weather.py with "
            f"the defaults of fit_prior on {args.photographs} photographs of ImageNet without labels (seed {seed}). "
            f"The table below is of "
            f"{len(common.photographs(args)[1])} others, which the shipped quality function had seen when it was "
            f"trained; with quality functions that had not seen them: {told}.",
        )  # fmt: skip
        assert report.clean is not None
        size, sha256 = pushed.files["adapter_model.safetensors"]
        whole = evaluate(model, args.data, progress=False)
        assert whole.clean is not None
        entry = {
            "kind": "adapter", "sha256": sha256, "size": size, "license": "apache-2.0", "base": "in1k",
            "metrics": {"top1": round(report.clean["top1"], 4), "val_top1": round(whole.clean["top1"], 4)},
        }  # fmt: skip
    write_entry(RESULTS.parents[1] / "registry/timm.toml", name, entry)


def _sentences(host: dict[str, float], ours: dict[str, float]) -> list[str]:
    """Top-1 of the host and with margins: clean, and the mean of the corruptions at each severity."""
    from quac_plugins.degradations import CORRUPTIONS

    levels = sorted({key.split("/")[1] for key in ours if key.split("/")[0] in CORRUPTIONS})
    means = [
        (f"severity {level}", *(statistics.mean(s[f"{c}/{level}"] for c in CORRUPTIONS) for s in (host, ours)))
        for level in levels
    ]
    pairs = [("clean", host["clean/0"], ours["clean/0"]), *means]
    return [f"{what} {before:.1f} → {after:.1f} %" for what, before, after in pairs]


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """All units there are: host → row → photographs → runs by seed."""
    table: dict[str, Any] = (
        json.loads(args.out.with_suffix(".json").read_text()) if args.out.with_suffix(".json").is_file() else {}
    )
    for path in sorted(args.work.glob("unit-*.json")):
        _, rest = path.stem.split("-", 1)
        left, photographs, seed = rest.rsplit("-", 2)
        row = next(row for row in ROWS if left.endswith(f"-{row}"))
        host = left.removesuffix(f"-{row}")
        table.setdefault(host, {}).setdefault(row, {}).setdefault(photographs, {})[seed] = json.loads(path.read_text())
    return table


def markdown(args: argparse.Namespace, table: dict[str, Any]) -> str:
    from quac_plugins.degradations import CORRUPTIONS

    count = len(common.photographs(args)[1])
    lines = [
        "# Margins on bad pictures",
        "",
        f"`python benchmarks/weather.py --host NAME=FILE --gates DIR`: {count} photographs judged, each with a gate "
        "that has not seen it; others fitted on, without labels. Top-1 in percent, mean ± standard deviation over "
        "seeds.",
        "",
    ]
    for host, rows in table.items():
        runs = [run for row in rows.values() for by_seed in row.values() for run in by_seed.values()]
        severities = sorted({int(key.split("/")[1]) for run in runs for key in run["scores"] if "+" not in key} - {0})
        mixed = [key for key in runs[0]["scores"] if "+" in key]
        heads = [
            "clean",
            *(f"mean of 15, severity {s}" for s in severities),
            *(f"{m.replace('/', ', ')}" for m in mixed),
        ]
        lines += [
            f"## {host}",
            "",
            "| | photographs | seeds | " + " | ".join(heads) + " |",
            "|---|---|---|" + "---|" * len(heads),
        ]
        for row in (row for row in ROWS if row in rows):
            for photographs, by_seed in rows[row].items():
                scores = [run["scores"] for run in by_seed.values()]
                cells = [spread([s["clean/0"] for s in scores])]
                cells += [
                    spread([statistics.mean(s[f"{c}/{level}"] for c in CORRUPTIONS) for s in scores])
                    if all(f"fog/{level}" in s for s in scores)
                    else ""
                    for level in severities
                ]
                cells += [spread([s[key] for s in scores]) for key in mixed]
                lines.append(
                    f"| {row} | {photographs if row in FITTED else ''} | {len(scores) if row in FITTED else ''} | "
                    + " | ".join(cells)
                    + " |"
                )
        best = max(rows.get("margins", {}), key=int, default=None)
        if best is not None and "host" in rows:
            ours, theirs = list(rows["margins"][best].values()), next(iter(rows["host"]["0"].values()))["scores"]
            for level in severities:
                if not all(f"fog/{level}" in scores for scores in (theirs, *(run["scores"] for run in ours))):
                    continue
                pairs = [
                    (c, theirs[f"{c}/{level}"], statistics.mean(r["scores"][f"{c}/{level}"] for r in ours))
                    for c in CORRUPTIONS
                ]
                told = ", ".join(f"{c.replace('_', ' ')} {before:.0f} → {after:.0f}" for c, before, after in pairs)
                lines += ["", f"Severity {level}, host → margins from {best} photographs: {told}."]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    root = Path(os.environ.get("QUAC_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="NAME=FILE")
    parser.add_argument("--data", type=Path, default=root / "imagenet_sample")
    parser.add_argument("--gates", type=Path, help="of examples/train_degradation.py --work")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--severities", default="1,3,5")
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--judge", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--publish", action="store_true", help="what was fitted and judged, into hub/ and registry/")
    parser.add_argument("--work", type=Path, default=Path("weather"))
    parser.add_argument("--out", type=Path, default=RESULTS / "weather")
    args = parser.parse_args()
    args.model, _, checkpoint = args.host.partition("=")
    args.checkpoint = Path(checkpoint)
    args.severities = [int(s) for s in args.severities.split(",")]
    args.work = args.work / args.model
    args.work.mkdir(parents=True, exist_ok=True)
    if args.publish:
        publish(args)
        return
    for row in args.rows.split(","):
        for seed in [int(s) for s in args.seeds.split(",")] if row in FITTED else [0]:
            unit(args, row, seed)
            table = collect(args)
            write_tables(args.out, table, markdown(args, table))


if __name__ == "__main__":
    main()
