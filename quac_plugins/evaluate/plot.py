"""Figures of evaluation reports: bars of top-1, without a display and without touching pyplot's state."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quac_plugins.evaluate.report import EvaluationReport, write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_report", "plot_reports"]

_CLEAN, _DARK = "#555555", "#222222"
_SEVERITY_COLOURS = {"1": "#b7d4ea", "2": "#87b8dc", "3": "#5598c9", "4": "#2b71ac", "5": "#0b3f78"}
_MODEL_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")

Bars = list[tuple[str, str, list["float | None"]]]


def plot_report(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """Draw one report: a group of bars for each corruption, a bar for each severity, clean as a dashed line.

    Raises:
        ImportError: if `matplotlib` is not installed.
        ValueError: if nothing was measured.
    """
    groups = list(report.corruptions)
    bars: Bars = [
        (f"severity {s}", _SEVERITY_COLOURS.get(s, _DARK), [_top1(report.corruptions[g].get(s)) for g in groups])
        for s in sorted({s for levels in report.corruptions.values() for s in levels})
    ]
    lines = [("clean", _CLEAN, _top1(report.clean))] if groups else []
    if not groups:
        groups, bars = ["clean"], [("top-1", _CLEAN, [_top1(report.clean)])]
    _draw(groups, bars, lines, report.model, path)


def plot_reports(reports: Sequence[EvaluationReport], path: str | os.PathLike[str]) -> None:
    """Draw several reports side by side: for each corruption the mean over its severities, a bar for each report.

    Args:
        reports: at least one; a corruption that a report lacks leaves a gap.
        path: the image file (PNG, SVG, PDF by its suffix).

    Raises:
        ImportError: if `matplotlib` is not installed.
        ValueError: if there is no report, or nothing was measured.
    """
    groups = list(dict.fromkeys(name for report in reports for name in report.corruptions))
    bars: Bars = []
    for index, report in enumerate(reports):
        values = [_top1(report.clean), *(_mean(report.corruptions.get(name, {})) for name in groups)]
        values += [report.mean_corruption_top1] if groups else []
        bars.append((report.model, _MODEL_COLOURS[index % len(_MODEL_COLOURS)], values))
    severities = sorted({s for report in reports for s in report.severities})
    title = f"severity {', '.join(map(str, severities))}" if severities else ""
    _draw(["clean", *groups, *(["mean of\ncorruptions"] if groups else [])], bars, [], title, path)


def _draw(
    groups: list[str], bars: Bars, lines: list[tuple[str, str, float | None]], title: str, path: str | os.PathLike[str]
) -> None:
    if not any(value is not None for _, _, values in bars for value in values):
        raise ValueError("there is nothing to draw: the report holds no numbers")
    figure, axes = _figure(len(groups), len(bars))
    width = 0.84 / len(bars)
    numbered = len(bars) <= 3
    for index, (label, colour, values) in enumerate(bars):
        places = [group - 0.42 + width * (index + 0.5) for group in range(len(groups))]
        drawn = axes.bar(places, [value or 0 for value in values], width * 0.94, color=colour, label=label)
        if numbered:
            texts = ["" if value is None else f"{value:.0f}" for value in values]
            axes.bar_label(drawn, texts, padding=1, fontsize=8, color=_DARK)
    for label, colour, value in lines:
        if value is not None:
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{label} {value:.1f} %", zorder=0)
    _dress(axes, groups, title)
    figure.legend(loc="outside lower center", ncols=min(6, len(bars) + len(lines)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=150)
    write_beside(path, buffer.getvalue())


def _figure(groups: int, bars: int) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "quac-plugins[evaluate]"') from error
    width = min(20.0, max(4.5, 1.5 + groups * max(0.55, 0.22 * bars + 0.15)))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    return figure, figure.subplots()


def _dress(axes: Any, groups: list[str], title: str) -> None:
    axes.set_ylim(0, 104)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("top-1 (%)")
    axes.set_title(title, fontsize=11)
    crowded = len(groups) > 4
    axes.set_xticks(
        range(len(groups)),
        [group.replace("_", " ") for group in groups],
        rotation=40 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _top1(scores: dict[str, Any] | None) -> float | None:
    return None if scores is None else scores["top1"]


def _mean(levels: dict[str, dict[str, Any]]) -> float | None:
    values = [scores["top1"] for scores in levels.values() if scores["top1"] is not None]
    return sum(values) / len(values) if values else None
