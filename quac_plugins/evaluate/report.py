"""The result of an evaluation: numbers, settings, and how they are shown."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quac_plugins.core.files import write_file
from quac_plugins.evaluate.outcomes import paired_rows
from quac_plugins.evaluate.report_names import details_of, label_of

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
        corruptions: corruption → severity, as a string → a dict like ``clean``.
        unreadable: the files that could not be read and are in none of the counts.
        nan_outputs: ``"clean"`` or ``"fog/3"`` → the number of images with a NaN in the output, which count as wrong.
        seed: the seed of the corruptions and of the choice of images.
        severities: the measured severities.
        limit: the largest number of images, or None.
        data: the directory.
        layout: ``"classes"`` or ``"imagenet-c"``.
        preprocessing: timm's data config; ``keep_ready``: images of this very size were taken as they are; ``from``:
            for each setting ``"given"``, ``"network"`` (its own config) or ``"timm"`` (the default).
        versions: the versions of the software, and the platform.
        seconds: the duration.
        network: the dict of `quac_plugins.evaluate.lending.describe_network`: ``host``, ``weights``, ``inside``; from
            the command also ``given``, its arguments: ``base_checkpoint`` and ``checkpoint`` (``path``, ``sha256``),
            ``adapter`` (``name``), ``model_kwargs``, ``num_classes`` and ``pretrained``.
        device: the device, with the name of a GPU.
        precision: the precision of the network, and of autocast.
        outcomes: lists in one order: ``images`` (names below the directory, sorted), ``targets`` (class indices), and
            for each condition, named as in ``nan_outputs``, ``predicted`` (class index) and ``rank`` (place of the
            right class, from 1 on). Both are None for an image that was not read under the condition, and -1 for an
            output with a NaN. Empty if the outcomes were not kept.

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
    network: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    precision: str = ""
    outcomes: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_corruption_top1(self) -> float | None:
        """Return the mean of top-1 over all corruptions and severities, or None without any."""
        values = [s["top1"] for levels in self.corruptions.values() for s in levels.values() if s["top1"] is not None]
        return sum(values) / len(values) if values else None

    @property
    def label(self) -> str:
        """Return a short, distinct name: ``"mobilenetv2_100 + fog-adapter (a1b2c3)"``."""
        return label_of(self)

    def paired(self, other: EvaluationReport) -> list[dict[str, Any]]:
        """Compare this report with another image by image.

        Over equal images a difference is far surer than the two numbers alone.

        Args:
            other: a report of the same images, or of some of them; both reports need ``outcomes``.

        Returns:
            A dict for each shared condition, and for the mean of corruptions: ``condition``; ``difference`` of top-1 in
            points, this minus other, with ``low`` and ``high``, its 95 % interval (normal approximation: not for a
            handful of images); ``gained`` and ``lost``, the numbers of images that only this or only the other network
            has right, for McNemar's test (in the mean: right under more, or under fewer corruptions); ``n`` images.

        Raises:
            ValueError: a report has no outcomes, the reports share no images or conditions, or disagree about a class.

        Example:
            >>> images = {"images": ["a/1.jpg", "a/2.jpg", "b/3.jpg"], "targets": [0, 0, 1]}
            >>> one, two = ({**images, "rank": {"clean": ranks}} for ranks in ([1, 1, 1], [1, 2, 4]))
            >>> row = EvaluationReport("new", outcomes=one).paired(EvaluationReport("old", outcomes=two))[0]
            >>> round(row["difference"], 1), row["gained"], row["lost"], row["n"]
            (66.7, 2, 0, 3)
        """
        for report in (self, other):
            if not report.outcomes:
                raise ValueError(f"the report of {report.label} holds no outcomes: evaluate again, with outcomes")
        return paired_rows(self.outcomes, other.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, the results first."""
        values = {field_.name: getattr(self, field_.name) for field_ in fields(self)}
        content = json.loads(json.dumps(values, allow_nan=False, default=str))
        head = {key: content.pop(key) for key in ("model", "clean", "corruptions")}
        return {**head, "mean_corruption_top1": self.mean_corruption_top1, **content}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationReport:
        """Return the report of a dict of `to_dict`, also of an earlier version.

        Raises:
            ValueError: the dict is no report; the message names the wrong part.
        """
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError("a report of an evaluation is an object with model, clean and corruptions")
        known = [field_.name for field_ in fields(cls)]
        unknown = [key for key in content if key not in (*known, "mean_corruption_top1")]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is nothing that a report of an evaluation holds (known: {', '.join(known)}); if a "
                "newer quac-plugins wrote it, read it with that one"
            )
        return cls(**{key: value for key, value in content.items() if key in known})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report; a reader sees the old file or the whole new one, never a part."""
        text = _text(self.to_dict()) + "\n"
        write_file(path, text.encode("utf-8", "backslashreplace"))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> EvaluationReport:
        """Read a file of `to_json`; the errors are the ones of `from_dict`, with the file's name."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no report of an evaluation: {error}") from error

    def table(self) -> Table:
        """Return a table for `rich`, one row for clean images and for each corruption and severity."""
        from rich.table import Table

        table = Table("corruption", "severity", title="\n".join([self.label, *details_of([self])]))
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
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("quac-plugins", "torch", "timm", "torchvision", "numpy", "pillow", "imagecorruptions-imaug"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _text(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each key and each list on one line, since lists may be as long as the data."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = indent + "  "
    lines = [f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_text(item, deeper)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
