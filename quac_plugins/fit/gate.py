"""Fitting the gate of a routed prior: a small classifier of degradations on quality features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.prior.routed import Gate, RoutedFDM
from quac_plugins.core.quality.tap import QualityTap

_CLEAN = 100  # clean pictures that the fit aims at
_FOLDS = 5
_CLEAN_KEPT = 0.98  # share of clean pictures that are to pass by all experts
_STEPS = 300
_NOISE = 0.3  # on the standardized q, and
_DROPOUT = 0.3  # strong ones: a hundred images are few for all of q's channels
_WEIGHT_DECAY = 0.3


def fit_gate(
    session: Any, modules: dict[str, nn.Module], kinds: list[str], experts: list[str], seed: int
) -> float | None:
    """Fit the gate that all sites share, and write it into each.

    Clean pictures are those that users have most of, so they get a bar of their own: among gates fitted on other
    images, the lead of the best expert over the identity is measured on clean pictures, and the identity is raised
    until nearly all of them pass by.

    Args:
        session: :class:`quac_plugins.fit.session.Session`.
        modules: the priors by site.
        kinds: degradations that were fitted now; experts that were fitted before stay among the choices.
        experts: names of all, in their order.
        seed: of first weights, noise and folds.

    Returns:
        Share of pictures of images not fitted on that go to the right choice; None of one image alone.
    """
    routed = [module for module in modules.values() if isinstance(module, RoutedFDM)]
    fitted = {name for name, expert in zip(experts, routed[0].experts, strict=True) if not expert.is_fresh}
    kinds = [name for name in experts if name in fitted.union(kinds)]
    draws = session.draws(kinds, 0.0, 1, views=math.ceil(_CLEAN / len(session.few)))
    tap = next(m for m in session.model.modules() if isinstance(m, QualityTap) and m.context is routed[0].context)
    q = torch.cat([_quality(session, tap, pictures) for pictures in (draws.clean, draws.degraded)])
    choice = [experts.index(draws.kinds[kind]) + 1 for kind in draws.kind]
    target = torch.tensor([0] * len(draws.clean) + choice)
    image = torch.tensor([*draws.image, *draws.image[draws.view]])
    choices = len(experts) + 1
    folds = min(_FOLDS, len(session.few))
    order = np.random.default_rng([seed, 2]).permutation(len(session.few))
    leads, right = [], []
    for fold in range(folds if folds > 1 else 0):
        held = torch.isin(image, torch.from_numpy(order[fold::folds].copy()))
        with torch.no_grad():
            logits = _trained(q[~held], target[~held], choices, seed)(q[held])
        leads.append(_lead(logits[target[held] == 0]))
        right.append(logits.argmax(1) == target[held])
    gate = _trained(q, target, choices, seed)
    with torch.no_grad():
        lead = torch.cat(leads) if leads else _lead(gate(q[target == 0]))
        gate.fc2.bias[0] += float(lead.quantile(_CLEAN_KEPT).clamp(min=0))
    for module in routed:
        module.gate.load_state_dict(gate.state_dict())
    return float(torch.cat(right).float().mean()) if right else None


def _quality(session: Any, tap: QualityTap, pictures: np.ndarray) -> Tensor:
    """(N, Q) float32 on the CPU, of pictures (N, H, W, 3) uint8."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(pictures), 32):
            batch = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 32])).to(session.device)
            parts.append(tap.quality(tap.to_rgb(session.normalize(batch))).float().cpu())
    return torch.cat(parts)


def _trained(q: Tensor, target: Tensor, choices: int, seed: int) -> Gate:
    """A gate fitted on q (N, Q) and choices (N,); every choice counts alike, however many pictures it has."""
    counts = torch.bincount(target, minlength=choices).float()
    weight = torch.where(counts > 0, counts.sum() / counts.clamp(min=1) / (counts > 0).sum(), 0.0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gate = Gate(q.shape[1], choices)
        gate.mean.copy_(q.mean(0))
        gate.std.copy_(q.std(0, correction=0).clamp(min=1e-4))
        parameters: Iterable[nn.Parameter] = gate.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        nn.init.normal_(gate.fc2.weight, std=1e-2)
        for _ in range(_STEPS):
            hidden = gate.hidden(q + _NOISE * torch.randn_like(q) * gate.std)
            logits = gate.fc2(F.dropout(hidden, _DROPOUT))
            loss = F.cross_entropy(logits, target, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return gate


def _lead(logits: Tensor) -> Tensor:
    """How far the best expert is before the identity."""
    return logits[:, 1:].max(dim=1).values - logits[:, 0]
