"""What a fit is good for, without labels: how often a degraded picture gets the class that the clean one gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.quality.degradation import CLEAN
from quac_plugins.fit.gate import Drawn

_BATCH = 16


def agreement(session: Any, drawn: Drawn) -> dict[str, dict[str, Any]]:
    """Share of the pictures whose predicted class is that of the untouched host on the clean picture.

    Args:
        session: :class:`quac_plugins.fit.session.Session`, with what was fitted in its final state.
        drawn: pictures of images that were not fitted on.

    Returns:
        Degradation, or ``"clean"`` → ``before``: percent of the untouched host, ``after``: percent of the fitted
        network, and ``n``, the number of pictures. Empty for networks that do not return logits (B, classes).
    """
    clean = drawn.view == np.arange(len(drawn.view))
    told = _classes(session, session.teacher, drawn.pictures[clean])
    if told is None:
        return {}
    before, after = (_classes(session, net, drawn.pictures) for net in (session.teacher, session.model))
    found = {}
    for kind in dict.fromkeys(drawn.kind.tolist()):
        here = drawn.kind == kind
        right = told[drawn.view[here]]
        found[kind] = {
            "before": round(100 * float((before[here] == right).mean()), 1) if kind != CLEAN else 100.0,
            "after": round(100 * float((after[here] == right).mean()), 1),
            "n": int(here.sum()),
        }
    return found


def _classes(session: Any, network: nn.Module, pictures: np.ndarray) -> Any:
    """The predicted classes (N,); None if the network returns no logits."""
    found = []
    with torch.no_grad():
        for start in range(0, len(pictures), _BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(pictures[start : start + _BATCH])).to(session.device)
            logits = network(session.normalize(batch))
            features = getattr(network, "num_classes", None) == 0  # of a host of timm without its classifier
            if features or not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
                return None
            found.append(logits.argmax(1).cpu().numpy())
    return np.concatenate(found)
