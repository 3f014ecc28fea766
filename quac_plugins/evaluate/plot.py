"""Figures of evaluation reports: bars of top-1, without a display and without touching pyplot's state."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quac_plugins.core.files import write_file
from quac_plugins.evaluate.report import EvaluationReport
from quac_plugins.evaluate.report_names import details_of, labels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_report", "plot_reports", "require_matplotlib", "write_figure"]

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
    _draw(groups, bars, lines, report.label, path, details_of([report]))


def plot_reports(reports: Sequence[EvaluationReport], path: str | os.PathLike[str]) -> None:
    """Draw several reports side by side, a bar for each in each corruption.

    The legend names each report by its differences from the others: adapter, checkpoint, preprocessing, versions, ….
    A bar is the mean over the severities that all reports with the corruption have. A corruption that a report lacks
    leaves a gap; the mean at the right is drawn only without gaps.

    Args:
        reports: at least one.
        path: the image file (PNG, SVG, PDF by its suffix).

    Raises:
        ImportError: if `matplotlib` is not installed.
        ValueError: if there is no report, or nothing was measured.
    """
    names = list(dict.fromkeys(name for report in reports for name in report.corruptions))
    levels = {name: _shared([r.corruptions[name] for r in reports if name in r.corruptions]) for name in names}
    bars: Bars = []
    for index, (report, label) in enumerate(zip(reports, labels_of(reports), strict=True)):
        means = [_mean([_top1(report.corruptions.get(name, {}).get(s)) for s in levels[name]]) for name in names]
        bars.append((label, _MODEL_COLOURS[index % len(_MODEL_COLOURS)], [_top1(report.clean), *means]))
    groups = ["clean", *names]
    if names and all(value is not None for _, _, values in bars for value in values[1:]):
        groups.append("mean of corruptions")
        bars = [(label, colour, [*values, _mean(values[1:])]) for label, colour, values in bars]
    severities = sorted({s for shared in levels.values() for s in shared})
    _draw(groups, bars, [], f"severity {', '.join(severities)}" if severities else "", path, details_of(reports))


def require_matplotlib() -> type[Figure]:
    """Return matplotlib's `Figure`.

    Raises:
        ImportError: if `matplotlib` is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'figures need matplotlib: pip install "quac-plugins[evaluate]" ({error})') from error
    return Figure


def _draw(
    groups: list[str],
    bars: Bars,
    lines: list[tuple[str, str, float | None]],
    title: str,
    path: str | os.PathLike[str],
    details: Sequence[str],
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
    columns = int(figure.get_figwidth() * 13)  # letters of the usual size that fit beside each other
    _dress(axes, groups, crowded=len(groups) > 4 or len(groups) * max(map(len, groups)) > columns)
    figure.suptitle(textwrap.fill(title, columns), fontsize=11)
    small = [part for line in details for part in textwrap.wrap(line, int(columns * 1.25), break_on_hyphens=False)]
    axes.set_title("\n".join(small), fontsize=7, color=_CLEAN)
    handles, texts = axes.get_legend_handles_labels()
    labels = [textwrap.fill(text, columns - 8) for text in texts]
    longest = max(len(line) for text in labels for line in text.splitlines()) + 7
    ncols = max(1, min(6, len(labels), columns // longest))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    write_figure(figure, path)


def write_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure of matplotlib as PNG, SVG or PDF, as the suffix says; see :func:`write_file`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=dpi)
    write_file(path, buffer.getvalue())


def _figure(groups: int, bars: int) -> tuple[Figure, Axes]:
    width = min(20.0, max(4.5, 1.5 + groups * max(0.55, 0.22 * bars + 0.15)))
    figure = require_matplotlib()(figsize=(width, 4.4), layout="constrained")
    return figure, figure.subplots()


def _dress(axes: Any, groups: list[str], crowded: bool) -> None:
    axes.set_ylim(0, 104)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("top-1 (%)")
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


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _shared(conditions: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    return sorted(set.intersection(*(set(levels) for levels in conditions)))
