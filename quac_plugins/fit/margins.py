"""Fitting margins: statistics first, which need no gradient, then distillation of the untouched host's clean answers.

In the first part of the distillation the margins are told which degradation each picture went through, so that each
learns from its own; in the rest the gate says so, as it will in use, clean pictures among them: margins are then right
for what the gate does, which itself stays as it was calibrated. Every margin of every place learns at once; those of
degradations that are not fitted stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from quac_plugins.core.prior.margins import SEVERITIES, Margin, spread
from quac_plugins.core.prior.matching import match
from quac_plugins.fit.loop import Fit, run_stage
from quac_plugins.fit.photographs import digest_of
from quac_plugins.fit.student import Student

STATISTICS = "statistics"
_ENOUGH = 32  # pictures of each degradation that statistics are taken of, where there are fewer photographs
_MOST_VIEWS = 4
_TOLD = 0.6  # share of the steps in which the margins are told the degradation
_CLEAN = 0.1  # share of clean pictures
_MIDDLE = 3.0  # severity of degradations that have none


def fit_margins(
    student: Student,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    experts: list[str],
    per_view: int,
) -> None:
    """Fit the margins of these degradations, those of others staying as they are.

    Args:
        student: open.
        modules: the margins by site.
        parameters: of the margins, by name.
        experts: names of all margins, in their order; empty: there is a single one.
        per_view: degraded pictures of each view and degradation.
    """
    photographs, recipe, keep = student.photographs, student.recipe, student.keep
    kinds, clean_share = photographs.data.kinds, photographs.data.clean_share
    margins = [module for module in modules.values() if isinstance(module, Margin)]
    draws = photographs.draws(kinds, _CLEAN if clean_share is None else clean_share, per_view)
    pictures = photographs.split(draws)
    of = f"{digest_of(pictures)} {kinds}" if keep.folder is not None else ""
    start = student.processes.of_main(lambda: keep.load(STATISTICS, of))
    if start is None:
        _statistics(student, margins, experts)
        state = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        keep.save(STATISTICS, state, of)
    else:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
    names = np.array([*draws.kinds, "clean"])[draws.kind]
    mixture = margins[0].shared
    fit: Fit

    @contextlib.contextmanager
    def told(indices: np.ndarray) -> Iterator[None]:
        if mixture is None or fit.step >= _TOLD * recipe.steps:
            yield
            return
        chosen = torch.zeros(len(indices), len(experts))
        for row, name in enumerate(names[indices]):
            if name in experts:
                chosen[row, experts.index(name)] = 1
        severity = torch.from_numpy(draws.severity[indices]).float()
        severity[severity == 0] = _MIDDLE
        given = spread(chosen, severity if mixture.severity is not None else None).to(student.device)
        mixture.given = given
        try:
            yield
        finally:
            mixture.given = None

    tables = [margin.table for margin in margins]
    rows = torch.zeros(len(tables[0]), dtype=torch.bool)
    for place in [experts.index(kind) for kind in kinds] if experts else [0]:
        kept = mixture.kept if mixture is not None else 1
        rows[place * kept : (place + 1) * kept] = True
    fit = Fit(student.compare(pictures, during=told), parameters, student.processes, scaled=tables, rows=rows)
    column = rows.to(student.device)[:, None]
    hooks = [table.register_hook(lambda gradient: gradient * column) for table in tables]
    try:
        run_stage(student, "margins", fit)
    finally:
        for hook in hooks:
            hook.remove()


def _statistics(student: Student, margins: Sequence[Margin], experts: list[str]) -> None:
    """Every margin from the statistics of its degradation."""
    photographs, kinds = student.photographs, student.photographs.data.kinds
    views = min(_MOST_VIEWS, max(1, round(_ENOUGH / len(photographs.train))))
    mixture = margins[0].shared
    kept = mixture.kept if mixture is not None else 1

    def draws(of: list[str], severity: float | None) -> Any:
        levels = [int(severity)] if severity is not None and kept > 1 else photographs.data.severities or None
        return photographs.draws(of, 0.0, 1, views=views, severities=levels, images=photographs.train)

    def degraded() -> Iterator[tuple[int, np.ndarray]]:
        for place, kind in enumerate(kinds if experts else [""]):
            first = experts.index(kind) * kept if experts else 0
            for offset, severity in enumerate(SEVERITIES[:kept]):
                drawn = draws([kind] if experts else kinds, severity)
                # a single margin for several degradations: each picture went through one of them
                rows = np.arange(len(drawn.clean)) * (len(drawn) // len(drawn.clean))
                rows += np.arange(len(rows)) % (len(drawn) // len(drawn.clean))
                yield first + offset, drawn.degraded[rows]
            student.show(STATISTICS, place + 1, len(kinds), 0.0)

    match(student.model, list(margins), draws(kinds[:1], SEVERITIES[0]).clean, degraded(), student.images)
