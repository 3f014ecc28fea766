"""Activations and means, each by one call; what computes them is asked here and nowhere else.

A kernel, where it may read the tensors (:func:`native.reads`): in C++ on a CPU (:mod:`cpu`), in Triton on a GPU
(:mod:`gpu`). It makes y = below + f(x; θ) − f(x; θ⁰) in one pass over x, of any strides (those that it does not know
are copied), half precision in float32; and keeps x and θ alone for backward, which is one pass as well.

Else :mod:`plain`, operation by operation: in graphs, transforms and modes, for gradients that are to be differentiated,
for few numbers, and without a compiler. ``QUAC_KERNELS=plain`` asks for it always, ``native`` never because of the
size. The first call of a dtype builds its kernels, for some seconds; torch keeps them on disk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.kernels import plain
from quac_plugins.core.kernels.equations import FORMS
from quac_plugins.core.kernels.layouts import WIDE, Kernels, Layout, layout_of
from quac_plugins.core.kernels.native import WrongNumbersError, built_or_none, in_graph, reads

LARGE = {"cpu": 1 << 14, "cuda": 1 << 20}
"""Numbers from which on a kernel takes less time than the operations in its place."""
PIECE = 1 << 20
"""Numbers, about, for which a function below is called at a time: new memory for all costs as much as the kernel."""
HOSTED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "hardswish": F.hardswish
}  # fmt: skip
"""Functions that kernels add inside, to the bit."""


def activate(
    x: Tensor,
    theta: Sequence[Tensor],
    equation: Callable[..., Tensor],
    dim: int = 1,
    start: tuple[float, ...] = (),
    below: Tensor | str | Callable[[Tensor], Tensor] = "",
) -> Tensor:
    """Compute below + f(x; θ), or, with a start, below + f(x; θ) − f(x; θ⁰).

    Args:
        x: (B, …) floating point, channels at ``dim``.
        theta: θ, each broadcastable against x and constant along all but batch and channels.
        equation: f, of x and θ; one of :mod:`plain` has kernels.
        dim: axis of the channels.
        start: θ⁰, one number for each parameter; empty: nothing is subtracted.
        below: the summand: a tensor like x, a function of x, or the name of a function in ``HOSTED``; ``""``: none. A
            function may be called for some of the images at a time.

    Returns:
        y, with the shape and dtype of x.

    Example:
        >>> activate(torch.ones(2, 3, 4, 4), [torch.zeros(1, 3, 1, 1)], plain.swish).unique().item()
        0.5
    """
    if callable(below) and (torch.is_grad_enabled() or in_graph() or not _pieces(x)):
        below = below(x)
    if equation in FORMS and not in_graph():
        y = _fused(x, theta, equation, dim % x.ndim, start, below)
        if y is not None:
            return y
    return _plain(x, theta, equation, start, below)


def means(x: Tensor, dim: int = 1) -> Tensor:
    """Average x over all axes but batch and channels: (B, C), at least float32; see :func:`plain.global_average`."""
    if not in_graph():
        averages = _fused_means(x, dim % x.ndim)
        if averages is not None:
            return averages
    return plain.global_average(x, dim)


def _plain(
    x: Tensor, theta: Sequence[Tensor], equation: Callable[..., Tensor], start: tuple[float, ...], below: Any
) -> Tensor:
    y = equation(x, *theta)
    if start:
        y = y - equation(x, *(torch.full((1,), value, dtype=torch.float32, device=x.device) for value in start))
    if isinstance(below, str):
        return HOSTED[below](x) + y if below else y
    return (below(x) if callable(below) else below) + y


def _pieces(x: Tensor) -> int:
    """Return the number of images in a piece; 0: x stays whole, being small, or vectors would end elsewhere."""
    images = max(PIECE * x.shape[0] // max(x.numel(), 1), 1)
    whole = 2 * images > x.shape[0] or x.numel() // x.shape[0] % 64 or not x.is_cpu
    return 0 if whole else images


# -- what compilers do not enter, be it as a frame of its own


@cache
def kernels_of(device: str, dtype: torch.dtype) -> Kernels | None:
    """Return the kernels of a kind of device, built and tried, or None; see :func:`built_or_none`."""

    def build() -> Kernels | None:
        kernels = importlib.import_module(f"quac_plugins.core.kernels.{'cpu' if device == 'cpu' else 'gpu'}").build(
            dtype
        )
        if kernels is not None:
            _try(kernels, device, dtype)
        return kernels

    return built_or_none(device, f"native kernels of {str(dtype)[6:]}", build)


def _try(kernels: Kernels, device: str, dtype: torch.dtype) -> None:
    """Compare the kernels with the plain expressions on a few numbers.

    Raises:
        WrongNumbersError: the results differ.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device(device):
        for equation, form in FORMS.items():
            for shape, channel in (((2, 3, 37), 1), ((2, 5, 37), 2)):
                x = torch.linspace(-4, 4, 2 * shape[1] * shape[2]).view(shape).to(dtype).requires_grad_()
                rows = [torch.linspace(-1, 1, b * shape[channel]).view(b, -1) for b in (2, 1, 2)[: len(form.gather)]]
                theta = [plain.per_channel(p.to(WIDE[dtype]), x, channel).requires_grad_() for p in rows]
                y = equation(x, *theta)
                expected = [y, *torch.autograd.grad(y, [x, *theta], torch.ones_like(x))]
                args = (
                    x.detach(),
                    [p.detach() for p in theta],
                    equation,
                    (),
                    "",
                    layout_of(shape, x.stride(), channel),
                )
                by_x, by_theta = kernels.run(torch.ones_like(x), *args)
                results = [kernels.run(None, *args), by_x, *by_theta]
                if kernels.means is not None:
                    results.append(kernels.means(args[0], args[-1]))
                    expected.append(plain.global_average(x, channel))
                for ours, exact in zip(results, expected, strict=True):
                    error = (ours.double() - exact.double()).abs().max().item()
                    if not error <= 0.02 * exact.abs().max().item():
                        raise WrongNumbersError(f"{equation.__name__} of {shape} is wrong by {error:.2g}")


@torch.compiler.disable
def _fused(
    x: Tensor, theta: Sequence[Tensor], equation: Any, channel: int, start: tuple[float, ...], below: Any
) -> Tensor | None:
    added = (below,) if isinstance(below, Tensor) else ()
    if not reads(x, *theta, *added, large=x.numel() >= LARGE.get(x.device.type, 0)):
        return None
    kernels = kernels_of(x.device.type, x.dtype)
    if kernels is None or [(t.dtype, t.shape) for t in added] != [(x.dtype, x.shape)] * len(added):
        return None
    rows = [_in_rows(p, x, channel) for p in theta]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *rows, *added)):
        return _Activate.apply(x, below, (kernels, equation, channel, start), *rows)
    options = kernels, equation, channel, start
    return _by_pieces(x, rows, below, options) if callable(below) else _run(None, x, rows, below, options)


def _by_pieces(x: Tensor, theta: Sequence[Tensor], below: Callable[[Tensor], Tensor], options: Any) -> Tensor | None:
    """Compute y over a function, piece by piece; None if the function returns tensors that kernels do not read."""
    kernels, equation, channel, start = options
    x, (batch, *sizes) = _dense(x, channel)
    y, images = torch.empty_like(x), _pieces(x)
    for at in range(0, batch, images):
        piece, *piece_theta = (t[at : at + images] if len(t) == batch else t for t in (x, *theta))
        piece_below = below(piece)
        if not reads(piece_below) or (piece_below.dtype, piece_below.shape) != (piece.dtype, piece.shape):
            return None
        layout = (len(piece), *sizes)
        kernels.run(None, piece, piece_theta, equation, start, _as(piece_below, piece), layout, y[at : at + images])
    return y


def _in_rows(p: Tensor, x: Tensor, channel: int) -> Tensor:
    """Reshape a parameter for kernels: C or B·C numbers in a row, in the dtype of the arithmetic."""
    wide, batch, channels = WIDE[x.dtype], x.shape[0], x.shape[channel]
    fits = p.ndim == x.ndim and p.shape[channel] == channels and p.shape[0] * channels == p.numel()
    if fits and p.dtype is wide and p.shape[0] in (1, batch) and p.is_contiguous() and not p.is_neg():
        return p
    shape = (1,) * (x.ndim - p.ndim) + tuple(p.shape)
    return p.reshape(shape[0], shape[channel]).to(wide).expand(-1, channels).resolve_neg().contiguous()


def _dense(x: Tensor, channel: int) -> tuple[Tensor, Layout]:
    """Return a tensor without gaps and lazy signs, and its layout in memory."""
    layout = None if x.is_neg() else layout_of(x.shape, x.stride(), channel)
    if layout is None:
        x = x.resolve_neg().contiguous()
        layout = layout_of(x.shape, x.stride(), channel)
    return x, layout  # type: ignore[return-value]


def _as(t: Tensor, x: Tensor) -> Tensor:
    """Lay a tensor out as a dense x."""
    return t if t.stride() == x.stride() and not t.is_neg() else torch.empty_like(x).copy_(t)


def _run(grad: Tensor | None, x: Tensor, theta: Sequence[Tensor], below: Tensor | str, options: Any) -> Any:
    kernels, equation, channel, start = options
    x, layout = _dense(x, channel)
    grad = None if grad is None else _as(grad, x)
    return kernels.run(
        grad, x, theta, equation, start, below if isinstance(below, str) else _as(below, x), layout
    )  # fmt: skip


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, below: Tensor | str, options: Any, *theta: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, *theta)
        ctx.options, ctx.forms = options, [(t.dtype, t.shape) for t in (x, x, *theta)]
        ctx.below = below if isinstance(below, str) else ""  # one that is given has the gradient of y
        return _run(None, x, theta, below, options)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *theta = ctx.saved_tensors
        tensors = (grad, x, *theta)
        same = [(t.dtype, t.shape) for t in tensors] == ctx.forms  # hooks and .data may have put something else there
        if same and not torch.is_grad_enabled() and reads(x, grad, *theta):
            by_x, by_theta = _run(grad, x, [p.resolve_neg().contiguous() for p in theta], ctx.below, ctx.options)
        else:
            by_x, *by_theta = _again(grad, x, theta, ctx.below, ctx.options)
        return by_x, grad if ctx.needs_input_grad[1] else None, None, *by_theta


def _again(grad: Tensor, x: Tensor, theta: Sequence[Tensor], below: str, options: Any) -> tuple[Tensor, ...]:
    """Compute the gradients by the plain expression, which can be differentiated again."""
    again = torch.is_grad_enabled()
    _, equation, channel, start = options
    with torch.enable_grad():
        # aliases: what one input owes to another is not to be counted twice
        x, *theta = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (x, *theta))
        shaped = [plain.per_channel(p.reshape(-1, x.shape[channel]), x, channel) for p in theta]
        y = _plain(x, shaped, equation, start, below)
        return torch.autograd.grad(y, [x, *theta], grad, create_graph=again)


@torch.compiler.disable
def _fused_means(x: Tensor, channel: int) -> Tensor | None:
    if not reads(x, large=x.numel() >= LARGE.get(x.device.type, 0)):
        return None
    kernels = kernels_of(x.device.type, x.dtype)
    if kernels is None or kernels.means is None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _Means.apply(x, channel, kernels.means)
    return kernels.means(*_dense(x, channel))


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: int, means: Callable[..., Tensor]) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.dtype, ctx.channel = x.shape, x.dtype, channel
        return means(*_dense(x, channel))

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        batch, channels = grad.shape
        shape = [n if axis in (0, ctx.channel) else 1 for axis, n in enumerate(ctx.shape)]
        count = max(ctx.shape.numel() // max(batch * channels, 1), 1)
        return (grad / count).to(ctx.dtype).reshape(shape).expand(ctx.shape), None, None
