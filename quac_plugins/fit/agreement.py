"""The benefit of a fit, without labels: how often a degraded picture gets the class of the clean one; and its cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.quality.degradation import CLEAN
from quac_plugins.fit.budget import flops_of
from quac_plugins.fit.gate import Drawn
from quac_plugins.fit.session import FitSession

_BATCH = 16


def agreement(session: FitSession, drawn: Drawn) -> dict[str, dict[str, Any]]:
    """Measure how often a network predicts the class that the untouched host predicts for the clean picture.

    Args:
        session: an open session whose modules are fitted.
        drawn: pictures of images that the fit has not seen.

    Returns:
        Degradation, or ``"clean"`` → ``before``: percent of the untouched host, ``after``: percent of the fitted
        network, and ``n``, the number of pictures. Empty for networks that do not return logits (B, classes).
    """
    clean = drawn.view == np.arange(len(drawn.view))
    told = logits_of(session, session.teacher, drawn.pictures[clean])
    before, after = (logits_of(session, network, drawn.pictures) for network in (session.teacher, session.model))
    if told is None or before is None or after is None:
        return {}
    answers = {"before": before.argmax(1).numpy(), "after": after.argmax(1).numpy()}
    classes = told.argmax(1).numpy()
    percents = {}
    for kind in dict.fromkeys(drawn.kind.tolist()):
        of_kind = drawn.kind == kind
        right = classes[drawn.view[of_kind]]
        percents[kind] = {
            "before": round(100 * float((answers["before"][of_kind] == right).mean()), 1) if kind != CLEAN else 100.0,
            "after": round(100 * float((answers["after"][of_kind] == right).mean()), 1),
            "n": int(of_kind.sum()),
        }
    return percents


def logits_of(session: FitSession, network: nn.Module, pictures: np.ndarray) -> Tensor | None:
    """Compute logits (N, K), float64 on the CPU, for pictures uint8 (N, H, W, 3); None without logits."""
    parts, features = [], facts_of(network).gives_features
    with torch.no_grad():
        for start in range(0, len(pictures), _BATCH):
            logits = network(session.images(pictures[start : start + _BATCH]))
            if features or not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
                return None
            parts.append(logits.double().cpu())
    return torch.cat(parts)


def multiply_adds(session: FitSession) -> float | None:
    """Return the multiply-adds of the injected modules over the host's, for one image, by torch's counter, or None."""
    image = session.images(np.zeros((1, *session.photographs.size, 3), dtype=np.uint8))
    try:
        counts = [flops_of(network, image) for network in (session.model, session.teacher)]
    except Exception:  # operations that it does not know; a finished fit is not to be lost over it
        return None
    return counts[0] / counts[1] - 1 if counts[1] else None
