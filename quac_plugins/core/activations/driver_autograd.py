"""An activation and its driver as one node of the autograd graph, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.driver_kernel import BATCH, FIXED, GROUP, NONE
from quac_plugins.core.activations.driver_parts import IS_CPU, OWN, Parts
from quac_plugins.core.activations.forms import FORMS, equation_of
from quac_plugins.core.activations.kernels import is_transformed, neutral_of, shared_or_laid_out
from quac_plugins.core.activations.loops import COMPUTED, HOSTED
from quac_plugins.core.activations.reference import global_average, per_channel
from quac_plugins.core.precision import full_precision


class Call(NamedTuple):
    """One activation of an x.

    Attributes:
        drive: of :mod:`driver_kernel`.
        value: the kernel of :mod:`cpu`.
        back: of :mod:`driver_gradients`; None: without gradients.
        equation, start, host, channel_dim: see :func:`kernels.fused`.
        sizes: of the rows (B, C, N) or the columns (B, N, C) that x is in memory.
        by_rows: see ``sizes``.
        threads: how many work.
    """

    drive: tuple[Callable[..., None], int]
    value: Callable[..., None]
    back: Callable[..., None] | None
    equation: str
    start: tuple[float, ...]
    host: str
    channel_dim: int
    sizes: tuple[int, int, int]
    by_rows: bool
    threads: int


def coefficients(
    drive: tuple[Callable[..., None], int], parts: Parts, x: Tensor, sizes: tuple[int, int, int], by_rows: bool,
    threads: int, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The coefficients (K, B, C) of ``FORMS`` for a dense x; what backward needs of the driver is put into ``kept``.

    Other arguments are those of ``Call``.
    """
    matrices, norms, kinds = parts.matrices, parts.norms, parts.kinds
    run, count = drive
    channels, quality, hidden, numbers = parts.sizes
    c = torch.empty(count, sizes[0], channels, dtype=matrices[0].dtype, device="cpu")
    run(
        x, parts.q, *(matrices + matrices[:2])[:6], *norms, *parts.learned, c, c if kept is None else kept,
        parts.settings, *sizes, int(by_rows), quality, hidden, numbers, *kinds, int(kept is not None), threads,
    )  # fmt: skip
    if BATCH in kinds[::2]:  # tell autograd, without which the statistics were written
        written = (norms[2:4] if kinds[0] == BATCH else []) + (norms[7:9] if kinds[2] == BATCH else [])
        torch.autograd.graph.increment_version(written)
    return c


class Driven(torch.autograd.Function):
    """f(x; θ), or host(x) + f(x; θ) − f(x; θ⁰), of ``Parts`` and a ``Call``; then all tensors that are learned."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, q: Tensor | None, parts: Parts, call: Call, *learning: Tensor
    ) -> Tensor:
        """As above; keeps x and the driver's small tensors."""
        channels, quality, hidden, numbers = parts.sizes
        width = 3 * (channels + quality) + 2 * hidden + numbers * channels
        kept = torch.empty(call.sizes[0], width, dtype=learning[0].dtype, device="cpu")
        c = coefficients(call.drive, parts, x, call.sizes, call.by_rows, call.threads, kept)
        y = torch.empty_like(x)
        call.value(x, c, y, *call.sizes, call.threads)
        statistics = [norms for i, norms in ((0, parts.norms[2:4]), (2, parts.norms[7:9])) if parts.kinds[i] == FIXED]
        saved = (x, kept, c, *learning, *(t for pair in statistics for t in pair))
        ctx.save_for_backward(q if ctx.needs_input_grad[1] else None, *saved)  # else it is in ``kept``
        ctx.call, ctx.kinds, ctx.settings, ctx.sizes = call, parts.kinds, parts.settings, parts.sizes
        ctx.strides, ctx.forms = x.stride(), _forms(saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """In C++, or as the plain expression: where the gradients are to be differentiated, or C++ would misread."""
        q, *saved = ctx.saved_tensors
        x, kept, c, *tensors = saved
        needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:])
        layers = _layers(ctx, tensors)
        plain = torch.is_grad_enabled() or is_transformed(grad) or forward_ad._current_level >= 0
        if plain or not _is_readable(ctx, saved, grad):
            if q is None and (quality := ctx.sizes[1]):
                width = ctx.sizes[0] + quality
                q = kept.flatten()[: len(x) * width].view(len(x), width)[:, ctx.sizes[0] :]
            found = _again(ctx.call, layers, (x, q), grad, needed)
        else:
            if x.stride() != ctx.strides:  # as it comes back from where saved tensors were put
                x = x.new_empty_strided(x.shape, ctx.strides).copy_(x)
            found = _once(ctx.call, layers, x, kept, c, grad, needed[0])
            found[1] = found[1].to(q.dtype).reshape(q.shape) if needed[1] else None
        found = [by if wanted else None for by, wanted in zip(found, needed, strict=True)]
        return (*found[:2], None, None, *found[2:])


def _forms(tensors: Iterable[Tensor]) -> list[Any]:
    return [(t.dtype, t.shape) for t in tensors]


def _is_readable(ctx: Any, saved: list[Tensor], grad: Tensor) -> bool:
    """Whether C++ may read what was saved: hooks and ``.data`` may have put something else there."""
    rest = saved[1:]
    if not OWN.issuperset(map(type, (grad, *saved))) or not all(map(IS_CPU, (grad, *saved))):
        return False
    if _forms(saved) != ctx.forms or (grad.dtype, grad.shape) != ctx.forms[0]:
        return False
    return all(map(Tensor.is_contiguous, rest)) and not any(map(Tensor.is_neg, rest)) and not grad._is_zerotensor()


class _Layers(NamedTuple):
    """The tensors of ``Parts``; those of the norms are empty where a norm has none."""

    matrices: list[Tensor]
    affine: tuple[list[Tensor], list[Tensor]]
    learned: list[Tensor]
    statistics: tuple[list[Tensor], list[Tensor]]
    kinds: list[int]
    settings: Tensor
    sizes: tuple[int, int, int, int]

    def learning(self) -> list[Tensor]:
        return [*self.matrices, *self.affine[0], *self.affine[1], *self.learned]


def _layers(ctx: Any, tensors: list[Tensor]) -> _Layers:
    """Of what :class:`Driven` saved."""
    kinds, rest = ctx.kinds, iter(tensors)
    matrices = 6 if ctx.sizes[3] else 4
    affine = [0 if kind == NONE else 2 for kind in kinds[::2]]
    statistics = [2 if kind == FIXED else 0 for kind in kinds[::2]]
    learned = len(tensors) - matrices - sum(affine) - sum(statistics)
    first, one, two, own, mean1, mean2 = ([*islice(rest, n)] for n in (matrices, *affine, learned, *statistics))
    return _Layers(first, (one, two), own, (mean1, mean2), kinds, ctx.settings, ctx.sizes)


def _once(call: Call, layers: _Layers, x: Tensor, kept: Tensor, c: Tensor, grad: Tensor, onto: bool) -> list[Any]:
    """The gradients of x, q (B, Q) and what is learned."""
    neutral = neutral_of(call.equation, call.start)
    inputs = (shared_or_laid_out(x, grad, call.channel_dim), x)
    by_x, sums = cpu.run(inputs, call.sizes, c, call.equation, neutral, call.host, call.by_rows)
    channels, quality, hidden, numbers = layers.sizes
    by_z = kept.new_empty(call.sizes[0], channels + quality)
    by = [torch.empty_like(t) for t in layers.learning()]
    matrices, (affine1, affine2), (statistics1, statistics2) = layers.matrices, layers.affine, layers.statistics
    unused = [by_z, by_z]
    heads = len(matrices)
    after = heads + len(affine1)
    assert call.back is not None
    call.back(
        by_x, sums, kept, *(matrices[::2] + unused)[:3], (affine1 or unused)[0], *(statistics1 or unused),
        (affine2 or unused)[0], *(statistics2 or unused), *layers.learned,
        by_z, *(by[:heads] + unused)[:6], *(by[heads:after] or unused),
        *(by[after : after + len(affine2)] or unused), *by[len(by) - len(layers.learned) :], layers.settings,
        *call.sizes, int(call.by_rows), 0 if call.by_rows else sums.shape[1], quality, hidden, numbers, *layers.kinds,
        int(onto), call.threads,
    )  # fmt: skip
    return [by_x, by_z[:, channels:], *by]


def _again(
    call: Call, layers: _Layers, inputs: tuple[Tensor, Tensor | None], grad: Tensor, needed: tuple[bool, ...]
) -> list[Any]:
    """The gradients by the plain expression, which can itself be differentiated."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), full_precision(grad):
        # aliases: what one input owes to another is not to be counted twice
        own = [None if t is None else t.view_as(t) for t in (*inputs, *layers.learning())]
        y = _plain(call, layers, own)
        wanted = [t for t, is_needed in zip(own, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))  # type: ignore[arg-type]
    return [next(found) if is_needed else None for is_needed in needed]


def _plain(call: Call, layers: _Layers, inputs: list[Any]) -> Tensor:
    """The activation operation by operation, of x, q and what is learned."""
    x, q, *rest = inputs
    numbers, heads = layers.sizes[3], len(layers.matrices)
    matrices, rest = rest[:heads], rest[heads:]
    learned = rest[len(rest) - len(layers.learned) :]
    z = global_average(x, call.channel_dim)
    z = z if q is None else torch.cat((z, q.to(z)), dim=1)
    eps = layers.settings.tolist()[::2]
    for i in range(2):
        z = F.linear(z, matrices[2 * i].flatten(1), matrices[2 * i + 1])
        affine, rest = rest[: len(layers.affine[i])], rest[len(layers.affine[i]) :]
        kind, groups = layers.kinds[2 * i : 2 * i + 2]
        if kind == NONE:
            continue
        if kind == GROUP:
            z = F.group_norm(z, groups, affine[0], affine[1], eps[i])
        else:
            mean, variance = layers.statistics[i] or (None, None)
            z = F.batch_norm(z, mean, variance, affine[0], affine[1], kind == BATCH, eps=eps[i])
    h = torch.sigmoid(z)
    h = F.linear(h, matrices[4].flatten(1), matrices[5]) if numbers else h
    count = FORMS[call.equation].arity - len(learned)
    theta = [per_channel(p.flatten(), x, call.channel_dim) for p in learned]
    theta += [per_channel(part, x, call.channel_dim) for part in h.chunk(count, dim=1)]
    equation = equation_of(call.equation)
    y = equation(x, *theta)
    if call.start:
        y = y - equation(x, *(torch.full((1,), value, dtype=COMPUTED[x.dtype], device="cpu") for value in call.start))
    return HOSTED[call.host][0](x) + y if call.host else y
