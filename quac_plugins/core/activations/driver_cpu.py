"""The driver in one C++ call, from x to the coefficients of its kernel, and another for the gradients: on a CPU.

Operation by operation the driver takes twenty small ones, and as many again in backward, which together cost a third
of what the activation itself does on (8, 256, 56, 56), and torch's sum over the pixels of a channels_last x half as
much again. The numbers are those of :meth:`DrivenActivation.drive`, but for the order of the sums.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.driver_autograd import Call, Driven, coefficients
from quac_plugins.core.activations.driver_gradients import gradients
from quac_plugins.core.activations.driver_kernel import driver
from quac_plugins.core.activations.driver_parts import parts_of
from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.kernels import as_rows, dense, neutral_of
from quac_plugins.core.activations.vectors import ALONE
from quac_plugins.core.native import broken, compiled_or


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
    dim = site.channel_dim
    layout = None if x.is_neg() else _layout(x.shape, x.stride(), dim)
    if layout is None:
        x = dense(x, dim)
        layout = _layout(x.shape, x.stride(), dim)
        assert layout is not None
    sizes, by_rows = layout
    back = torch.is_grad_enabled()
    beside = onto is not None and not back
    key = type(site).equation.__name__, len(site.learned), site.numbers, x.dtype, start, host, by_rows, back, beside
    built = None if "cpu" in broken else _built.get(key)
    if built is None:
        arity = FORMS[key[0]].arity
        if len(site.learned) + site.numbers != arity or len(start) not in (0, arity):
            return None
        # the builds alone: what a host or a hook raises is not a compiler's
        built = compiled_or("cpu", "fused activations", partial(_build, *key), lambda: None)
        if built is None:
            return None
        _built[key] = built
    parts = parts_of(site, q, sizes[0], torch.float64 if x.dtype is torch.float64 else torch.float32)
    if parts is None or not x.numel():
        return None
    threads = 1 if x.numel() < ALONE else torch.get_num_threads()
    drive, value, gradient = built
    if back:
        call = Call(drive, value, gradient, key[0], start, host, dim, sizes, by_rows, threads)
        y = Driven.apply(x, q, parts, call, *parts.learning())
        return y if onto is None else onto() + y
    c = coefficients(drive, parts, x, sizes, by_rows, threads)
    if onto is None:
        y = torch.empty_like(x)
        value(x, c, y, *sizes, threads)
        return y
    below = onto()
    ours = _is_ours(below, x)
    y = cpu.run((x,), sizes, c, key[0], neutral_of(key[0], start), host, by_rows, below if ours else None)
    return y if ours else below + y


@lru_cache(maxsize=1024)
def _layout(shape: torch.Size, stride: tuple[int, ...], channel_dim: int) -> tuple[tuple[int, int, int], bool] | None:
    """The sizes of the rows (B, C, N), True or of the columns (B, N, C), False; None: there are gaps."""
    x = torch.empty_strided(shape, stride, device="meta")
    if dense(x, channel_dim) is not x:
        return None
    batch, channels = shape[0], shape[channel_dim]
    pixels = x.numel() // max(batch * channels, 1)
    by_rows = as_rows(x, channel_dim)
    return ((batch, channels, pixels) if by_rows else (batch, pixels, channels)), by_rows


_Built = tuple[tuple[Callable[..., None], int], Callable[..., None], Callable[..., None] | None]
_built: dict[tuple[Any, ...], _Built] = {}


def _build(
    equation: str, learned: int, driven: int, dtype: torch.dtype, start: tuple[float, ...], host: str, by_rows: bool,
    back: bool, beside: bool,
) -> _Built:  # fmt: skip
    """The driver, the kernel, and what their gradients take: the first of ``Call``."""
    options = (equation, dtype, neutral_of(equation, start), host, by_rows)
    if back:
        cpu.kernel(*options, True, False)
    if beside:
        cpu.kernel(*options, False, True)
    own = (equation, learned, driven, dtype)
    return driver(*own), cpu.kernel(*options, False, False), gradients(*own) if back else None


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
