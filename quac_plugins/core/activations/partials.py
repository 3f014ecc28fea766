"""The equations' derivatives: what a fused backward pass needs beside x.

``PARTIALS[equation](x, *parameters)`` gives ∂y/∂x and a tuple of ∂y/∂parameter, each elementwise and broadcastable.
An equation of :mod:`reference` that has an entry here gets a fused kernel; one that has none is used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quac_plugins.core.activations import reference

Partials = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def _acon(x: Tensor, p1: Tensor, p2: Tensor, beta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    d = (p1 - p2) * x
    gate = torch.sigmoid(beta * d)
    slope = gate * (1 - gate)
    by_d = gate + beta * d * slope
    return (p1 - p2) * by_d + p2, (x * by_d, x - x * by_d, d * d * slope)


def _swish(x: Tensor, beta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    gate = torch.sigmoid(beta * x)
    slope = x * gate * (1 - gate)
    return gate + beta * slope, (x * slope,)


def _prelu(x: Tensor, slope: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    # at 0 as automatic differentiation has it: the branch x ≥ 0
    return torch.where(x >= 0, 1.0, slope), (torch.where(x >= 0, 0.0, x),)


def _gelu(x: Tensor, beta: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    z = beta * x
    density = x * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + beta * density, (x * density,)


PARTIALS: dict[str, Partials] = {"acon": _acon, "swish": _swish, "prelu": _prelu, "gelu": _gelu}


def equation_of(name: str) -> Callable[..., Tensor]:
    """The plain equation of a name in ``PARTIALS``."""
    return getattr(reference, name)
