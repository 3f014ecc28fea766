"""The gate of a routed prior: fitted where the quality function does not tell the degradations; calibrated; judged.

Users have clean pictures most of all, so the identity's logit is raised until nearly all clean pictures pass by the
experts, but hardly so far that an expert loses its own pictures. The report counts at the very end, with the saved
gate, on pictures of images that neither the gate nor the experts have seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.prior.margins import Margin
from quac_plugins.core.prior.routed import IDENTITY, Gate, RoutedFDM
from quac_plugins.core.quality.degradation import CLEAN
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.degradations import SEVERITIES
from quac_plugins.fit.confusion import Confusion
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.session import FitSession

_LEARNED = 400  # pictures of each kind that a gate is fitted on, over all severities: many more than an expert needs,
_CALIBRATED = 60  # or calibrated on where it needs no fit,
_JUDGED = 60  # and judged on
_MOST_VIEWS = 100  # of an image
_FOLDS = 5
_CLEAN_KEPT = 0.98  # share of clean pictures that are to pass by all experts, and
_CLEAN_LEAST = 0.9  # that pass by in any case; between the two
_OWN_KEPT = 0.6  # an expert keeps so many of its own pictures,
_MOST_LOST = 0.15  # or, where it never had as many, all but these of those that it had
_STEPS = 300
_NOISE = 0.3  # on the standardized features, and
_DROPOUT = 0.3  # strong ones: a few images are few for all of q's channels
_WEIGHT_DECAY = 0.3


@dataclass
class Drawn:
    """Pictures of some images, and the right answers of the gate.

    Attributes:
        pictures: uint8 (N, h, w, 3), the clean pictures first.
        view: int64 (N,), the index of each picture's clean picture.
        kind: (N,) names of degradations, or ``"clean"``.
        severity: int64 (N,).
        image: int64 (N,), the index of each picture's photograph.
    """

    pictures: np.ndarray
    view: np.ndarray
    kind: np.ndarray
    severity: np.ndarray
    image: np.ndarray

    def choices(self, experts: Sequence[str]) -> Tensor:
        """Return the right choice for each picture: 0 for the identity, then the experts."""
        return torch.tensor([experts.index(kind) + 1 if kind in experts else 0 for kind in self.kind.tolist()])


def draw(photographs: Photographs, kinds: list[str], images: list[int], wanted: int) -> Drawn:
    """Draw about ``wanted`` pictures of each kind, of all severities, and as many clean ones."""
    if len(images) > wanted:  # evenly spread
        images = [images[place * len(images) // wanted] for place in range(wanted)]
    views = min(_MOST_VIEWS, math.ceil(wanted / len(images)))
    drawn = photographs.draws(kinds, 0.0, 1, views=views, severities=SEVERITIES, images=images)
    image = np.asarray(images)[drawn.image]
    clean = len(drawn.clean)
    return Drawn(
        pictures=np.concatenate([drawn.clean, drawn.degraded]),
        view=np.concatenate([np.arange(clean), drawn.view]),
        kind=np.array([CLEAN] * clean + [drawn.kinds[kind] for kind in drawn.kind]),
        severity=np.concatenate([np.zeros(clean, np.int64), drawn.severity]),
        image=np.concatenate([image, image[drawn.view]]),
    )


def fit_gate(
    session: FitSession, modules: dict[str, nn.Module], kinds: list[str], experts: list[str]
) -> dict[str, Tensor]:
    """Fit and calibrate the gate that all sites share, and return its state dict.

    Args:
        session: an open session.
        modules: site → prior.
        kinds: the degradations whose experts are fitted.
        experts: the names of all experts, in order.
    """
    photographs, seed = session.photographs, session.photographs.data.seed
    routed = routed_of(modules)
    fresh = _fresh(copy.deepcopy(routed[0].gate))
    drawn = draw(photographs, kinds, photographs.train, _LEARNED if fresh.needs_fit else _CALIBRATED)
    q, target = quality(session, routed[0], drawn.pictures), drawn.choices(experts)
    with torch.no_grad():
        told = fresh, fresh(q)  # the gate that the quality function makes by itself, and its logits
        gate, logits = _learned(fresh, q, target, drawn.image, seed) if fresh.needs_fit else told
        gate.fc2.bias[0] += _raise_of_identity(logits, target)
    return gate.state_dict()


def set_gate(modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    """Write a gate into the prior of every site."""
    for gate in {id(module.gate): module.gate for module in routed_of(modules)}.values():
        gate.load_state_dict(state)


def routed_of(modules: dict[str, nn.Module]) -> list[Any]:
    """Return the priors that have a gate."""
    return [m for m in modules.values() if isinstance(m, RoutedFDM) or (isinstance(m, Margin) and m.gate is not None)]


def judge_gate(session: FitSession, gate: Any, drawn: Drawn, kinds: list[str], experts: list[str]) -> Confusion:
    """Count the first choices of a model's gate for pictures of each kind and severity.

    An expert that was never fitted counts as the identity, which it is.
    """
    with torch.no_grad():
        q = quality(session, gate, drawn.pictures).to(next(gate.gate.parameters()).device)
        answers = gate.gate(q).argmax(1).cpu().numpy()
    answers[np.isin(answers, [place for place in range(1, len(experts) + 1) if not gate.is_trained(place - 1)])] = 0
    counts: dict[str, dict[str, list[int]]] = {}
    for kind in (CLEAN, *kinds):
        for severity in sorted(set(drawn.severity[drawn.kind == kind].tolist())):
            chosen = answers[(drawn.kind == kind) & (drawn.severity == severity)]
            counts.setdefault(kind, {})[str(severity)] = np.bincount(chosen, minlength=len(experts) + 1).tolist()
    return Confusion([IDENTITY, *experts], counts, held_out=bool(session.photographs.held))


def judged_pictures(photographs: Photographs, kinds: list[str]) -> Drawn:
    """Draw pictures of the held-out images; of the only image, if there is one."""
    return draw(photographs, kinds, photographs.held or photographs.train, _JUDGED)


def quality(session: FitSession, module: Any, pictures: np.ndarray) -> Tensor:
    """Compute q (N, Q), float32 on the CPU, of pictures (N, H, W, 3), uint8, as the prior's tap does."""
    tap = next(m for m in session.model.modules() if isinstance(m, QualityTap) and m.context is module.context)
    parts = []
    with torch.no_grad():
        for start in range(0, len(pictures), 32):
            images = session.images(pictures[start : start + 32])
            parts.append(tap.quality(tap.to_rgb(images)).float().cpu())
    return torch.cat(parts)


def _fresh(gate: Gate) -> Gate:
    """Return a copy of the gate without the results of earlier fits."""
    gate = gate.cpu().float()
    with torch.no_grad():
        for tensor in (gate.mean, gate.fc2.weight, gate.fc2.bias):
            tensor.zero_()
        gate.std.fill_(1)
    return gate


def _learned(fresh: Gate, q: Tensor, target: Tensor, image: np.ndarray, seed: int) -> tuple[Gate, Tensor]:
    """Return a gate fitted on all pictures, and the pictures' logits by gates fitted on other images."""
    images = np.unique(image)
    folds = min(_FOLDS, len(images))
    part = np.random.default_rng([seed, 2]).permutation(len(images)) % folds
    fold = torch.from_numpy(part[np.searchsorted(images, image)])
    gate = _trained(fresh, q, target, seed)
    with torch.no_grad():
        if folds < 2:
            return gate, gate(q)
        logits = torch.empty(len(q), fresh.fc2.out_features)
        for index in range(folds):
            is_held = fold == index
            logits[is_held] = _trained(fresh, q[~is_held], target[~is_held], seed)(q[is_held])
    return gate, logits


def _trained(fresh: Gate, q: Tensor, target: Tensor, seed: int) -> Gate:
    """Fit a gate on q (N, Q) and choices (N,); every choice has equal weight, however many pictures it has."""
    choices = fresh.fc2.out_features
    counts = torch.bincount(target, minlength=choices).float()
    weight = torch.where(counts > 0, counts.sum() / counts.clamp(min=1) / (counts > 0).sum(), 0.0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        gate = copy.deepcopy(fresh).requires_grad_(True)
        gate.fc1.reset_parameters()
        features = gate.features(q)
        told = gate.told(q) if gate.masses else 0.0
        gate.mean.copy_(features.mean(0))
        gate.std.copy_(features.std(0, correction=0).clamp(min=1e-4))
        optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        nn.init.normal_(gate.fc2.weight, std=1e-2)
        for _ in range(_STEPS):
            hidden = gate.hidden(features + _NOISE * torch.randn_like(features) * gate.std)
            logits = gate.fc2(F.dropout(hidden, _DROPOUT)) + told
            loss = F.cross_entropy(logits, target, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return gate.requires_grad_(False)


def _raise_of_identity(logits: Tensor, target: Tensor) -> float:
    """Return the number to add to the identity's logit, from logits (N, 1 + E) and right choices (N,)."""
    best = logits[:, 1:].max(dim=1)
    lead = best.values - logits[:, 0]
    wanted, least_wanted = (float(lead[target == 0].quantile(share)) for share in (_CLEAN_KEPT, _CLEAN_LEAST))
    for choice in range(1, logits.shape[1]):
        is_right = target == choice
        reached = lead[is_right & (best.indices == choice - 1) & (lead > 0)].sort(descending=True).values
        least = math.ceil(min(_OWN_KEPT * int(is_right.sum()), (1 - _MOST_LOST) * len(reached)))
        if least:
            wanted = min(wanted, float(reached[least - 1]) - 1e-4)
    return max(0.0, wanted, least_wanted)
