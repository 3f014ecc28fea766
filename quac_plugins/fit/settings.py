"""The settings of a fit, checked and put into a recipe."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, replace
from typing import Any

import torch

from quac_plugins.core.options import whole_number
from quac_plugins.core.prior.recipe import Recipe


def recipe_with(recipe: Recipe | None, settings: dict[str, Any], seed: int, device: torch.device) -> Recipe:
    """Return the recipe with single settings replaced; ValueError for an unknown or wrong setting."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}; single settings go by name (steps=200)")
    base = recipe or Recipe()
    known = set(asdict(base))
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; a recipe has {', '.join(sorted(known))}")
    base = replace(base, **{"seed": base.seed or seed, **settings})
    for name in ("batch_size", "check_every", "near_crop", "near_batch"):
        whole_number(name, getattr(base, name))
    for name in ("steps", "patience", "seed", "least_positions"):
        whole_number(name, getattr(base, name), 0)
    for name in ("site_weight", "deep_weight", "logits_weight", "label_weight", "weight_decay", "least_drift"):
        if not number_from(0, getattr(base, name)):
            raise ValueError(f"{name} must be a number ≥ 0, got {getattr(base, name)!r}")
    for name in ("lr", "clip"):
        if not number_from(0, getattr(base, name)) or not getattr(base, name):
            raise ValueError(f"{name} must be a number above 0, got {getattr(base, name)!r}")
    if not number_from(0, base.near) or base.near > 1:
        raise ValueError(f"near must be from 0 to 1, got {base.near!r}")
    if base.amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp must be 'no', 'bf16' or 'fp16', got {base.amp!r}")
    if base.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16' needs a GPU; use 'bf16' or 'no' on a CPU")
    return base


def number_from(least: float, value: Any) -> bool:
    """Return whether a value is a finite number that is at least ``least``."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and least <= float(value) < math.inf
