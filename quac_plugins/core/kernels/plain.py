"""The equations, plain: the functional twins of the modules.

All take x and per-channel parameters that broadcast against it ((1, C, 1, 1) or (B, C, 1, 1) for NCHW), compute half
precision in float32 and return the dtype of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def _wide(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Return x and its parameters in one dtype, wide enough that β·d cannot overflow."""
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    return tuple(t.to(dtype) for t in (x, *parameters))


def acon(x: Tensor, p1: Tensor, p2: Tensor, beta: Tensor) -> Tensor:
    """Compute ACON: y = d·σ(β d) + p2·x with d = (p1 − p2)·x.

    Source: Ma et al., "Activate or Not: Learning Customized Activation", CVPR 2021, eq. (6). p1 = 1, p2 = 0, β = 1 is
    SiLU; β → ∞ is max(p1 x, p2 x).

    Args:
        x: any shape, floating point.
        p1, p2, beta: broadcastable against x.

    Returns:
        Shape and dtype of x.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> torch.allclose(acon(x, one, zero, one), torch.nn.functional.silu(x))
        True
    """
    wide, p1, p2, beta = _wide(x, p1, p2, beta)
    d = (p1 - p2) * wide
    return (d * torch.sigmoid(beta * d) + p2 * wide).to(x.dtype)


def swish(x: Tensor, beta: Tensor) -> Tensor:
    """Compute Swish with a slope: y = x·σ(β x) (Ramachandran et al., 2017). β = 1 is SiLU.

    Example:
        >>> import torch
        >>> swish(torch.tensor([1.0]), torch.tensor([0.0])).item()
        0.5
    """
    wide, beta = _wide(x, beta)
    return (wide * torch.sigmoid(beta * wide)).to(x.dtype)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Compute PReLU: y = x for x ≥ 0, slope·x below (He et al., 2015). The slope may vary by image and channel.

    Example:
        >>> import torch
        >>> prelu(torch.tensor([-2.0, 3.0]), torch.tensor([0.25])).tolist()
        [-0.5, 3.0]
    """
    wide, slope = _wide(x, slope)
    return torch.where(wide >= 0, wide, slope * wide).to(x.dtype)


def gelu(x: Tensor, beta: Tensor) -> Tensor:
    """Compute GELU with a slope in its gate: y = x·Φ(β x), Φ the normal distribution function. β = 1 is GELU.

    Source: Hendrycks & Gimpel, 2016.

    Example:
        >>> import torch
        >>> x = torch.linspace(-3, 3, 7)
        >>> torch.allclose(gelu(x, torch.ones(1)), torch.nn.functional.gelu(x), atol=1e-6)
        True
    """
    wide, beta = _wide(x, beta)
    return (wide * (0.5 * (1 + torch.erf(beta * wide * math.sqrt(0.5))))).to(x.dtype)


def global_average(x: Tensor, channel_dim: int = 1) -> Tensor:
    """Average x over all axes but batch (axis 0) and channels: (B, C), at least float32.

    Example:
        >>> import torch
        >>> global_average(torch.ones(2, 3, 4, 4)).shape, global_average(torch.ones(2, 7, 3), -1).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    channel = channel_dim % x.ndim
    axes = [axis for axis in range(1, x.ndim) if axis != channel]
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    if not axes:
        return x.to(dtype)
    # not mean(): its backward writes a tensor as large as x, that of a sum a view
    return x.sum(dim=axes, dtype=dtype) / math.prod([x.shape[axis] for axis in axes])


def per_channel(values: Tensor, x: Tensor, channel_dim: int = 1) -> Tensor:
    """Reshape (C,) or (B, C) values so that they broadcast along the channel axis of x."""
    channel = channel_dim % x.ndim
    shape = [1] * x.ndim
    shape[channel] = -1
    if values.ndim == 2:
        shape[0] = values.shape[0]
        shape[channel] = values.shape[1]
    return values.reshape(shape)


__all__ = ["acon", "gelu", "global_average", "per_channel", "prelu", "swish"]
