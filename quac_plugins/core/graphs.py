"""Graphs that run elsewhere: whether one is being made, and in plain operations what their formats have no word for."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

# of Stirling's series: B(2k) / (2k (2k - 1))
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
_SHIFT = 16


def compiling() -> bool:
    """Return whether this thread runs code to compile or export it; torch's own flag is set for all threads.

    An export that runs the code itself lets every new tensor of its thread be one without data.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and type(torch.empty(0)) is not Tensor


def in_graph() -> bool:
    """Return whether a graph is being made (compiled, exported, traced): sizes may be symbols, values are unknown."""
    return compiling() or torch.jit.is_tracing()


def exporting() -> bool:
    """Return whether a graph is being made by torch.export, torch.jit.trace or torch.onnx.export, to leave the process.

    ONNX knows neither the logarithm of the gamma function nor searches.
    """
    # torch 2.6 does not tell an export from a compilation
    captured = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return (captured and compiling()) or torch.jit.is_tracing()


def without_grad() -> AbstractContextManager[object]:
    """Return ``torch.no_grad()``, or an empty context in an export: saved programs with such regions do not load."""
    return nullcontext() if exporting() else torch.no_grad()


def called_whole(module: nn.Module, x: Any, *others: Any) -> Any:
    """Return a torch.fx node that calls the module as a leaf if x is a proxy of torch.fx, else None."""
    if not isinstance(x, Proxy):
        return None
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *others), {})


def log_gamma(z: Tensor) -> Tensor:
    """Compute log Γ(z) of z > 0 by Stirling's series at z + 16, to 1e-13 in float64.

    Example:
        >>> log_gamma(torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)).exp().round(decimals=9).tolist()
        [9.513507699, 1.0, 24.0]
    """
    if not exporting():
        return torch.lgamma(z)
    far = z + _SHIFT
    inverse = 1.0 / (far * far)
    series = torch.zeros_like(far)
    for coefficient in reversed(_STIRLING):
        series = series * inverse + coefficient
    skipped = (z[..., None] + torch.arange(_SHIFT, device=z.device)).log().sum(-1)
    return (far - 0.5) * far.log() - far + 0.5 * math.log(2 * math.pi) + series / far - skipped


def count_up_to(ascending: Tensor, values: Tensor) -> Tensor:
    """Count the sorted numbers (N,) that are not above each value: ``torch.searchsorted(…, right=True)`` for exports.

    Example:
        >>> count_up_to(torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 9.0])).tolist()
        [0, 3, 4]
    """
    if not exporting():
        return torch.searchsorted(ascending, values, right=True)
    return (ascending <= values[..., None]).sum(-1)
