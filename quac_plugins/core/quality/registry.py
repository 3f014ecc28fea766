"""One table of names for quality functions: image batch (B, 3, H, W), RGB in [0, 1] → quality feature (B, Q).

A file of this folder declares one function with :func:`quality_function` (a plain function) or
:func:`quality_family` (``prefix:argument`` names, such as ``pyiqa:NAME``), and is found by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from quac_plugins.core.graphs import without_grad
from quac_plugins.core.naming import unknown

QualityCallable = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QualityFunction:
    """A named quality function.

    Attributes:
        name: the name under which a config finds it again; for a user's own callable its ``__name__``.
        channels: Q, the width of the quality feature.
        function: (B, 3, H, W) RGB in [0, 1] → (B, Q).
        needs_grad: gradients flow from q to the images; otherwise the function runs under ``no_grad``.
        kinds: names of degradations, ``"clean"`` first; the first numbers of q are their probabilities, by which a
            routed prior chooses its expert. Empty if q holds no probabilities.
        weights: a hash of the trained weights that the function uses, kept in adapters. None: it has no weights.
    """

    name: str
    channels: int
    function: QualityCallable
    needs_grad: bool = False
    builtin: bool = True
    kinds: tuple[str, ...] = ()
    weights: str | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Compute q (B, Q) of images (B, 3, H, W); raises ValueError if the function returns another shape."""
        if isinstance(self.function, nn.Module):
            first = next(self.function.parameters(), None)
            if first is not None and first.device != images.device:
                self.function.to(images.device)
        with nullcontext() if self.needs_grad else without_grad():
            q = self.function(images)
        if not isinstance(q, Tensor):
            raise TypeError(f"quality function {self.name!r} returned {type(q).__name__}, not a tensor (B, Q)")
        if q.ndim != 2 or q.shape[0] != images.shape[0] or q.shape[1] != self.channels:
            raise ValueError(
                f"quality function {self.name!r} returned shape {tuple(q.shape)} for images {tuple(images.shape)}; "
                f"expected ({images.shape[0]}, {self.channels})"
            )
        return q if self.needs_grad else q.detach()


_TABLE: dict[str, QualityFunction] = {}
_FAMILIES: dict[str, Callable[[str], QualityFunction]] = {}
_ALIVE: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_HELD: ContextVar[list[Any] | None] = ContextVar("held", default=None)


def quality_function(
    name: str, channels: int, kinds: tuple[str, ...] = (), weights: str | None = None
) -> Callable[[QualityCallable], QualityCallable]:
    """Register a function (B, 3, H, W) in [0, 1] → (B, ``channels``) under ``name``.

    Args:
        name: the name that configs give the function.
        channels: Q.
        kinds, weights: see :class:`QualityFunction`.
    """

    def register(function: QualityCallable) -> QualityCallable:
        taken = _TABLE.get(name)
        if taken is not None and taken.function.__module__ != function.__module__:
            raise ValueError(
                f"the quality function {name!r} is taken by {taken.function.__module__}; choose another name"
            )
        _TABLE[name] = QualityFunction(name, channels, function, kinds=kinds, weights=weights)
        return function

    return register


def quality_family(prefix: str) -> Callable[[Callable[[str], QualityFunction]], Callable[[str], QualityFunction]]:
    """Register a builder for names ``prefix`` and ``prefix:argument``; it gets the argument (``""`` if none)."""

    def register(build: Callable[[str], QualityFunction]) -> Callable[[str], QualityFunction]:
        _FAMILIES[prefix] = build
        return build

    return register


def shared(make: Callable[[str], Any], argument: str, *conditions: str) -> Any:
    """Return ``make(argument)``, or the object that an earlier call made, while somebody uses that object.

    So each name of a family stands for one object with one network in memory, and for none when nobody uses it.

    Example:
        >>> class Metric:
        ...     def __init__(self, name):
        ...         self.name = name
        >>> metric = shared(Metric, "sharpness")
        >>> shared(Metric, "sharpness") is metric, shared(Metric, "noise") is metric
        (True, False)
    """
    alive = _ALIVE.get((make, argument, *conditions))
    if alive is None:
        alive = _ALIVE.setdefault((make, argument, *conditions), make(argument))
    if (held := _HELD.get()) is not None:
        held.append(alive)
    return alive


@contextmanager
def in_use() -> Iterator[None]:
    """Keep all objects of :func:`shared` in use inside the context, so that repeated names read their weights once.

    Example:
        >>> class Metric:
        ...     def __init__(self, name):
        ...         print("made")
        >>> with in_use():
        ...     for _ in range(2):
        ...         _ = shared(Metric, "sharpness")
        made
    """
    held = _HELD.get()
    token = _HELD.set(held if held is not None else [])
    try:
        yield
    finally:
        _HELD.reset(token)


def _discover() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def quality_names() -> list[str]:
    """Return all names that :func:`resolve_quality` knows; families appear as ``prefix:…``."""
    _discover()
    return sorted(_TABLE) + [f"{prefix}[:…]" for prefix in sorted(_FAMILIES)]


def resolve_quality(
    spec: str | QualityCallable | QualityFunction, channels: int | None = None, needs_grad: bool = False
) -> QualityFunction:
    """Turn a name or a callable into a :class:`QualityFunction`.

    Args:
        spec: a name of :func:`quality_names`, or any callable (B, 3, H, W) in [0, 1] → (B, Q). An ``nn.Module`` is put
            into eval mode and follows the images from device to device; it is no part of the model: neither trained
            nor saved with it.
        channels: Q of a callable; measured on a grey 64×64 picture when not given.
        needs_grad: let gradients flow through the quality function (by default it is under ``no_grad``).

    Raises:
        ValueError: the name is not known (the message lists those that are).
        TypeError: ``spec`` is neither a string nor callable.

    Example:
        >>> resolve_quality("brisque").channels
        36
    """
    if isinstance(spec, QualityFunction):
        return spec
    if isinstance(spec, str):
        _discover()
        prefix, _, argument = spec.partition(":")
        if spec in _TABLE:
            entry = _TABLE[spec]
        elif prefix in _FAMILIES:
            entry = _FAMILIES[prefix](argument)
        elif prefix == "callable":
            raise ValueError(
                f"the quality function {argument!r} was the user's own and is not saved with a model; pass it "
                "as quality=…, or register it under a name with quac_plugins.quality_function before it is used"
            )
        else:
            raise unknown("unknown quality function", spec, quality_names(), [*_TABLE, *_FAMILIES])
        return replace(entry, needs_grad=needs_grad)
    if callable(spec):
        if isinstance(spec, nn.Module):
            spec.eval()  # it measures and does not learn: its own batch norms must not move with every picture
        if channels is None:
            channels = _measure_channels(spec)
        name = getattr(spec, "__name__", type(spec).__name__)
        return QualityFunction(name, channels, spec, needs_grad, builtin=False)
    raise TypeError(f"quality must be a name or a callable (B, 3, H, W) → (B, Q), got {type(spec).__name__}")


def _measure_channels(function: Any) -> int:
    first = next(function.parameters(), None) if isinstance(function, nn.Module) else None
    grey = torch.full((1, 3, 64, 64), 0.5, device=first.device if first is not None else None)
    try:
        with torch.no_grad():
            q = function(grey)
    except Exception as error:
        raise ValueError(
            f"quality callable {function!r} failed on a grey picture (1, 3, 64, 64), which measures its width Q "
            f"({type(error).__name__}: {error}). If it needs larger ones, give Q: QuACConfig(quality_channels=…)"
        ) from error
    if not isinstance(q, Tensor) or q.ndim != 2 or q.shape[0] != 1:
        shape = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"quality callable {function!r} returned {shape} for images (1, 3, 64, 64); expected (1, Q)")
    return int(q.shape[1])
