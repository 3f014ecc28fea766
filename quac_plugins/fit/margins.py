"""Fitting margins: statistics first, which need no gradient, then distillation of the untouched host's clean answers.

In the first part of the distillation the true degradation of each picture chooses the margins, so that each margin
learns from its own pictures; in the rest the calibrated gate chooses, as in use, for clean pictures too, so that the
margins fit the gate's choices. Margins of all places learn at once; margins of other degradations stay.

A few photographs are few examples of each degradation, but degradations change a network in similar ways. So a margin
is fitted as a sum of parts, common to all degradations, to a group (noise, blur, …), to the severities of one
degradation, and of its own; each picture then teaches every part that it concerns. At the end the host's confidence is
restored (:mod:`quac_plugins.fit.confidence`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.fdm import FDM
from quac_plugins.core.prior.margins import SEVERITIES, Margin, margins_inside, spread
from quac_plugins.core.prior.matching import match
from quac_plugins.degradations import GROUPS
from quac_plugins.fit.confidence import set_confidence
from quac_plugins.fit.draws import Draws
from quac_plugins.fit.photographs import digest_of
from quac_plugins.fit.session import FitSession
from quac_plugins.fit.training import Fit, run_stage

STATISTICS = "statistics"
_ENOUGH = 32  # pictures of each degradation that statistics are taken of, where there are fewer photographs
_MOST_VIEWS = 4
_TOLD = 0.6  # share of the steps in which the margins are told the degradation
CLEAN = 0.1  # share of clean pictures
_MIDDLE = 3.0  # severity of degradations that have none


def fit_margins(
    session: FitSession,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    experts: list[str],
    draws: Draws,
    pictures: Pictures,
) -> None:
    """Fit the margins of the session's degradations, and the FDMs around them; margins of other degradations stay.

    Args:
        session: an open session.
        modules: site → margins or FDM.
        parameters: the fitted parameters by name.
        experts: names of all margins, in order; empty: there is a single margin.
        draws: the degraded pictures with their degradations.
        pictures: the same pictures, split.
    """
    recipe, keep, kinds = session.recipe, session.keep, session.photographs.data.kinds
    margins = [module for module in modules.values() if isinstance(module, Margin)]
    inner = [margin for module in modules.values() for margin in margins_inside(module)]
    of = f"{digest_of(pictures)} {kinds}" if keep.folder is not None else ""
    start = session.processes.of_main(lambda: keep.load(STATISTICS, of))
    if start is None:
        _statistics(session, margins, experts)
        state = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        keep.save(STATISTICS, state, of)
    else:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
    names = np.array([*draws.kinds, "clean"])[draws.kind]
    mixture = margins[0].shared
    shares = torch.ones(len(names), 1)
    if mixture is not None:
        severity = torch.from_numpy(draws.severity).float()
        severity[severity == 0] = _MIDDLE
        went = torch.from_numpy(names[:, None] == np.array(experts)).float()
        shares = spread(went, severity if mixture.severity is not None else None)
    fit: Fit

    @contextlib.contextmanager
    def told(indices: np.ndarray) -> Iterator[None]:
        if mixture is None or fit.step >= _TOLD * recipe.steps:
            yield
            return
        mixture.given = shares[indices].to(session.device)
        try:
            yield
        finally:
            mixture.given = None

    tables = [margin.table for margin in (*margins, *inner)]
    shared = _shared(kinds, experts, mixture.kept) if mixture is not None else torch.ones(1, 0)
    fitted = shared.any(dim=1) if mixture is not None else torch.ones(1, dtype=torch.bool)
    rows = torch.cat([fitted, torch.ones(shared.shape[1], dtype=torch.bool)])
    column = rows.to(session.device)[:, None]
    hooks = [table.register_hook(lambda gradient: gradient * column) for table in tables]
    try:
        for margin in (*margins, *inner):
            sums = _Sums(shared.to(margin.table), fitted.to(session.device))
            parametrize.register_parametrization(margin, "table", sums, unsafe=True)
        scaled: dict[nn.Parameter, Tensor | None] = dict.fromkeys(tables, rows)
        for fdm in (module for module in modules.values() if isinstance(module, FDM) and module not in margins):
            scaled |= {p: None for p in fdm.body[-1].parameters(False) if any(p is q for q in parameters.values())}
        fit = Fit(session.compare(pictures, during=told), parameters, session.processes, scaled)
        run_stage(session, "margins", fit)
    finally:
        for hook in hooks:
            hook.remove()
        for margin in (*margins, *inner):
            if parametrize.is_parametrized(margin, "table"):
                parametrize.remove_parametrizations(margin, "table")
    confidence = set_confidence(session, margins[-1], pictures, shares)
    if confidence is not None:
        session.report.stages["margins"]["confidence"] = confidence


def _shared(kinds: list[str], experts: list[str], kept: int) -> Tensor:
    """Return a matrix (R, parts) with ones where a fitted margin has a part in common with others.

    Args:
        kinds: the fitted degradations.
        experts: all degradations, in order.
        kept: the number of rows of each degradation.
    """
    names = [name for name in experts for _ in range(kept)]
    groups = [set(kinds), *({*kinds} & {*group} for group in GROUPS.values()), *({kind} for kind in kinds if kept > 1)]
    return torch.tensor([[float(name in group) for group in groups] for name in names])


class _Sums(nn.Module):
    """A table of margins, whose fitted rows are sums of a row of their own and of shared rows."""

    shared: Tensor
    fitted: Tensor

    def __init__(self, shared: Tensor, fitted: Tensor):
        super().__init__()
        self.register_buffer("shared", shared)
        self.register_buffer("fitted", fitted)

    def forward(self, parts: Tensor) -> Tensor:
        """Compute the table (R, 2·C) from its parts."""
        single, common = parts.split([len(self.shared), self.shared.shape[1]])
        return torch.where(self.fitted[:, None], single + self.shared @ common, single)

    def right_inverse(self, table: Tensor) -> Tensor:
        """Return the parts of a table: its rows, and zeros for the shared rows."""
        return torch.cat([table, table.new_zeros(self.shared.shape[1], table.shape[1])])


def _statistics(session: FitSession, margins: Sequence[Margin], experts: list[str]) -> None:
    """Set every margin by the statistics of its degradation."""
    photographs, kinds = session.photographs, session.photographs.data.kinds
    views = min(_MOST_VIEWS, max(1, round(_ENOUGH / len(photographs.train))))
    mixture = margins[0].shared
    kept = mixture.kept if mixture is not None else 1

    def draws(of: list[str], severity: float | None) -> Any:
        levels = [int(severity)] if severity is not None and kept > 1 else photographs.data.levels or None
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
            session.show(STATISTICS, place + 1, len(kinds), 0.0)

    match(session.model, list(margins), draws(kinds[:1], SEVERITIES[0]).clean, degraded(), session.images)
