"""The outcome of each image: gathered from processes, counted, and compared image by image.

Outcomes are an array (images, 2) of integers for each condition: the predicted class, and the rank of the right class
among all, 1 being the first place. An image that could not be read has `UNREAD` twice, one whose output holds a NaN
`NAN` twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quac_plugins.evaluate.data import CLEAN, Item

__all__ = ["NAN", "UNREAD", "interleaved", "judge", "name_of", "outcomes_of", "paired_rows", "scores_of"]

NAN, UNREAD = -1, -2
Condition = tuple[str, int]


def judge(logits: Any, targets: Tensor) -> np.ndarray:
    """Return the outcomes of a batch: int32 (B, 2).

    Raises:
        TypeError: ``logits`` are no tensor (B, C).
        ValueError: a target is none of the classes.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(targets):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must return logits of shape ({len(targets)}, classes), got {what}")
    logits = logits.detach().float().cpu()
    if int(targets.max()) >= logits.shape[1]:
        raise ValueError(f"class index {int(targets.max())} for a model of {logits.shape[1]} classes: give a class map")
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = order.eq(targets[:, None]).int().argmax(dim=1) + 1
    rows = torch.stack([order[:, 0], rank], dim=1)
    rows[logits.isnan().any(dim=1)] = NAN
    return rows.numpy().astype(np.int32)


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Put the shares of N processes together; the first process had the images 0, N, 2N, …."""
    whole = np.empty((sum(map(len, parts)), 2), dtype=np.int32)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole


def scores_of(rows: np.ndarray) -> dict[str, Any]:
    """Return top-1 and top-5 in percent and the number of images that were read."""
    rank = rows[rows[:, 0] != UNREAD, 1]
    hits = [int(((rank >= 1) & (rank <= most)).sum()) for most in (1, 5)]
    first, fifth = (100 * count / len(rank) if len(rank) else None for count in hits)
    return {"top1": first, "top5": fifth, "n": len(rank)}


def name_of(condition: Condition) -> str:
    """Return the name of a condition, such as ``"clean"`` or ``"fog/3"``."""
    return "clean" if condition == CLEAN else f"{condition[0]}/{condition[1]}"


def outcomes_of(items: Mapping[Condition, Sequence[Item]], rows: Mapping[Condition, np.ndarray]) -> dict[str, Any]:
    """Return `EvaluationReport.outcomes`: every image that was read under some condition, sorted by name."""
    outcomes: dict[str, dict[str, tuple[int, int]]] = {}
    targets: dict[str, int] = {}
    for condition, values in rows.items():
        read = outcomes[name_of(condition)] = {}
        for item, (predicted, rank) in zip(items[condition], values.tolist(), strict=True):
            if predicted != UNREAD:
                read[item.key], targets[item.key] = (predicted, rank), item.target
    images = sorted(targets)
    nothing = (None, None)
    return {
        "images": images,
        "targets": [targets[image] for image in images],
        "predicted": {name: [read.get(image, nothing)[0] for image in images] for name, read in outcomes.items()},
        "rank": {name: [read.get(image, nothing)[1] for image in images] for name, read in outcomes.items()},
    }


def paired_rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the outcomes of two reports; see `EvaluationReport.paired`."""
    targets = [dict(zip(part["images"], part["targets"], strict=True)) for part in (first, second)]
    images = [image for image in first["images"] if image in targets[1]]
    differing = [image for image in images if targets[0][image] != targets[1][image]]
    if differing:
        raise ValueError(f"the reports take {differing[0]!r} for different classes; only equal images can be paired")
    names = [name for name in first["rank"] if name in second["rank"]]
    if not images or not names:
        what = "images" if names else "conditions"
        raise ValueError(f"the reports share no {what}, so nothing can be paired")
    gains = {name: _right(first, name, images) - _right(second, name, images) for name in names}
    corruptions = [values for name, values in gains.items() if name != "clean"]
    rows = [{"condition": name, **_interval(values)} for name, values in gains.items()]
    if len(corruptions) > 1:
        rows.append({"condition": "mean of corruptions", **_interval(np.mean(corruptions, axis=0))})
    return rows


def _right(outcomes: Mapping[str, Any], name: str, images: Sequence[str]) -> np.ndarray:
    """Return 1 where the first place is right, 0 where it is wrong, NaN where the image was not read."""
    rank = dict(zip(outcomes["images"], outcomes["rank"][name], strict=True))
    return np.array([math.nan if rank[image] is None else float(rank[image] == 1) for image in images])


def _interval(gains: np.ndarray) -> dict[str, Any]:
    gains = 100 * gains[~np.isnan(gains)]
    n = len(gains)
    if not n:
        return {"difference": None, "low": None, "high": None, "gained": 0, "lost": 0, "n": 0}
    mean = float(gains.mean())
    half = 1.96 * float(gains.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    counts = {"gained": int((gains > 0).sum()), "lost": int((gains < 0).sum()), "n": n}
    return {"difference": mean, "low": mean - half, "high": mean + half, **counts}
