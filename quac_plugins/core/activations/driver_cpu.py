"""The driver in one C++ call, from x to the coefficients of its kernel: on a CPU, where no gradient is asked for.

Operation by operation the driver takes twenty small ones, which together cost a third of what the activation itself
does on (8, 256, 56, 56), and torch's sum over the pixels of a channels_last x half as much again. The numbers are those
of :meth:`DrivenActivation.drive`, but for the order of the sums. Whatever is not a plain layer (adapted, quantized,
watched by a hook, in another dtype) is left to that method.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.driver_kernel import BATCH, FIXED, GROUP, NONE, driver
from quac_plugins.core.activations.kernels import as_rows, dense, neutral_of
from quac_plugins.core.activations.vectors import ALONE
from quac_plugins.core.native import compiled_or

_OWN = (Tensor, nn.Parameter)


@lru_cache(maxsize=64)  # a schedule may change the momentum at every step
def _settings(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def unwatched(layer: nn.Module) -> bool:
    """Whether nobody would notice that a layer's forward is not called."""
    return not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in layer.__dict__


def _matrix(layer: Any) -> tuple[Any, ...]:
    parameters = layer._parameters
    return parameters.get("weight"), parameters.get("bias")


def _norm(norm: Any, batch: int) -> tuple[tuple[Any, ...], int, int] | None:
    """Its tensors, its kind, and its number of groups."""
    if type(norm) is nn.Identity:
        return (), NONE, 1
    if type(norm) is nn.GroupNorm:
        return _matrix(norm), GROUP, norm.num_groups
    if type(norm) is not nn.BatchNorm2d:
        return None
    if norm.training and (batch == 1 or norm.momentum is None or not norm.track_running_stats):
        return None
    buffers = norm._buffers
    count = buffers["num_batches_tracked"]
    if count is None or count.dtype is not torch.int64 or not count.is_cpu or count.numel() != 1:
        return None
    statistics = buffers["running_mean"], buffers["running_var"]
    return (*_matrix(norm), *statistics), BATCH if norm.training else FIXED, 1


def activate(
    site: Any,
    x: Tensor,
    q: Tensor | None,
    start: tuple[float, ...],
    host: str,
    onto: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """The activation of x, on a CPU; None where the driver is not plain, or without a compiler.

    Args:
        site: a ``DrivenActivation`` that computes its numbers as that class does.
        x: as :func:`kernels.at_once` lets through.
        q: (B, Q) or None, as ``site.quality_for`` returns it.
        start, host: see :func:`kernels.fused`.
        onto: makes what the activation is added to.
    """
    dim, equation = site.channel_dim, type(site).equation.__name__
    x = dense(x, dim)
    by_rows = as_rows(x, dim)
    batch, channels = x.shape[0], x.shape[dim]
    pixels = x.numel() // max(batch * channels, 1)
    sizes = (batch, channels, pixels) if by_rows else (batch, pixels, channels)

    neutral = neutral_of(equation, start)

    def build() -> Any:  # the builds alone: what a host or a hook raises is not a compiler's
        drive = driver(equation, len(site.learned), site.numbers, x.dtype)
        for onto_it in {False, onto is not None}:
            cpu.kernel(equation, x.dtype, neutral, host, by_rows, False, onto_it)
        return drive

    drive = compiled_or("cpu", "fused activations", build, lambda: None)
    c = None if drive is None else coefficients(site, x, q, sizes, by_rows, drive)
    if c is None:
        return None
    below = None if onto is None else onto()
    ours = below is not None and _is_ours(below, x)
    y = cpu.run((x,), sizes, c, equation, neutral, host, by_rows, below if ours else None)
    return y if below is None or ours else below + y


def _holders(t: Tensor) -> tuple[int, int]:
    """How many hold a tensor, and its memory."""
    return sys.getrefcount(t), torch._C._storage_Use_Count(t.untyped_storage()._cdata)


def _holders_of_one() -> tuple[int, int]:
    """What :func:`_holders` says of what a single variable holds; versions of Python and torch differ."""
    t = torch.empty(1, device="cpu")
    return _holders(t)


_HELD = _holders_of_one()


def _is_ours(t: Tensor, like: Tensor) -> bool:
    """Whether a result may be written over: it is laid out alike, and nobody else holds it or a view of it."""
    if type(t) is not Tensor or t.requires_grad or t.is_neg() or t._base is not None:
        return False
    alike = t.dtype == like.dtype and t.shape == like.shape and t.stride() == like.stride() and t.is_cpu
    references, owners = sys.getrefcount(t), torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return alike and references <= _HELD[0] and owners <= _HELD[1]


def coefficients(
    site: Any, x: Tensor, q: Tensor | None, sizes: Sequence[int], by_rows: bool, drive: tuple[Callable[..., None], int]
) -> Tensor | None:
    """The coefficients (K, B, C) of ``FORMS``; None where the driver is not plain. Arguments as :func:`activate`.

    Args:
        x: dense.
        sizes: of the rows (B, C, N) or the columns (B, N, C) that x is in memory.
        by_rows: see ``sizes``.
        drive: of :mod:`driver_kernel`.
    """
    # what is written out here would, in functions of its own, take a tenth of the activation's time
    batch, wide = sizes[0], torch.float64 if x.dtype is torch.float64 else torch.float32
    layers, parameters = site._modules, site._parameters
    matrices, norms = [layers["fc1"], layers["fc2"]], (layers["bn1"], layers["bn2"])
    if site.fc3 is not None:
        matrices.append(site.fc3)
    for layer in matrices:
        if type(layer) is not nn.Conv2d:
            return None
    for layer in (*matrices, *norms):
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None
    norm1, norm2 = _norm(norms[0], batch), _norm(norms[1], batch)
    if norm1 is None or norm2 is None or not x.numel():
        return None
    learned = [parameters.get(name) for name in site.learned]
    weights = [t for layer in matrices for t in _matrix(layer)]
    tensors = (*weights, *norm1[0], *norm2[0], *learned)
    for t in tensors:
        if type(t) not in _OWN or t.dtype is not wide or not t.is_cpu or not t.is_contiguous() or t.is_neg():
            return None
    width, hidden, channels = site.channels + site.quality_channels, len(weights[1]), site.channels
    if site.fc3 is None and width != site.numbers * channels:  # h is the numbers
        return None
    expected = [hidden * width, hidden, width * hidden, width]
    if len(matrices) == 3:
        expected += [site.numbers * channels * width, site.numbers * channels]
    expected += [hidden] * len(norm1[0]) + [width] * len(norm2[0]) + [channels] * len(learned)
    if [t.numel() for t in tensors] != expected:  # C++ would read elsewhere
        return None
    unused = weights[0]
    if q is None:
        q = unused
    elif type(q) not in _OWN or not q.is_cpu or q.layout is not torch.strided or q._is_zerotensor():
        return None
    else:
        q = q.to(wide).contiguous().resolve_neg()
    run, count = drive
    c = torch.empty(count, batch, channels, dtype=wide, device="cpu")
    settings = [norm.__dict__.get(name) or 0.0 for norm in norms for name in ("eps", "momentum")]
    tracked = [norm._buffers.get("num_batches_tracked", unused) for norm in norms]
    run(
        x, q, *(weights + weights[:2])[:6], *(norm1[0] + (unused,) * 4)[:4], tracked[0],
        *(norm2[0] + (unused,) * 4)[:4], tracked[1], *learned, c, _settings(*settings), *sizes, int(by_rows),
        site.quality_channels, hidden, site.numbers if len(matrices) == 3 else 0, *norm1[1:], *norm2[1:],
        1 if x.numel() < ALONE else torch.get_num_threads(),
    )  # fmt: skip
    if norm1[1] == BATCH or norm2[1] == BATCH:
        _written(*(norm for norm in norms if norm.training))
    return c


def _written(*norms: nn.Module) -> None:
    """Tell autograd, without which they were written, of the statistics of batch norms."""
    torch.autograd.graph.increment_version(
        [t for norm in norms for t in norm._buffers.values() if t is not None and not t.is_inference()]
    )
