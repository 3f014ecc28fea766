"""Names of reports in titles and legends: short and distinct."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quac_plugins.evaluate.report import EvaluationReport

__all__ = ["details_of", "differences_of", "label_of", "labels_of"]

_DIGITS = 6  # of a hash: enough to tell files apart by eye
_ASIDE = [f"versions.{name}" for name in ("python", "platform", "torchvision", "pillow")]  # too much for a title


def label_of(report: EvaluationReport) -> str:
    """Return the name of the network with the adapter or the injected modules, and the checkpoint.

    Example:
        >>> from quac_plugins.evaluate import EvaluationReport
        >>> given = {"adapter": {"name": "fog/fog-adapter"}, "checkpoint": {"path": "runs/last.pt", "sha256": "d4e5f6"}}
        >>> label_of(EvaluationReport("resnet18", network={"inside": {"sha256": "a1b2c3"}, "given": given}))
        'resnet18 + fog-adapter (a1b2c3), last.pt (d4e5f6)'
    """
    arguments, inside = report.network.get("given") or {}, report.network.get("inside")
    label = report.model
    if inside is not None:
        adapter = arguments.get("adapter") or {}
        kinds = [key for key, part in (("qacon", "activations"), ("ddp", "prior")) if inside.get(part)]
        kinds = [kind for kind in kinds if f"_{kind}" not in label]
        name = PurePath(adapter["name"]).name if adapter else "_".join(kinds)
        label += (f" + {name}" if name else "") + (f" ({inside['sha256'][:_DIGITS]})" if inside["sha256"] else "")
    return ", ".join([label, *_file(arguments.get("checkpoint"))])


def labels_of(reports: Sequence[EvaluationReport]) -> list[str]:
    """Return a distinct label for each report: its own label, and the facts that differ between the reports.

    Equal labels get a hash of the weights, then less important versions, and at last a number.
    """
    facts = [_facts(report) for report in reports]
    shared = _shared(facts)
    apart = [{key: text for key, text in fact.items() if text and key not in shared} for fact in facts]
    labels = [
        ", ".join([label_of(report), *(text for key, text in fact.items() if key not in _ASIDE)])
        for report, fact in zip(reports, apart, strict=True)
    ]
    endings = [
        [f"weights {report.network['weights'][:_DIGITS]}" if report.network else "" for report in reports],
        [", ".join(text for key, text in fact.items() if key in _ASIDE) for fact in apart],
        [f"#{number}" for number in range(1, len(reports) + 1)],
    ]
    for ending in endings:
        counts = Counter(labels)
        alike = [counts[label] > 1 for label in labels]
        labels = [f"{a}, {b}" if more and b else a for a, b, more in zip(labels, ending, alike, strict=True)]
    return labels


def details_of(
    reports: Sequence[EvaluationReport], wanted: Sequence[str] = ("weights", "images", "run", "versions")
) -> list[str]:
    """Return lines for a title: the facts about weights, images, run and versions that all reports share."""
    groups: dict[str, list[str]] = {}
    for key, text in _shared([_facts(report) for report in reports]).items():
        if text and key not in _ASIDE:
            groups.setdefault(key.partition(".")[0], []).append(text)
    return [", ".join(groups[group]) for group in wanted if group in groups]


def differences_of(reports: Sequence[EvaluationReport]) -> list[str]:
    """Return the differences that make reports no runs of one network: data, preprocessing, kinds of modules."""
    known: dict[str, dict[str, None]] = {}
    for report in reports:
        facts = _facts(report)
        if "inside" in report.network:
            inside = report.network["inside"] or {}
            kinds = [key for key in ("activations", "prior") if inside.get(key)]
            facts["inside"] = f"with {' and '.join(kinds)}" if kinds else "with nothing inside"
        for key, text in facts.items():
            if key.startswith("images.") or key in ("inside", "run.data", "run.limit"):
                known.setdefault(key, {})[text or "no limit"] = None
    return [", ".join(texts) for texts in known.values() if len(texts) > 1]


def _shared(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts that are equal in all reports that have them."""
    values = {
        key: {fact[key] for fact in facts if key in fact} for key in dict.fromkeys(k for fact in facts for k in fact)
    }
    return {key: texts.pop() for key, texts in values.items() if len(texts) == 1}


def _facts(report: EvaluationReport) -> dict[str, str]:
    """Return in words everything but the label that influences a number: "" is nothing, unknown facts are missing.

    The part of a key before the dot groups it.
    """
    arguments, seen = report.network.get("given"), report.preprocessing
    facts = {"run.data": PurePath(report.data).name, "run.limit": f"limit {report.limit}" if report.limit else ""}
    if arguments is not None:
        facts["weights.base"] = ", ".join(_file(arguments.get("base_checkpoint")))
        facts["weights.arguments"] = ", ".join(f"{k}={v}" for k, v in (arguments.get("model_kwargs") or {}).items())
    words: dict[str, Callable[[Any], str]] = {
        "input_size": lambda size: "×".join(map(str, size[-2:])), "crop_pct": lambda part: f"crop {part:g}",
        "interpolation": str, "mean": lambda values: f"mean {_numbers(values)}",
        "std": lambda values: f"std {_numbers(values)}",
    }  # fmt: skip
    facts |= {f"images.{key}": say(seen[key]) for key, say in words.items() if key in seen}
    facts |= {f"run.{key}": text for key in ("device", "precision") if (text := getattr(report, key))}
    facts["run.seed"] = f"seed {report.seed}"
    return facts | {f"versions.{name}": f"{name} {number}" for name, number in report.versions.items()}


def _file(described: Mapping[str, Any] | None) -> list[str]:
    return [f"{PurePath(described['path']).name} ({described['sha256'][:_DIGITS]})"] if described else []


def _numbers(values: Sequence[float]) -> str:
    texts = [f"{value:.3g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)
