"""The driver in one C++ call, from x to the coefficients of its kernel: on a CPU, where no gradient is asked for.

Operation by operation the driver takes twenty small ones, which together cost a third of what the activation itself
does on (8, 256, 56, 56), and torch's sum over the pixels of a channels_last x half as much again. The numbers are those
of :meth:`DrivenActivation.drive`, but for the order of the sums. Whatever is not a plain layer (adapted, quantized,
watched by a hook, in another dtype) is left to that method.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.driver_kernel import BATCH, FIXED, GROUP, NONE, driver
from quac_plugins.core.activations.kernels import as_rows, dense, neutral_of
from quac_plugins.core.activations.vectors import ALONE
from quac_plugins.core.native import broken, compiled_or

_OWN = {Tensor, nn.Parameter}
_DTYPE, _IS_CPU = Tensor.dtype.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]


def unwatched(layer: nn.Module) -> bool:
    """Whether nobody would notice that a layer's forward is not called."""
    return not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in layer.__dict__


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
    options = type(site).equation.__name__, len(site.learned), site.numbers, x.dtype, start, host, by_rows, onto is None
    built = None if "cpu" in broken else _built.get(options)
    if built is None:  # the builds alone: what a host or a hook raises is not a compiler's
        built = compiled_or("cpu", "fused activations", partial(_build, *options), lambda: None)
        if built is None:
            return None
        _built[options] = built
    drive, kernel = built
    threads = 1 if x.numel() < ALONE else torch.get_num_threads()
    c = coefficients(site, x, q, sizes, by_rows, drive, threads)
    if c is None:
        return None
    if onto is None:
        y = torch.empty_like(x)
        kernel(x, c, y, *sizes, threads)
        return y
    below = onto()
    ours = _is_ours(below, x)
    y = cpu.run((x,), sizes, c, options[0], neutral_of(options[0], start), host, by_rows, below if ours else None)
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


_built: dict[tuple[Any, ...], tuple[tuple[Callable[..., None], int], Callable[..., None]]] = {}


def _build(
    equation: str, learned: int, driven: int, dtype: torch.dtype, start: tuple[float, ...], host: str, by_rows: bool,
    alone: bool,
) -> tuple[tuple[Callable[..., None], int], Callable[..., None]]:  # fmt: skip
    """The driver and the kernel; also the one that adds, unless it is ``alone``."""
    options = (equation, dtype, neutral_of(equation, start), host, by_rows, False)
    if not alone:
        cpu.kernel(*options, True)
    return driver(equation, learned, driven, dtype), cpu.kernel(*options, False)


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
    site: Any, x: Tensor, q: Tensor | None, sizes: Sequence[int], by_rows: bool,
    drive: tuple[Callable[..., None], int], threads: int = 1,
) -> Tensor | None:  # fmt: skip
    """The coefficients (K, B, C) of ``FORMS``; None where the driver is not plain. Arguments as :func:`activate`.

    Args:
        x: dense.
        sizes: of the rows (B, C, N) or the columns (B, N, C) that x is in memory.
        by_rows: see ``sizes``.
        drive: of :mod:`driver_kernel`.
        threads: how many work.
    """
    # written out and mapped: every call of a function of Python costs 3 µs here, where x has emptied the caches
    batch, wide = sizes[0], torch.float64 if x.dtype is torch.float64 else torch.float32
    layers, parameters = site._modules, site._parameters
    matrices, norms = [layers["fc1"], layers["fc2"]], (layers["bn1"], layers["bn2"])
    head = layers.get("fc3")
    if head is not None:
        matrices.append(head)
    for layer in matrices:
        if type(layer) is not nn.Conv2d:
            return None
    for layer in (*matrices, *norms):
        own = layer.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
    tensors: list[Any] = []
    for layer in matrices:
        weight = layer._parameters
        tensors += (weight.get("weight"), weight.get("bias"))
    weights = tensors[:]
    passed: list[Any] = []  # five of each norm
    kinds: list[int] = []  # with the groups
    settings: list[float] = []
    written: list[Tensor] = []
    for norm in norms:
        found = _norm(norm, batch)
        if found is None:
            return None
        held, kind, groups, its = found
        tensors += held[:4]  # the counter is a whole number
        passed += held
        passed += [weights[0]] * (5 - len(held))  # not read
        kinds += (kind, groups)
        settings += its
        if kind == BATCH:
            written += held[2:]
    for name in site.learned:
        tensors.append(parameters.get(name))
    if not _OWN.issuperset(map(type, tensors)) or {*map(_DTYPE, tensors)} != {wide}:
        return None
    if not all(map(_IS_CPU, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None
    if not x.numel() or not all(map(Tensor.is_contiguous, tensors)):
        return None
    hidden, numbers = weights[1].numel(), site.numbers if head is not None else 0
    expected = _numbers_in(site.channels, site.quality_channels, hidden, site.numbers, len(matrices), *kinds[::2])
    if expected is None or [*map(Tensor.numel, tensors)] != [*expected, *[site.channels] * len(site.learned)]:
        return None  # C++ would read elsewhere
    if q is None:
        q = weights[0]  # not read
    elif type(q) not in _OWN or not q.is_cpu or q.layout is not torch.strided or q._is_zerotensor():
        return None
    elif q.dtype is not wide or not q.is_contiguous() or q.is_neg():
        q = q.to(wide).contiguous().resolve_neg()
    run, count = drive
    c = torch.empty(count, batch, site.channels, dtype=wide, device="cpu")
    run(
        x, q, *(weights + weights[:2])[:6], *passed, *tensors[len(tensors) - len(site.learned) :], c,
        _settings(*settings), *sizes, int(by_rows), site.quality_channels, hidden, numbers, *kinds, threads,
    )  # fmt: skip
    if written:  # tell autograd, without which they were
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    return c


def _norm(norm: Any, batch: int) -> tuple[tuple[Any, ...], int, int, tuple[float, float]] | None:
    """Its tensors, its kind, its number of groups, its ε and momentum; None: C++ has none like it."""
    if type(norm) is nn.Identity:
        return (), NONE, 1, (0.0, 0.0)
    own = norm.__dict__
    parameters = own["_parameters"]
    matrix = parameters.get("weight"), parameters.get("bias")
    if type(norm) is nn.GroupNorm:
        return matrix, GROUP, norm.num_groups, (norm.eps, 0.0)
    if type(norm) is not nn.BatchNorm2d:
        return None
    training, momentum, buffers = own["training"], own["momentum"], own["_buffers"]
    if training and (batch == 1 or momentum is None or not own["track_running_stats"]):
        return None
    count = buffers["num_batches_tracked"]
    if count is None or count.dtype is not torch.int64 or not count.is_cpu or count.numel() != 1:
        return None
    held = (*matrix, buffers["running_mean"], buffers["running_var"], count)
    return held, BATCH if training else FIXED, 1, (own["eps"], momentum or 0.0)


@lru_cache(maxsize=1024)
def _numbers_in(
    channels: int, quality: int, hidden: int, numbers: int, matrices: int, kind1: int, kind2: int
) -> tuple[int, ...] | None:
    """How many numbers each matrix, bias and norm's tensor has; None: the widths do not fit."""
    width = channels + quality
    expected = [hidden * width, hidden, width * hidden, width]
    if matrices == 3:
        expected += [numbers * channels * width, numbers * channels]
    elif width != numbers * channels:  # h is the numbers
        return None
    held = {NONE: 0, GROUP: 2, FIXED: 4, BATCH: 4}
    return (*expected, *[hidden] * held[kind1], *[width] * held[kind2])


@lru_cache(maxsize=64)  # a schedule may change the momentum at every step
def _settings(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
