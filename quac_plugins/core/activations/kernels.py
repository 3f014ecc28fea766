"""Fused activations: one read and one write of x, and x alone kept for backward.

What the kernels must do, and how:

1. **one pass**: y = host(x) + f(x; θ) − f(x; θ⁰), or f(x; θ) alone, in the forms of :mod:`forms`: on a CPU in C++
   (:mod:`cpu`), on a GPU in Triton, which torch.compile makes of the same expression (:mod:`loops`), or for the
   backward of columns :mod:`gpu`. Backward computes the gradient of x and the sums for θ in one more.
2. **any layout**: NCHW as rows with a number each, channels_last and tokens as columns; other strides are copied.
3. **half precision** is computed in float32, as in :mod:`reference`.
4. **an operator** of torch.library, ``quac_plugins::activate``, so that graphs may hold it. Derivatives of derivatives
   use the plain expression.
5. **no compiler, no error**: without one the same expression runs operation by operation, and still keeps x alone.
6. Graphs that are being compiled, exported or traced get the plain expression, which their compiler fuses with its
   neighbours.

``QUAC_KERNELS=reference`` never uses them, ``fused`` always; else they are used from ``MIN_NUMBERS`` numbers on, since
below a call costs more than it saves, or from ``MIN_DRIVEN`` on where one call drives the activation as well. The first
call of a layout and dtype compiles for some seconds; torch keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.forms import EQUATIONS, FORMS
from quac_plugins.core.activations.loops import COMPUTED, gradients, in_torch, on_gpu
from quac_plugins.core.native import compiled_or, kernels_choice

MIN_NUMBERS = 1 << 20
MIN_DRIVEN = 1 << 14
HOSTS: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"
}  # fmt: skip
"""Host activations that are computed inside the kernel, to the bit; others are computed beside it."""


def use_fused(equation: Any, x: Tensor) -> bool:
    """Whether the fused kernel computes this equation of x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting():
        return False
    if forward_ad._current_level >= 0 or _transforms() is not None:  # no_grad does not switch it off
        return False
    choice = kernels_choice()
    if choice == "reference" or equation not in EQUATIONS or x.dtype not in COMPUTED:
        return False
    if choice == "fused":
        return True
    # subclasses and transforms see the plain expression
    return _is_plain(x) and x.device.type in ("cpu", "cuda") and x.numel() >= MIN_NUMBERS


def _is_plain(x: Tensor) -> bool:
    """Neither fake, nor a proxy, nor inside vmap or grad."""
    return type(x) in _OWN and not x._is_zerotensor() and not _wrapped(x)


def is_transformed(x: Tensor) -> bool:
    """Whether x is one of vmap, grad or jvp, or of several gradients at once."""
    return _wrapped(x) or _of_several(x)


_wrapped, _of_several = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
_OWN = (Tensor, nn.Parameter)


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
        equation: one of :mod:`reference` that has an entry in :mod:`forms`.
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
    wide = COMPUTED[x.dtype]
    rows = [_rows(p, x, channel_dim).to(wide).expand(batch, channels) for p in parameters]
    theta = torch.stack(rows, 1)
    if theta.device != x.device:  # kernels take addresses
        raise RuntimeError(
            f"x is on {x.device}, but the activation's parameters are on {theta.device}; move one of them"
        )
    if _is_eager(x):
        return _Activate.apply(x, theta, equation.__name__, channel_dim, start, host)
    return torch.ops.quac_plugins.activate(x, theta, equation.__name__, channel_dim, list(start), host)


def at_once(x: Tensor) -> bool:
    """Whether one call is to drive and activate x: on a CPU."""
    if not x.is_cpu or x.dtype not in COMPUTED or not _is_eager(x):
        return False
    choice = kernels_choice()
    return choice == "fused" or (choice == "auto" and x.numel() >= MIN_DRIVEN)


def _is_eager(x: Tensor) -> bool:
    """Neither compiled nor traced nor seen by a mode or a transform, be it of the parameters alone."""
    if torch.compiler.is_compiling() or _tracing():  # first: compilers do not know what follows
        return False
    return _transforms() is None and not _modes() and _is_plain(x) and forward_ad._current_level < 0


_tracing, _transforms = torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack


def _rows(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A parameter that broadcasts against x, as (1 or B, 1 or C)."""
    channel = channel_dim % x.ndim
    shape = (1,) * (x.ndim - parameter.ndim) + tuple(parameter.shape)
    return parameter.reshape(shape[0] if channel else 1, shape[channel])


# -- layouts


def as_rows(x: Tensor, channel_dim: int) -> bool:
    """Whether the numbers of a channel lie together."""
    return channel_dim % x.ndim == 1 and x.ndim > 2 and not _channels_last(x)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor, channel_dim: int) -> Tensor:
    """Without gaps, in one of the layouts that the kernels know, and with the signs that it shows."""
    x = x.resolve_neg()
    return x if channel_dim % x.ndim == 1 and _channels_last(x) else x.contiguous()


def _laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the layout of a dense x."""
    last = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return grad.resolve_neg().contiguous(memory_format=last)


def shared_or_laid_out(x: Tensor, grad: Tensor, channel_dim: int) -> Tensor:
    """A gradient as :func:`cpu.run` takes it: (B, C) if it is the same all over a channel, as that of a mean is."""
    channel = channel_dim % x.ndim
    pixels = [i for i in range(1, x.ndim) if i != channel]
    if not grad.numel() or any(grad.shape[i] > 1 and grad.stride(i) for i in pixels):
        return _laid_out_as(x, grad)
    for i in reversed(pixels):
        grad = grad.select(i, 0)
    return grad.resolve_neg().contiguous()


def _flat(x: Tensor, channel_dim: int) -> Tensor:
    """A dense x as rows (B, C, N), or as columns (B, N, C)."""
    if as_rows(x, channel_dim):
        return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    last = x.permute(0, 2, 3, 1) if channel_dim % x.ndim == 1 and x.ndim == 4 else x
    return last.reshape(x.shape[0], math.prod(last.shape[1:-1]), last.shape[-1])


# -- the kernels


def _run(
    inputs: tuple[Tensor, ...], theta: Tensor, equation: str, channel_dim: int, start: tuple[float, ...], host: str
) -> Any:
    """y of inputs (x,), or the gradient of x and the sums (parts, B, C) of inputs (grad, x); x is dense."""
    x, back, neutral = inputs[-1], len(inputs) == 2, neutral_of(equation, start)
    by_rows = as_rows(x, channel_dim)
    c = torch.stack(FORMS[equation].coefficients(*theta.detach().unbind(1)))
    options = c, equation, neutral, host, by_rows

    def over_flat(loop: Callable[..., Any]) -> Any:
        found = loop([_flat(_laid_out_as(x, t), channel_dim) for t in inputs], *options)
        return (_like(x, found[0], channel_dim), found[1]) if back else _like(x, found, channel_dim)

    def fast() -> Any:
        if x.device.type != "cpu":
            return over_flat(on_gpu)
        # x's own shape: a view would be held twice, and not added to in place
        own = (*(shared_or_laid_out(x, grad, channel_dim) for grad in inputs[:-1]), x)
        found = cpu.run(own, _flat(x, channel_dim).shape, *options)
        return (found[0], found[1].sum(1).transpose(0, 1)) if back and not by_rows else found

    def plain() -> Any:
        return over_flat(partial(in_torch, compiled=False))

    with torch.no_grad():
        return compiled_or(x.device.type, "fused activations", fast, plain)


# -- the operators


@cache
def neutral_of(equation: str, start: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of θ⁰."""
    if not start:
        return ()
    return tuple(
        float(c) for c in FORMS[equation].coefficients(*torch.tensor(start, dtype=torch.float64, device="cpu"))
    )


def _like(x: Tensor, flat: Tensor, channel_dim: int) -> Tensor:
    """A flat result in the shape of the dense x."""
    if channel_dim % x.ndim == 1 and _channels_last(x):
        b, c, h, w = x.shape
        return flat.reshape(b, h, w, c).permute(0, 3, 1, 2)
    return flat.reshape(x.shape)


_OPTIONS = "str equation, int channel_dim, float[] start, str host"  # torch 2.6 does not infer it of list[float]


@torch.library.custom_op(
    "quac_plugins::activate", mutates_args=(), schema=f"(Tensor x, Tensor theta, {_OPTIONS}) -> Tensor"
)
def activate(x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str) -> Tensor:
    """f(x; θ) of an equation by its name, θ (B, P, C); see :func:`fused`."""
    return _activate(x, theta, equation, channel_dim, tuple(start), host)


def _activate(x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: tuple[float, ...], host: str) -> Tensor:
    return _run((dense(x.detach(), channel_dim),), theta, equation, channel_dim, start, host)


@activate.register_fake
def _(x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str) -> Tensor:
    return torch.empty_like(dense(x, channel_dim))


@torch.library.custom_op(
    "quac_plugins::activate_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor theta, {_OPTIONS}) -> (Tensor, Tensor)",
)
def activate_backward(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and θ."""
    return _activate_backward(grad, x, theta, equation, channel_dim, tuple(start), host)


def _activate_backward(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: tuple[float, ...], host: str
) -> tuple[Tensor, Tensor]:
    x = dense(x.detach(), channel_dim)
    by_x, sums = _run((grad, x), theta, equation, channel_dim, start, host)
    return by_x, torch.stack(FORMS[equation].gather(tuple(sums), theta.detach().unbind(1)), 1)


@activate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x, channel_dim)), torch.empty_like(theta, memory_format=torch.contiguous_format)


class _Activate(torch.autograd.Function):
    """The operator without its dispatcher, which takes 0.1 ms and keeps hold of the gradient of x.

    What nobody holds, autograd adds the gradient of the driver to in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, *options: Any) -> Tensor:  # type: ignore[override]
        _keep(ctx, (x, theta, *options), None)
        return _activate(x, theta, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _differentiated(ctx, grad, _activate_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, theta, *ctx.options = inputs
    ctx.save_for_backward(x, theta)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _differentiated(ctx, grad, torch.ops.quac_plugins.activate_backward)


def _differentiated(ctx: Any, grad: Tensor, once: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    """The gradients by ``once``, or by the plain expression where they are to be differentiated again."""
    x, theta = ctx.saved_tensors
    again = torch.is_grad_enabled() or is_transformed(grad) or forward_ad._current_level >= 0
    again = again or (grad.dtype, grad.shape, COMPUTED.get(x.dtype)) != (x.dtype, x.shape, theta.dtype)
    again = again and not torch.compiler.is_compiling()
    gradients = _plain_backward if again else once
    return (*gradients(grad, x, theta, *ctx.options), None, None, None, None)


def _plain_backward(
    grad: Tensor, x: Tensor, theta: Tensor, equation: str, channel_dim: int, start: list[float], host: str
) -> tuple[Tensor, Tensor]:
    channel = channel_dim % x.ndim
    shape = [x.shape[i] if i in (0, channel) else 1 for i in range(x.ndim)]
    shaped = [p.reshape(shape) for p in theta.unbind(1)]
    form, neutral = FORMS[equation], list(neutral_of(equation, tuple(start)))
    by_x, parts = gradients(equation, grad, x, list(form.coefficients(*shaped)), neutral, host)
    axes = [i for i in range(1, x.ndim) if i != channel]
    sums = tuple(part.sum(axes) if axes else part for part in parts)
    return by_x, torch.stack(form.gather(sums, theta.unbind(1)), 1)


activate.register_autograd(_backward, setup_context=_keep)

__all__ = [
    "HOSTS",
    "MIN_DRIVEN",
    "MIN_NUMBERS",
    "at_once",
    "fused",
    "is_transformed",
    "neutral_of",
    "shared_or_laid_out",
    "use_fused",
]
