"""The report of a fit: numbers, a file and a figure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quac_plugins.core.files import read_json, write_file
from quac_plugins.fit.confusion import Confusion

REPORT_NAME = "fit_report.json"  # in the folder of the adapter that was fitted

_FEW = 50  # photographs: measured with 10 and with 100, see docs/limits.md

if TYPE_CHECKING:
    import os


@dataclass
class FitReport:
    """The report of :func:`quac_plugins.fit_prior` and :func:`quac_plugins.fit_qacon`.

    Losses are relative: in each term, 1 is the loss of the untouched host on the degraded images.

    Attributes:
        what: ``"prior"`` or ``"qacon"``.
        sites: names of the places where a prior was fitted, or of the activations.
        unfitted: places of a prior that stay the identity, since there are too few images for them.
        kinds: the degradations, in the order of the stages' names.
        stages: stage → its curve (step, loss, held_out), best_step, stopped, the held-out loss of the untouched host
            (first) and of what was kept (best), and the strength that the fitted residual was scaled to at the end; for
            margins also how far logits are from those on clean pictures, before and after they were scaled; a
            loss that was not finite is None.
        gate: where the gate of a routed prior, as it is saved, sends pictures of images that were held out, by
            degradation and severity; else None.
        agreement: degradation, or ``"clean"`` → of the pictures of images that were held out, at all severities, the
            percent whose class is the one that the untouched host finds on the clean picture: ``before`` (the host),
            ``after`` (with what was fitted), and ``n`` of them. Empty where the network returns no logits.
        images: how many images were fitted on, and how many of them held out.
        parameters: how many parameters were fitted.
        multiply_adds: of what was put in, over the host's, for one image; None where it could not be counted.
        chosen: what a budget paid for, in words; empty without one.
        unreadable: files that were left out.
        recipe, seconds, seed: how, how long, and from which seed.
    """

    what: str
    sites: list[str]
    kinds: list[str]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: Confusion | None = None
    agreement: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    multiply_adds: float | None = None
    unreadable: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    seed: int = 0
    unfitted: list[str] = field(default_factory=list)
    chosen: str = ""

    @property
    def held_out(self) -> float:
        """Return the mean over the stages of best held-out loss / untouched host's loss; below 1 is an improvement."""
        known = [(stage["best"], stage["first"]) for stage in _finite(list(self.stages.values()))]
        ratios = [best / first for best, first in known if best is not None and first]
        return sum(ratios) / len(ratios) if ratios else 1.0

    @property
    def stopped(self) -> list[str]:
        """Return the reasons why stages ended early."""
        return [f"{name}: {stage['stopped']}" for name, stage in self.stages.items() if stage["stopped"]]

    @property
    def diverged(self) -> bool:
        """Return whether a stage ended because its loss was not finite; the model then holds the best state before."""
        return any(str(stage["stopped"]).startswith("the loss was") for stage in self.stages.values())

    @property
    def _judged(self) -> str:
        return "held out" if self.images.get("held") else "of the only image, which was fitted on"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return _finite(asdict(self))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; a reader sees the old file or the whole new one."""
        write_file(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> FitReport:
        """Read a file of :meth:`to_json`.

        Raises:
            TypeError, ValueError: the file is no report of a fit.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not the report of a fit")
        gate = values.pop("gate", None)
        # a number: by an earlier version, of another gate than the one that was saved
        return cls(**values, gate=Confusion(**gate) if isinstance(gate, dict) else None)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the held-out loss of every stage against the steps, and the choices of the gate.

        The suffix of the path selects PNG, SVG or PDF.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from quac_plugins.evaluate.plot import require_matplotlib, write_figure

        rows = len(list(self.gate.rows())) if self.gate is not None else 0
        height = max(4, 0.16 * rows + 1.5)
        figure = require_matplotlib()(figsize=(14 if rows else 7, height), layout="constrained")
        axes, *beside = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
        for name, stage in self.stages.items():
            first = stage["first"] or 1
            known = [(entry["step"], entry["held_out"]) for entry in stage["curve"] if entry["held_out"] is not None]
            (line,) = axes.plot([step for step, _ in known], [held / first for _, held in known], label=name)
            if stage["best"] is not None:
                axes.plot(stage["best_step"], stage["best"] / first, "o", color=line.get_color())
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(xlabel="step", ylabel="held-out loss, untouched host = 1", title=f"fit of the {self.what}")
        if len(self.stages) > 1:
            axes.legend(fontsize="x-small", ncols=2)
        for gate_axes in beside:
            _draw_gate(gate_axes, self.gate)
        write_figure(figure, path)

    def __str__(self) -> str:
        """Return the results in a few lines."""
        share = "" if self.multiply_adds is None else f", {self.multiply_adds:.1%} of the host's multiply-adds"
        lines = [
            f"{self.what} after {', '.join(self.sites[:4])}{' …' if len(self.sites) > 4 else ''}: "
            f"{self.parameters} parameters{share}; {self.images.get('all', 0)} images "
            f"({self.images.get('held', 0)} held out), {self.seconds:.0f} s"
        ]
        lines += [f"  {self.chosen}"] * bool(self.chosen)
        lines += [
            f"  {name}: held-out loss {_number(stage['first'])} → {_number(stage['best'])} at step {stage['best_step']}"
            + (f" ({stage['stopped']})" if stage["stopped"] else "")
            for name, stage in self.stages.items()
        ]
        if self.unfitted:
            lines.append(f"  too few images for {', '.join(self.unfitted)}, which stay the identity (least_positions)")
        fitted = self.images.get("all", 0) - self.images.get("held", 0)
        if "margins" in self.stages and fitted < _FEW:
            lines.append(
                f"  {fitted} photographs are few: margins for 15 corruptions lifted tf_efficientnet_lite0 by 4 points "
                "from 10 and lost 5 in noise; from 100 by 19. Judge the network on labelled pictures before it is used"
            )
        if self.gate is not None:
            lines.append(f"  gate, on pictures {self._judged}, of all severities:")
            lines += [f"    {line}" for line in str(self.gate).splitlines()]
        if self.agreement:
            lines.append(f"  pictures {self._judged}, of all severities, that get the class of the clean picture:")
            lines += [f"    {kind}: {_change(change)}" for kind, change in self.agreement.items()]
        return "\n".join(lines)


def _change(change: dict[str, Any]) -> str:
    """Return the percentages before and after, in words."""
    return f"{change['before']:.0f} → {change['after']:.0f} % of {change['n']}"


def _draw_gate(axes: Any, gate: Any) -> None:
    """Draw a table of colours: degradations in rows, choices in columns."""
    rows = list(gate.rows())
    shares = [[count / max(1, sum(row)) for count in row] for _, _, row in rows]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    labels = [kind if level == "0" else f"{kind} {level}" for kind, level, _ in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="x-small")
    axes.set_xticks(range(len(gate.choices)), gate.choices, rotation=90, fontsize="x-small")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share >= 0.005:
                colour = "white" if share > 0.6 else "black"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="xx-small", color=colour)
    where = "held out" if gate.held_out else "fitted on"
    axes.set(title=f"gate: percent of the pictures {where}", xlabel="choice", ylabel="degradation and severity")


def _finite(values: Any) -> Any:
    """Replace every number that is not finite by None, since JSON has no such numbers."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
