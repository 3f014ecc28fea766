"""The result of an evaluation: numbers, settings, and how they are shown."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quac_plugins.files import write_file

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EvaluationReport", "software_versions"]

Scores = dict[str, Any]
"""``top1`` and ``top5`` in percent (None without images) and ``n``, the number of images."""


@dataclass
class EvaluationReport:
    """Top-1 and top-5 in percent, clean and for each corruption and severity, with the settings behind them.

    Attributes:
        model: the name of the network.
        clean: ``{"top1": float, "top5": float, "n": int}``, or None if clean images were left out.
        corruptions: maps a corruption to a severity, as a string, to such numbers.
        unreadable: the files that could not be read and are in none of the counts.
        nan_outputs: how many images gave a NaN, by ``"clean"`` or ``"fog/3"``; they count as wrong.
        seed: of the corruptions and of the choice of images.
        severities: the severities measured.
        limit: how many images were asked for, or None.
        data: the directory.
        layout: ``"classes"`` or ``"imagenet-c"``.
        preprocessing: timm's data config.
        versions: of the software.
        seconds: how long it took.

    Example:
        >>> fog = {"3": {"top1": 40.0, "top5": 70.0, "n": 10}, "5": {"top1": 20.0, "top5": 30.0, "n": 10}}
        >>> report = EvaluationReport("resnet18", {"top1": 80.0, "top5": 90.0, "n": 10}, {"fog": fog})
        >>> report.mean_corruption_top1
        30.0
    """

    model: str
    clean: Scores | None = None
    corruptions: dict[str, dict[str, Scores]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    nan_outputs: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    severities: list[int] = field(default_factory=list)
    limit: int | None = None
    data: str = ""
    layout: str = "classes"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def mean_corruption_top1(self) -> float | None:
        """The mean of top-1 over all corruptions and severities, or None without any."""
        values = [s["top1"] for levels in self.corruptions.values() for s in levels.values() if s["top1"] is not None]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, the results first."""
        content = json.loads(json.dumps(asdict(self), allow_nan=False))
        head = {key: content.pop(key) for key in ("model", "clean", "corruptions")}
        return {**head, "mean_corruption_top1": self.mean_corruption_top1, **content}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationReport:
        """Return the report that `to_dict` described."""
        return cls(**{key: value for key, value in content.items() if key != "mean_corruption_top1"})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report; a reader sees the old file or the whole new one, never a part."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_file(path, text.encode("utf-8", "backslashreplace"))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> EvaluationReport:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> Table:
        """Return a table for `rich`, one row for clean images and for each corruption and severity."""
        from rich.table import Table

        table = Table("corruption", "severity", title=self.model)
        for column in ("top-1 %", "top-5 %", "images"):
            table.add_column(column, justify="right")
        for name, severity, scores in self.rows():
            table.add_row(name, severity, _percent(scores["top1"]), _percent(scores["top5"]), str(scores["n"]))
        if self.mean_corruption_top1 is not None:
            table.add_section()
            table.add_row("mean of corruptions", "", _percent(self.mean_corruption_top1), "", "")
        return table

    def rows(self) -> list[tuple[str, str, Scores]]:
        """Return (corruption, severity, scores) for all that was measured, clean first, with severity ``""``."""
        clean = [("clean", "", self.clean)] if self.clean else []
        return clean + [(name, s, scores) for name, levels in self.corruptions.items() for s, scores in levels.items()]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw top-1 for each corruption and severity into an image file (PNG, SVG, PDF by its suffix).

        Raises:
            ImportError: if `matplotlib` is not installed.
            ValueError: if nothing was measured.
        """
        from quac_plugins.evaluate.plot import plot_report

        plot_report(self, path)


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in ("quac-plugins", "torch", "timm", "torchvision", "numpy", "pillow", "imagecorruptions-imaug"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
