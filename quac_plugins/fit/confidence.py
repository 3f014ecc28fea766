"""The confidence of a host with margins: the last margins are scaled until logits are as large as on clean pictures.

Where a degraded picture does not tell the features, a regression leads to their mean: classes keep their order, but
logits shrink, and a right network calls itself unsure. One number for each margin, chosen on pictures that the fit has
not seen, restores the confidence: it scales the host's last norm, and with it the logits, since the network behind the
norm (ReLU, pooling and a classifier) is nearly homogeneous.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.margins import Margin
from quac_plugins.fit.agreement import logits_of
from quac_plugins.fit.session import FitSession
from quac_plugins.fit.training import FEW, evenly

FACTORS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""The factors that may scale a margin; 1 first."""
_MOST = 480  # pictures


def set_confidence(session: FitSession, last: Margin, pictures: Pictures, shares: Tensor) -> dict[str, float] | None:
    """Scale each margin of the last place so that the logits come nearest to the untouched host's on clean pictures.

    Args:
        session: an open session with fitted margins.
        last: the margins of the host's last place.
        pictures: the pictures of the fit. The held-out ones choose the scale; all pictures do, if fewer than four
            photographs are held out.
        shares: (N, R), the share of each margin in each picture; a margin whose column is zero stays.

    Returns:
        The divergence KL(untouched, clean ‖ fitted, degraded) in nats, ``"before"`` and ``"after"``; None if the host
        returns no logits, or nothing was fitted.
    """
    held = pictures.held if pictures.images_of(pictures.held) >= FEW else np.arange(len(pictures.degraded))
    chosen = evenly(held, _MOST)
    weights = shares[chosen].double()
    fitted = (last.table.detach() != 0).any(dim=1).cpu() & (weights.sum(0) > 0)
    views, row = np.unique(pictures.view[chosen], return_inverse=True)
    wanted = logits_of(session, session.teacher, pictures.clean[views])
    if wanted is None or not fitted.any():
        return None
    target, start, ones = wanted[row].log_softmax(1), last.table.detach().clone(), torch.ones(len(fitted))

    def distances(factors: Tensor) -> Tensor:
        """Return the distance (N,) of each picture's logits with scaled margins."""
        _scale(last, start, factors)
        logits = logits_of(session, session.model, pictures.degraded[chosen])
        assert logits is not None
        return F.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)

    of_all = torch.stack([distances(torch.where(fitted, factor * ones, ones)) for factor in FACTORS])
    best = (of_all @ weights).argmin(dim=0)
    before, after = of_all[0].mean().item(), distances(torch.where(fitted, torch.tensor(FACTORS)[best], ones))
    if not after.mean().item() < before:  # together they do other than each
        _scale(last, start, ones)
        after = of_all[0]
    return {"before": before, "after": after.mean().item()}


def _scale(margin: Margin, table: Tensor, factors: Tensor) -> None:
    """Multiply the output of each margin of a table by its factor; a factor of 1 changes no bit."""
    scale, shift = table.chunk(2, dim=1)
    factors = factors.to(table)[:, None]
    with torch.no_grad():
        margin.table.copy_(torch.where(factors == 1, table, torch.cat([factors * (scale + 1) - 1, factors * shift], 1)))
