"""The tables of README.md and of the site, from registry/, hub/, benchmarks/results/ and the package itself.

    python docs/tables.py     # writes the tables of README.md again

A marker ``<!-- table: NAME -->`` stands where a table belongs. NAME is a function of ``TABLES`` below, or a file of
benchmarks/results: ``cifar10`` is the first table of cifar10.md, ``restoration#2`` the second of restoration.md. The
site's pages hold the marker alone; in README.md the table follows it, up to ``<!-- /table -->``.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import spread  # noqa: E402  (benchmarks/tables.py)

from quac_plugins.degradations import CORRUPTIONS  # noqa: E402
from quac_plugins.registry import read_toml  # noqa: E402


def rows_of(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def read(name: str) -> Any:
    """A file of benchmarks/results, without its suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def mean_of_15(runs: Sequence[dict[str, Any]], severity: int) -> str:
    """Of top-1 over the corruptions, mean ± standard deviation over the runs."""
    return spread([statistics.mean(run["scores"][f"{name}/{severity}"] for name in CORRUPTIONS) for run in runs])


def _weather(model: str = "tf_efficientnet_lite0") -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """The runs of a host and of its margins, and how many photographs these were fitted on."""
    rows = read("weather")[model]
    photographs = max(rows["margins"], key=int)
    return list(rows["host"]["0"].values()), list(rows["margins"][photographs].values()), photographs


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def weather() -> str:
    """The adapter for bad weather against its host."""
    host, ours, photographs = _weather()

    def row(title: str, key: str) -> list[str]:
        return [title, *(spread([run["scores"][key] for run in runs]) for runs in (host, ours))]

    def mean(severity: int) -> list[str]:
        title = f"mean of the 15 corruptions of ImageNet-C, severity {severity}"
        return [title, mean_of_15(host, severity), f"**{mean_of_15(ours, severity)}**"]

    kinds = ("fog", "motion_blur", "gaussian_noise")
    return rows_of(
        ["top-1, %", "host", f"with the adapter ({photographs} photographs, {_seeds(len(ours))})"],
        [
            row("clean pictures", "clean/0"),
            mean(3),
            mean(5),
            *(row(f"{kind.replace('_', ' ')}, severity 3", f"{kind}/3") for kind in kinds),
            row("two at once: fog and noise", "fog+gaussian_noise/3"),
        ],
    )


NAMES = {"mobilenetv2_100": "MobileNetV2"}


def proven() -> str:
    """The measured gains: one row for each use, with its cost."""
    prior, cifar, restoration = read("degradation_prior")["rows"], read("cifar10"), read("restoration")["rows"]
    models = [row["ours / host"] - 1 for row in read("speed_models")["rows"] if row["what"].endswith("inference")]
    size = read_entries("diffusers")["restoration_qacon.bsds"]["size"]

    def clean(runs: list[dict[str, Any]]) -> str:
        return spread([run["scores"]["clean" if "clean" in run["scores"] else "clean/0"] for run in runs])

    def fitted(title: str, row: str, on_clean: str | None = None) -> list[object]:
        runs, cost = prior[row], f"{prior[row][0]['multiply_adds']:+.0%} multiply-adds"
        on_clean = on_clean or f"{clean(prior['host'])} → {clean(runs)}"
        means = (mean_of_15(prior["host"], 3), mean_of_15(runs, 3))
        return [title, "MobileNetV2, top-1", *means, on_clean, len(runs), cost]

    def margins(model: str) -> list[object]:
        host, ours, photographs = _weather(model)
        times = {row["what"]: row["margins and quality / host"] - 1 for row in read("speed_margins")["rows"]}
        alone, batch = (times.get(f"{model}, batch {size}") for size in (1, 8))
        return [
            f"**margins** for the 15 corruptions, {photographs} photographs",
            f"{NAMES.get(model, model.removeprefix('tf_efficientnet_'))}, top-1",
            mean_of_15(host, 3),
            f"**{mean_of_15(ours, 3)}**",
            f"{clean(host)} → {clean(ours)}",
            len(ours),
            "time: not measured" if alone is None else f"{batch:+.0%} time in batches of 8, {alone:+.0%} one by one",
        ]

    def judged(key: str) -> list[str]:
        return [
            spread([run[key]["top1"] if key == "clean" else run[key] for run in cifar[row]]) for row in ("act", "qacon")
        ]

    def decibel(row: str, at: int) -> str:
        return spread([statistics.mean(r["1 steps"][key]["psnr"][at] for key in degraded) for r in restoration[row]], 2)

    degraded = _degraded(restoration)
    relu, qacon = judged("mean_corruption_top1")
    rows = [
        *(margins(model) for model in read("weather")),
        fitted("**routed** FDMs for the 15, 100 photographs", "routed"),
        fitted("**one FDM** for one known corruption, 10 photographs", "prior-each", "clean pictures lose"),
        [
            "**Q-ACON**, trained on degraded copies; without: ReLU, trained likewise",
            "CIFAR-10, dla46_c, top-1",
            relu,
            qacon,
            " → ".join(judged("clean")),
            len(cifar["qacon"]),
            f"{min(models):+.0%} to {max(models):+.0%} time",
        ],
        [
            "**restoration** with Q-ACON inside; without: the pictures as they came",
            "BSDS, PSNR in dB",
            decibel("qacon", 0).split(" ±")[0],
            f"{decibel('qacon', 1)} (SiLU inside: {decibel('silu', 1)})",
            "good pictures change a little",
            len(restoration["qacon"]),
            f"a network of {size / 1e6:.1f} MB",
        ],
    ]
    return rows_of(["method", "judged on", "without", "with", "clean, without → with", "seeds", "cost"], rows)


def _degraded(rows: dict[str, Any]) -> list[str]:
    """The conditions of the restoration benchmark, such as haze-3, without clean."""
    return [key for key in rows["qacon"][0]["1 steps"] if key != "clean"]


def restoration_summary() -> str:
    """The restoration pipeline and its twins by degradation: PSNR and SSIM, means over severities 1, 3 and 5."""
    found = read("restoration")["rows"]
    degraded = _degraded(found)
    at_3 = [key for key in degraded if key.endswith("3")]

    def row(
        title: str, keys: Sequence[str], figure: str = "psnr", digits: int = 2, steps: str = "1 steps"
    ) -> list[str]:
        def mean(name: str, at: int) -> str:
            return spread([statistics.mean(run[steps][key][figure][at] for key in keys) for run in found[name]], digits)

        return [title, mean("qacon", 0).split(" ±")[0], *(mean(name, 1) for name in ("qacon", "meta_acon", "silu"))]

    kinds = dict.fromkeys(key.partition("-")[0] for key in degraded)
    return rows_of(
        ["PSNR, dB", "as they came", "Q-ACON", "meta-ACON", "SiLU"],
        [
            *(row(kind.replace("_", " "), [f"{kind}-{s}" for s in (1, 3, 5)]) for kind in kinds),
            row("mean of these", degraded),
            row("their SSIM", degraded, "ssim", 3),
            row("not degraded", ["clean"]),
            row("severity 3, one step", at_3),
            row("severity 3, ten steps", at_3, steps="10 steps"),
        ],
    )


def preserved() -> str:
    """A host and the same network with preserved activations, evaluated alike."""
    names = ("mobilenetv2_100", "mobilenetv2_100_qacon")
    host, ours = (read(f"evaluate_{name}") for name in names)
    rows = [("clean", *(f"{r['clean']['top1']:.2f}" for r in (host, ours)))]
    rows += [
        (kind.replace("_", " "), *(f"{r['corruptions'][kind]['3']['top1']:.2f}" for r in (host, ours)))
        for kind in CORRUPTIONS
    ]
    rows.append(("mean of the 15", *(f"{r['mean_corruption_top1']:.2f}" for r in (host, ours))))
    return rows_of(["top-1, %", *(f"`{name}`" for name in names)], rows)


def read_entries(registry: str) -> dict[str, dict[str, Any]]:
    """The entries of registry/REGISTRY.toml, as they are written there."""
    return read_toml(ROOT / "registry" / f"{registry}.toml")


def models() -> str:
    """Every published model."""
    rows = []
    for registry, call in (("timm", "timm.create_model"), ("diffusers", "QuACRestorationPipeline.from_pretrained")):
        for name, entry in read_entries(registry).items():
            metrics, size = entry.get("metrics", {}), f"{entry['size'] / 1e6:.1f}"
            if "psnr" in metrics:
                figure = f"{metrics['psnr_before']:.2f} → {metrics['psnr']:.2f} dB"
            else:
                deviation = f" ± {metrics['top1_std']:.1f}" if "top1_std" in metrics else ""
                figure = f"top-1 {metrics['top1']:.1f}{deviation} %"
            lies = entry.get("repo", "in the package")
            rows.append([f"`{name}`", entry["kind"], size, figure, lies, entry["license"], f"`{call}`"])
    return rows_of(["name", "kind", "MB", "figure", "lies", "license", "loaded by"], rows)


def _first(thing: Any) -> str:
    """The first paragraph of a docstring, roles of Sphinx taken off."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", paragraph)


def activations() -> str:
    """Every activation by its name."""
    from quac_plugins import ACTIVATIONS

    def row(name: str) -> list[object]:
        kind = ACTIVATIONS[name]
        return [f"`{name}`", f"`{kind.__name__}`", "yes" if kind.needs_quality else "no", kind.numbers, _first(kind)]

    return rows_of(
        ["name", "class", "reads q", "numbers a channel", "equation"], [row(name) for name in sorted(ACTIVATIONS)]
    )


def qualities() -> str:
    """Every quality function by its name."""
    from quac_plugins import quality_names, resolve_quality

    rows = []
    for name in quality_names():
        family = name.partition("[")[0]
        if family == name:
            function = resolve_quality(name)
            rows.append([f"`{name}`", function.channels, _first(function.function)])
        else:  # pyiqa[:…]: Q is the metric's or the checkpoint's
            rows.append([f"`{name}`", "", _first(import_module(f"quac_plugins.core.quality.{family}"))])
    return rows_of(["name", "Q", "quality feature"], rows)


def priors() -> str:
    """Every module that repairs features."""
    from quac_plugins import FDMS

    return rows_of(
        ["name", "class", "module"], [[f"`{name}`", f"`{FDMS[name].__name__}`", _first(FDMS[name])] for name in FDMS]
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (weather, proven, restoration_summary, preserved, models, activations, qualities, priors)
}


def table(name: str) -> str:
    """The table of a marker; ValueError names those that there are."""
    if name in TABLES:
        return TABLES[name]()
    stem, _, number = name.partition("#")  # weather#1: the file's, where a function has the name
    path = RESULTS / f"{stem}.md"
    if not path.is_file():
        raise ValueError(
            f"no table {name!r}; there are: {', '.join([*TABLES, *sorted(p.stem for p in RESULTS.glob('*.md'))])}"
        )
    found = re.findall(r"(?:^\|.*\n?)+", path.read_text(encoding="utf-8"), flags=re.M)
    return found[int(number or 1) - 1].rstrip()


def fill(text: str) -> str:
    """Put the tables behind their markers; those that stand there are replaced."""
    text = re.sub(r"(<!-- table: \S+ -->\n)(?:(?!<!--).)*?<!-- /table -->\n", r"\1", text, flags=re.S)
    return re.sub(r"<!-- table: (\S+) -->\n", lambda m: f"{m[0]}\n{table(m[1])}\n\n<!-- /table -->\n", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
