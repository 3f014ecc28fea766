"""The choices of a routed prior's gate: a table by degradation and severity, the identity included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_STARVED = 0.5
_DISTURBED = 0.8


@dataclass(frozen=True)
class Confusion:
    """The numbers of pictures of each degradation and severity by the gate's first choice.

    Attributes:
        choices: ``"identity"`` and the experts.
        counts: degradation, or ``"clean"`` → severity, as a string → the number of pictures for each choice.
        held_out: whether the pictures are of images that the fit has not seen.

    Example:
        >>> table = Confusion(["identity", "fog"], {"clean": {"0": [9, 1]}, "fog": {"1": [4, 1], "5": [0, 5]}})
        >>> table.share("clean"), table.share("fog"), table.share("fog", "1"), table.starved
        (0.9, 0.6, 0.2, [])
        >>> print(table)
        clean: 90 % left alone, 10 % taken for fog
        fog: 60 % to its expert (severity 1: 20, 5: 100), 40 % left alone
    """

    choices: list[str]
    counts: dict[str, dict[str, list[int]]]
    held_out: bool = True

    def share(self, kind: str, severity: str | None = None, choice: str | None = None) -> float:
        """Return the share of a degradation's pictures that go to a choice; None: to the right choice."""
        rows = [row for level, row in self.counts[kind].items() if severity in (None, level)]
        index = self.choices.index(choice or self._own(kind))
        return sum(row[index] for row in rows) / max(1, sum(map(sum, rows)))

    def _own(self, kind: str) -> str:
        return kind if kind in self.choices else self.choices[0]

    @property
    def judged(self) -> str:
        """Return whether the pictures are held out, in words."""
        return "held-out" if self.held_out else "fitted"

    @property
    def starved(self) -> list[str]:
        """Return the degradations of whose pictures fewer than half reach their expert."""
        return [kind for kind in self.counts if kind in self.choices and self.share(kind) < _STARVED]

    def taken_for(self, kind: str) -> tuple[str, float]:
        """Return the wrong choice that gets most of a degradation's pictures, and its share."""
        others = {c: self.share(kind, choice=c) for c in self.choices if c != self._own(kind)}
        return max(others.items(), key=lambda item: item[1])

    def rows(self) -> Iterator[tuple[str, str, list[int]]]:
        """Yield degradation, severity and counts."""
        for kind, levels in self.counts.items():
            for level, row in levels.items():
                yield kind, level, row

    def warnings(self) -> list[str]:
        """Return the faults of the gate, each with a remedy, in a sentence or two."""
        faults = []
        for kind in self.starved:
            choice, share = self.taken_for(kind)
            where = "are left alone" if choice == self.choices[0] else f"go to the expert for {choice}"
            faults.append(
                f"the gate sends only {_percent(self.share(kind))} of the {self.judged} pictures of {kind} to their "
                f"expert; {_percent(share)} {where}. For such pictures this adapter does little. Fit on more "
                "photographs, or leave out one of two degradations that look alike; if all your pictures are degraded "
                "so, fit a prior for this one alone (PriorConfig() without experts, or --single on the command line)"
            )
        for kind in self.counts:
            if kind not in self.choices and self.share(kind) < _DISTURBED:
                choice, share = self.taken_for(kind)
                faults.append(
                    f"the gate leaves only {_percent(self.share(kind))} of the {self.judged} clean pictures alone; "
                    f"{_percent(share)} go to the expert for {choice}. Fit on more photographs that are as your good "
                    f"pictures are (size, compression), or leave {choice} out"
                )
        return faults

    def __str__(self) -> str:
        """Return a line for each degradation."""
        lines = []
        for kind, levels in self.counts.items():
            where = "to its expert" if kind in self.choices else "left alone"
            text = f"{kind}: {_percent(self.share(kind))} {where}"
            if len(levels) > 1:
                shares = [f"{level}: {100 * self.share(kind, level):.0f}" for level in levels]
                text += f" (severity {', '.join(shares)})"
            choice, share = self.taken_for(kind)
            if share:
                text += f", {_percent(share)} " + ("left alone" if choice == self.choices[0] else f"taken for {choice}")
            lines.append(text)
        return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
