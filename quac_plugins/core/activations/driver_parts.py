"""What C++ reads of a driver, checked: every layer is a plain one of the size that is expected, and nobody watches it.

Whatever is not (adapted, quantized, hooked, parametrized, in another dtype) is left to the layers themselves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from quac_plugins.core.activations.driver_kernel import BATCH, FIXED, GROUP, NONE

OWN = {Tensor, nn.Parameter}
IS_CPU = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_DTYPE, _SHAPE = Tensor.dtype.__get__, Tensor.shape.__get__  # type: ignore[attr-defined]
_EVERYWHERE = (
    module._global_forward_hooks, module._global_forward_pre_hooks, module._global_backward_hooks,
    module._global_backward_pre_hooks,
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Parts(NamedTuple):
    """A driver as C++ takes it.

    Attributes:
        matrices: weight and bias of fc1, fc2 and, if there is one, fc3.
        norms: the tensors of both norms, five each: weight, bias, mean, variance and counter, or what is not read.
        kinds: of both norms, each with its number of groups.
        settings: ε and momentum of both norms, float64.
        learned: the learned parameters of the equation, C numbers each.
        sizes: C, Q, the hidden width, and how many numbers a channel fc3 gives; 0: there is none.
        q: (B, Q), or what is not read.
    """

    matrices: list[Any]
    norms: list[Any]
    kinds: list[int]
    settings: Tensor
    learned: list[Any]
    sizes: tuple[int, int, int, int]
    q: Tensor

    def learning(self) -> list[Any]:
        """All that a gradient may be asked of, but q: matrices, weights and biases of the norms, learned parameters."""
        affine = [t for i in (0, 2) if self.kinds[i] != NONE for t in self.norms[5 * i // 2 :][:2]]
        return [*self.matrices, *affine, *self.learned]


def unwatched(layer: nn.Module) -> bool:
    """Whether nobody would notice that a layer's forward is not called."""
    own = layer.__dict__
    return "forward" not in own and not any(own[name] for name in _HOOKS) and not any(_EVERYWHERE)


def parts_of(site: Any, q: Tensor | None, batch: int, wide: torch.dtype) -> Parts | None:
    """The parts of a ``DrivenActivation``'s driver, or None.

    Args:
        site: computes its numbers as that class does.
        q: (B, Q) or None, as ``site.quality_for`` returns it.
        batch: B.
        wide: dtype that the driver is computed in.
    """
    # written out and mapped: every call of a function of Python costs 3 µs here, where x has emptied the caches
    layers, parameters = site._modules, site._parameters
    layered, normed = [layers["fc1"], layers["fc2"]], (layers["bn1"], layers["bn2"])
    head = layers.get("fc3")
    if head is not None:
        layered.append(head)
    for layer in layered:
        if type(layer) is not nn.Conv2d:
            return None
    if any(_EVERYWHERE):
        return None
    hooks = _HOOKS if torch.is_grad_enabled() else _HOOKS[:2]
    for layer in (*layered, *normed):
        own = layer.__dict__
        if "forward" in own:
            return None
        for name in hooks:
            if own[name]:
                return None
    matrices: list[Any] = []
    for layer in layered:
        weight = layer._parameters
        matrices += (weight.get("weight"), weight.get("bias"))
    tensors = matrices[:]
    norms: list[Any] = []
    kinds: list[int] = []
    settings: list[float] = []
    for norm in normed:
        found = _norm(norm, batch)
        if found is None:
            return None
        held, kind, groups, its = found
        tensors += held[:4]  # the counter is a whole number
        norms += held
        norms += [matrices[0]] * (5 - len(held))
        kinds += (kind, groups)
        settings += its
    learned: list[Any] = []
    for name in site.learned:
        learned.append(parameters.get(name))
    tensors += learned
    if not OWN.issuperset(map(type, tensors)) or {*map(_DTYPE, tensors)} != {wide}:
        return None
    if not all(map(IS_CPU, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None
    if not all(map(Tensor.is_contiguous, tensors)):
        return None
    channels, hidden, numbers = site.channels, matrices[1].numel(), site.numbers
    quality = site.quality_channels
    expected = _shapes(channels, quality, hidden, numbers, head is not None, kinds[0], kinds[2], len(learned))
    if (*map(_SHAPE, tensors),) != expected:  # C++ would read elsewhere
        return None
    if q is None:
        if quality:
            return None
        q = matrices[0]
    elif (
        q.shape != (batch, quality)
        or type(q) not in OWN
        or not q.is_cpu
        or q.layout is not torch.strided
        or q._is_zerotensor()
    ):
        return None
    elif q.dtype is not wide or not q.is_contiguous() or q.is_neg():
        q = q.to(wide).contiguous().resolve_neg()
    sizes = channels, quality, hidden, 0 if head is None else numbers
    return tuple.__new__(Parts, (matrices, norms, kinds, _settings(*settings), learned, sizes, q))


def _norm(norm: Any, batch: int) -> tuple[tuple[Any, ...], int, int, tuple[float, float]] | None:
    """Its tensors, its kind, its number of groups, its ε and momentum; None: C++ has none like it."""
    if type(norm) is nn.Identity:
        return (), NONE, 1, (0.0, 0.0)
    own = norm.__dict__
    parameters = own["_parameters"]
    matrix = parameters.get("weight"), parameters.get("bias")
    if type(norm) is nn.GroupNorm:
        groups = norm.num_groups
        return None if groups < 1 or norm.num_channels % groups else (matrix, GROUP, groups, (norm.eps, 0.0))
    if type(norm) is not nn.BatchNorm2d:
        return None
    training, momentum, buffers = own["training"], own["momentum"], own["_buffers"]
    if training and (batch == 1 or momentum is None or not own["track_running_stats"]):
        return None
    count = buffers.get("num_batches_tracked")
    if count is None or count.dtype is not torch.int64 or not count.is_cpu or count.numel() != 1:
        return None
    held = (*matrix, buffers["running_mean"], buffers["running_var"], count)
    return held, BATCH if training else FIXED, 1, (own["eps"], momentum or 0.0)


@lru_cache(maxsize=1024)
def _shapes(
    channels: int, quality: int, hidden: int, numbers: int, has_head: bool, kind1: int, kind2: int, learned: int
) -> tuple[tuple[int, ...], ...] | None:
    """Of each matrix, bias, norm's tensor and learned parameter; None: the widths do not fit."""
    width = channels + quality
    expected: list[tuple[int, ...]] = [(hidden, width, 1, 1), (hidden,), (width, hidden, 1, 1), (width,)]
    if has_head:
        expected += [(numbers * channels, width, 1, 1), (numbers * channels,)]
    elif width != numbers * channels:  # h is the numbers
        return None
    held = {NONE: 0, GROUP: 2, FIXED: 4, BATCH: 4}
    return (*expected, *[(hidden,)] * held[kind1], *[(width,)] * held[kind2], *[(1, channels, 1, 1)] * learned)


@lru_cache(maxsize=64)  # a schedule may change the momentum at every step
def _settings(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
