"""Fused activations: one read and one write of x, and x alone kept for backward.

What the kernels must do, and how:

1. **one pass**: y = host(x) + f(x; θ) − f(x; θ⁰), or f(x; θ) alone, is one expression, which torch's own compiler makes
   a loop of (C++ on a CPU, Triton on a GPU); backward computes the gradient of x and the sums for θ in one more.
2. **any layout**: NCHW as rows with a number each, channels_last and tokens as columns; other strides are copied.
3. **half precision** is computed in float32, as in :mod:`reference`.
4. **an operator** of torch.library, ``quac_plugins::activate``, so that graphs may hold it; its derivatives are written
   in :mod:`partials`. Derivatives of derivatives use the plain expression.
5. **no compiler, no error**: without one the same expression runs operation by operation, and still keeps x alone.
6. Graphs that are being compiled, exported or traced get the plain expression, which their compiler fuses with its
   neighbours.

``QUAC_KERNELS=reference`` never uses them, ``fused`` always; else they are used from ``MIN_NUMBERS`` numbers on, since
below a call costs more than it saves. The first call of a layout and dtype compiles for some seconds; torch keeps the
result on disk.
"""

from __future__ import annotations

import math
import os
import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations.partials import PARTIALS, equation_of

CHOICES = ("auto", "reference", "fused")
MIN_NUMBERS = 1 << 20
HOSTS: dict[type[nn.Module], str] = {nn.Identity: "identity", nn.ReLU: "relu"}
"""Host activations that are computed inside the kernel, to the bit; others are computed before."""


def kernels_choice() -> str:
    """``QUAC_KERNELS``: ``"auto"``, ``"reference"`` or ``"fused"``.

    Raises:
        ValueError: it is something else.

    Example:
        >>> kernels_choice() in CHOICES
        True
    """
    choice = os.environ.get("QUAC_KERNELS", "auto") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"QUAC_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def use_fused(equation: Any, x: Tensor) -> bool:
    """Whether the fused kernel computes this equation of x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return False
    choice = kernels_choice()
    if choice == "reference" or getattr(equation, "__name__", "") not in PARTIALS:
        return False
    if equation is not equation_of(equation.__name__) or x.dtype not in _COMPUTED:
        return False
    if choice == "fused":
        return True
    # subclasses and transforms (fake tensors, fx proxies, vmap, grad) see the plain expression
    plain = type(x) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.device.type in ("cpu", "cuda") and x.numel() >= MIN_NUMBERS


def fused(
    equation: Callable[..., Tensor],
    x: Tensor,
    parameters: tuple[Tensor, ...],
    channel_dim: int = 1,
    start: tuple[float, ...] = (),
    host: str = "",
) -> Tensor:
    """f(x; θ), or with ``start`` host(x) + f(x; θ) − f(x; θ⁰).

    Args:
        equation: one of :mod:`reference` that has its derivatives in :mod:`partials`.
        x: floating point, channels at ``channel_dim``.
        parameters: θ, each broadcastable against x and constant along all but batch and channels.
        start: θ⁰, a number each.
        host: a value of ``HOSTS``; ``""``: nothing is added.

    Returns:
        Shape and dtype of x.

    Example:
        >>> from quac_plugins.core.activations.reference import swish
        >>> fused(swish, torch.ones(2, 3, 4, 4), (torch.zeros(1, 3, 1, 1),)).unique().item()
        0.5
    """
    batch, channels = x.shape[0], x.shape[channel_dim]
    wide = _COMPUTED[x.dtype]
    rows = [_rows(p, x, channel_dim).to(wide).expand(batch, channels) for p in parameters]
    return torch.ops.quac_plugins.activate(x, torch.stack(rows, 1), equation.__name__, channel_dim, list(start), host)


_COMPUTED = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32,
    torch.float64: torch.float64,
}  # fmt: skip


def _rows(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A parameter that broadcasts against x, as (1 or B, 1 or C)."""
    channel = channel_dim % x.ndim
    shape = (1,) * (x.ndim - parameter.ndim) + tuple(parameter.shape)
    return parameter.reshape(shape[0] if channel else 1, shape[channel])


# -- layouts


def _as_rows(x: Tensor, channel_dim: int) -> bool:
    """Whether the numbers of a channel lie together."""
    return channel_dim % x.ndim == 1 and x.ndim > 2 and not _channels_last(x)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, channel_dim: int) -> Tensor:
    """Without gaps, in one of the layouts that the kernels know."""
    return x if channel_dim % x.ndim == 1 and _channels_last(x) else x.contiguous()


def _flat(x: Tensor, channel_dim: int) -> Tensor:
    """A dense x as (B·C, 1, N) of rows, or (B, M, N, C) of columns."""
    if _as_rows(x, channel_dim):
        return x.reshape(x.shape[0] * x.shape[1], 1, math.prod(x.shape[2:]))
    last = x.permute(0, 2, 3, 1) if channel_dim % x.ndim == 1 and x.ndim == 4 else x
    middle = math.prod(last.shape[2:-1]) if last.ndim > 3 else 1
    return last.reshape(last.shape[0], last.shape[1] if last.ndim > 2 else 1, middle, last.shape[-1])


def _theta(theta: Tensor, by_rows: bool) -> list[Tensor]:
    """θ (B, P, C) as P tensors that broadcast against :func:`_flat`."""
    shape = (-1, 1, 1) if by_rows else (theta.shape[0], 1, 1, theta.shape[2])
    return [part.reshape(shape) for part in theta.unbind(1)]


# -- expressions, over the flat forms


def _value(name: str, x: Tensor, theta: list[Tensor], start: list[float], host: str) -> Tensor:
    wide = x.to(_COMPUTED[x.dtype])
    y = equation_of(name)(wide, *theta)
    if start:
        y = y - equation_of(name)(wide, *(torch.full((1,), v, dtype=wide.dtype, device=x.device) for v in start))
    if host == "relu":
        y = wide.relu() + y
    elif host == "identity":
        y = wide + y
    return y.to(x.dtype)


def _gradients(
    name: str, grad: Tensor, x: Tensor, theta: list[Tensor], start: list[float], host: str
) -> tuple[Tensor, list[Tensor]]:
    """Of flat x, and of θ still to be summed."""
    wide, grad = x.to(_COMPUTED[x.dtype]), grad.to(_COMPUTED[x.dtype])
    by_x, by_theta = PARTIALS[name](wide, *theta)
    if start:
        full = (torch.full((1,), v, dtype=wide.dtype, device=x.device) for v in start)
        by_x = by_x - PARTIALS[name](wide, *full)[0]
    if host == "relu":
        by_x = by_x + (wide > 0).to(wide.dtype)
    elif host == "identity":
        by_x = by_x + 1
    return (grad * by_x).to(x.dtype), [grad * part for part in by_theta]


def _summed(parts: list[Tensor], by_rows: bool) -> Tensor:
    """Over everything but batch and channels: rows (B·C, P), columns (B, C, P)."""
    return torch.stack([part.sum((1, 2)) if by_rows else part.sum(2).sum(1) for part in parts], -1)


@cache
def _compiled(name: str, by_rows: bool, dtype: torch.dtype, start: tuple[float, ...], host: str, back: bool) -> Any:
    """A loop of one expression; each has a code object of its own, by which torch.compile counts its variants."""
    if back:

        def expression(grad: Tensor, x: Tensor, *theta: Tensor) -> tuple[Tensor, Tensor]:
            by_x, parts = _gradients(name, grad, x, list(theta), list(start), host)
            return by_x, _summed(parts, by_rows)
    else:

        def expression(x: Tensor, *theta: Tensor) -> Tensor:  # type: ignore[misc]
            return _value(name, x, list(theta), list(start), host)

    own = types.FunctionType(
        expression.__code__.replace(), globals(), expression.__name__, None, expression.__closure__
    )
    return _Loop(own)


class _Loop:
    """A function, compiled where that works; the first failure is told once, and then it runs as it is."""

    broken = False

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled = torch.compile(function, dynamic=True)

    def __call__(self, *args: Tensor) -> Any:
        with torch.no_grad():
            if not _Loop.broken:
                try:
                    return self.compiled(*args)
                except torch.OutOfMemoryError:  # uncompiled it would need more
                    raise
                except Exception as error:  # whatever a machine without a compiler raises
                    _Loop.broken = True
                    reason = (str(error).strip().splitlines() or [""])[0]
                    warnings.warn(
                        "fused activations could not be compiled and run uncompiled, several times slower (is a C++ "
                        f"compiler installed?): {type(error).__name__}: {reason}",
                        stacklevel=2,
                    )
            return self.function(*args)


# -- the operators


def _like(x: Tensor, flat: Tensor, channel_dim: int) -> Tensor:
    """A flat result in the shape of the dense x."""
    if channel_dim % x.ndim == 1 and _channels_last(x):
        b, c, h, w = x.shape
        return flat.reshape(b, h, w, c).permute(0, 3, 1, 2)
    return flat.reshape(x.shape)


@torch.library.custom_op("quac_plugins::activate", mutates_args=())
def activate(x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str) -> Tensor:
    """f(x; θ) of an equation by its name, θ (B, P, C); see :func:`fused`."""
    x = _dense(x.detach(), channel_dim)
    by_rows = _as_rows(x, channel_dim)
    loop = _compiled(equation, by_rows, x.dtype, tuple(start), host, False)
    return _like(x, loop(_flat(x, channel_dim), *_theta(theta.detach(), by_rows)), channel_dim)


@activate.register_fake
def _(x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str) -> Tensor:
    return torch.empty_like(_dense(x, channel_dim))


@torch.library.custom_op("quac_plugins::activate_backward", mutates_args=())
def activate_backward(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and θ."""
    x = _dense(x.detach(), channel_dim)
    by_rows = _as_rows(x, channel_dim)
    if _channels_last(x):
        grad = grad.contiguous(memory_format=torch.channels_last)
    loop = _compiled(equation, by_rows, x.dtype, tuple(start), host, True)
    by_x, sums = loop(_flat(grad.contiguous() if not _channels_last(x) else grad, channel_dim),
                      _flat(x, channel_dim), *_theta(theta.detach(), by_rows))  # fmt: skip
    sums = sums.reshape(theta.shape[0], theta.shape[2], theta.shape[1]).transpose(1, 2).contiguous()
    return _like(x, by_x, channel_dim), sums


@activate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(x, channel_dim)), torch.empty_like(theta, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, theta, *ctx.options = inputs
    ctx.save_for_backward(x, theta)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, theta = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated once more
        by_x, by_theta = _plain_backward(grad, x, theta, *ctx.options)
    else:
        by_x, by_theta = torch.ops.quac_plugins.activate_backward(grad, x, theta, *ctx.options)
    return by_x, by_theta, None, None, None, None


def _plain_backward(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    channel = channel_dim % x.ndim
    shape = [x.shape[i] if i in (0, channel) else 1 for i in range(x.ndim)]
    by_x, parts = _gradients(equation, grad, x, [p.reshape(shape) for p in theta.unbind(1)], start, host)
    axes = [i for i in range(1, x.ndim) if i != channel]
    return by_x, torch.stack([part.sum(axes) if axes else part for part in parts], 1)


activate.register_autograd(_backward, setup_context=_keep)

__all__ = ["CHOICES", "HOSTS", "MIN_NUMBERS", "fused", "kernels_choice", "use_fused"]
