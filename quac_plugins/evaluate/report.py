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
        corruptions: maps a corruption to a severity, as a string, to such numbers.
        unreadable: the files that could not be read and are in none of the counts.
        nan_outputs: how many images gave a NaN, by ``"clean"`` or ``"fog/3"``; they count as wrong.
        seed: of the corruptions and of the choice of images.
        severities: the severities measured.
        limit: how many images were asked for, or None.
        data: the directory.
        layout: ``"classes"`` or ``"imagenet-c"``.
        preprocessing: timm's data config; ``keep_ready``: images of this very size were taken as they are; ``from``:
            for each setting ``"given"``, ``"network"`` (its own config) or ``"timm"`` (the default).
        versions: of the software, and the platform.
        seconds: how long it took.
        network: what `quac_plugins.evaluate.lending.describe_network` says of it: ``host``, ``weights``, ``inside``;
            from the command also ``given``: ``base_checkpoint`` and ``checkpoint`` (``path``, ``sha256``), ``adapter``
            (``name``), ``model_kwargs``, ``num_classes`` and ``pretrained``, as they were given.
        device: where it ran, with the name of a GPU.
        precision: of the network, and of autocast.
        outcomes: what became of each image, in lists of one order: ``images`` (names below the directory, sorted),
            ``targets`` (class indices), and for each condition, named as in ``nan_outputs``, ``predicted`` (class
            index) and ``rank`` (of the right class, 1 being the first place). Both are None where the image was not
            read under that condition, and -1 where its output held a NaN. Empty if they were not kept.

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
        """The mean of top-1 over all corruptions and severities, or None without any."""
        values = [s["top1"] for levels in self.corruptions.values() for s in levels.values() if s["top1"] is not None]
        return sum(values) / len(values) if values else None

    @property
    def label(self) -> str:
        """A short name that tells it apart: ``"mobilenetv2_100 + fog-adapter (a1b2c3)"``."""
        return label_of(self)

    def paired(self, other: EvaluationReport) -> list[dict[str, Any]]:
        """Compare with another report image by image: how much better is this network than that?

        Over equal images a difference is far surer than the two numbers that it is of.

        Args:
            other: of the same images, or of some of them; both with ``outcomes``.

        Returns:
            For each condition that both have, and for the mean of corruptions, a dict: ``condition``; ``difference`` of
            top-1 in points, this minus the other, with ``low`` and ``high``, its 95 % interval (normal approximation:
            not for a handful of images); ``gained`` and ``lost``, the images that only this or only the other has
            right, which McNemar's test takes (in the mean: those right under more, or under fewer); ``n`` images.

        Raises:
            ValueError: if one has no outcomes, they share no images or conditions, or take an image for other classes.

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
        """Return the report that `to_dict` described, also of an earlier version.

        Raises:
            ValueError: if it is no such thing; the message names what is wrong.
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
        """Read what `to_json` wrote; the errors of `from_dict`, with the file's name."""
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
    """JSON with a line for each key, and each list on one line: there are lists of as many numbers as images."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = indent + "  "
    lines = [f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_text(item, deeper)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
