"""Model cards, rendered from a model's content and from result files; no figure is typed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from quac_plugins.core.files import read_json
from quac_plugins.core.inject.adapter_files import CONFIG_NAME
from quac_plugins.evaluate.report import EvaluationReport
from quac_plugins.evaluate.report_names import details_of, differences_of
from quac_plugins.registry import data_folder

_TEMPLATE = "card_template.md"


def read_metrics(metrics: Any) -> list[EvaluationReport]:
    """Read reports: a report, the path of a JSON file with one report or a list, or several of these.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a report, or the reports are of different data, preprocessing or kinds of network.
    """
    if metrics is None:
        return []
    reports: list[EvaluationReport] = []
    for item in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        if isinstance(item, EvaluationReport):
            reports.append(item)
            continue
        path = Path(item)
        try:
            content = read_json(path)
            for values in content if isinstance(content, list) else [content]:
                reports.append(EvaluationReport.from_dict(values))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not the JSON of an evaluation (quac evaluate --json): {error}") from error
    rows = [[row[:2] for row in report.rows()] for report in reports]
    if any(row != rows[0] for row in rows):
        raise ValueError("the reports were measured on different corruptions or severities; they cannot be one table")
    if differences := differences_of(reports):
        raise ValueError(f"the reports are not runs of one thing ({'; '.join(differences)}); they cannot be one table")
    if reports and not rows[0]:
        raise ValueError("the report holds no figures")
    return reports


def spread(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation or, of one value, None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def make_card(
    folder: Path,
    repo_id: str,
    reports: list[EvaluationReport],
    fit: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    description: str | None = None,
) -> str:
    """Return the card of the files in a folder, as Markdown with the Hub's metadata.

    Args:
        folder: a folder with an adapter or a model.
        repo_id: the name of the repository, ``"org/name"`` or ``NAME.TAG``.
        reports: the evaluations, one for each seed.
        fit: a FitReport, or the path of its JSON.
        base_model: the name of the host's weights on the Hub.
        license: the license of the weights.
        description: a paragraph for the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = read_json(folder / (name := _config_name(folder)))
    is_adapter = name == CONFIG_NAME
    library = "timm" if is_adapter or "architecture" in config else "transformers"
    of_timm = str(config["host"].get("class", "timm.")).startswith("timm.") if is_adapter else library == "timm"
    inside = _inside(config) if is_adapter else _inside_model(config) if of_timm else _inside_transformers(config)
    fitted = _fit(fit)
    data = ModelCardData(
        library_name="quac-plugins" if is_adapter else library,
        license=license,
        base_model=base_model,
        pipeline_tag="image-classification" if of_timm or reports else None,
        tags=["quac-plugins", "robustness", *(["timm"] if is_adapter and of_timm else []), *inside["tags"]],
        model_name=repo_id.rpartition("/")[2],
        eval_results=_results(reports) or None,
    )
    return str(
        ModelCard.from_template(
            data,
            template_path=str(data_folder("hub") / _TEMPLATE),
            repo_id=repo_id,
            is_adapter=is_adapter,
            of_timm=of_timm,
            library=library,
            description=description,
            base_model=base_model,
            license=license,
            inside=inside,
            fit=fitted,
            table=_table(reports),
            details=details_of(reports, ("weights", "images", "run")),
            reports=[report.to_dict() for report in reports],
        )
    )


def _config_name(folder: Path) -> str:
    return CONFIG_NAME if (folder / CONFIG_NAME).is_file() else "config.json"


def _inside(config: dict[str, Any]) -> dict[str, Any]:
    """Describe an adapter's modules and places for the template."""
    host, prior = config["host"], config.get("prior")
    suffix = ("_qacon" if config["config"] else "") + ("_ddp" if prior else "")
    parts = []
    if config["config"]:
        parts.append(_part("Q-ACON and its family", config["config"], config["sites"], "activation"))
    if prior:
        parts.append(_part("Degradation prior", prior["config"], prior["sites"], "fdm"))
    return {
        "name": f"{host['architecture']}{suffix}",
        "host": host["architecture"],
        "host_class": host.get("class"),
        "fingerprint": host.get("fingerprint"),
        "parts": parts,
        "tags": (["q-acon"] if config["config"] else []) + (["degradation-prior"] if prior else []),
        "has_prior": bool(prior),
    }


def _part(title: str, options: dict[str, Any], sites: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    named = {key: value for key, value in options.items() if value is not None and key != kind}
    return {"title": title, "kind": options[kind], "options": named, "sites": [site["name"] for site in sites]}


def _inside_model(config: dict[str, Any]) -> dict[str, Any]:
    cfg, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    name = config.get("architecture", "")
    tag = cfg.get("tag")
    parts = [{"title": "Arguments", "kind": name, "options": args, "sites": []}] if args else []
    tags = [word for suffix, word in (("_qacon", "q-acon"), ("_ddp", "degradation-prior")) if suffix in name]
    return {
        "name": name, "host": name, "fingerprint": None, "parts": parts, "tags": tags,
        "has_prior": False, "tag": tag, "num_classes": config.get("num_classes"),
    }  # fmt: skip


def _inside_transformers(config: dict[str, Any]) -> dict[str, Any]:
    name, parts = (config.get("architectures") or [""])[0], []
    if quac := config.get("quac"):
        parts.append(_part("Q-ACON and its family", quac, [], "activation"))
    if prior := config.get("quac_prior"):
        parts.append(_part("Degradation prior", prior, [], "fdm"))
    tags = (["q-acon"] if quac else []) + (["degradation-prior"] if prior else [])
    return {"name": name, "host": name, "fingerprint": None, "parts": parts, "tags": tags, "has_prior": bool(prior)}


def _fit(fit: Any) -> dict[str, Any] | None:
    if fit is None:
        return None
    from quac_plugins.fit.report import FitReport

    if isinstance(fit, FitReport):
        return fit.to_dict()
    try:
        return FitReport.from_json(fit).to_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fit} is not the JSON of a fit (report.to_json, quac fit-prior): {error}") from error


def _table(reports: list[EvaluationReport]) -> list[dict[str, Any]]:
    """Return a row for clean images and for each corruption and severity: name, severity, mean, std, n."""
    if not reports:
        return []
    rows = []
    for scores in zip(*(report.rows() for report in reports), strict=True):
        values = [score["top1"] for _, _, score in scores if score["top1"] is not None]
        mean, deviation = spread(values) if values else (None, None)
        name, severity, score = scores[0]
        rows.append({"name": name, "severity": severity, "top1": mean, "std": deviation, "n": score["n"]})
    return rows


def _results(reports: list[EvaluationReport]) -> list[Any]:
    """Return the figures in the form of the Hub's model-index."""
    from huggingface_hub import EvalResult

    if not reports:
        return []
    dataset = Path(reports[0].data).name or "images"
    named = [("clean images", [r.clean["top1"] for r in reports if r.clean])]
    named.append(("mean over corruptions", [m for r in reports if (m := r.mean_corruption_top1) is not None]))
    results = []
    for config, values in named:
        if len(values) < len(reports):
            continue
        mean, deviation = spread(values)
        args = {"runs": len(values)} | ({"std": round(deviation, 2)} if deviation is not None else {})
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=f"{dataset}, {config}",
                dataset_config=config,
                metric_type="accuracy",
                metric_name="top-1 %",
                metric_value=round(mean, 2),
                metric_args=args,
            )
        )
    return results
