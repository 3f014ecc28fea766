"""The shared parts of the configs: checks of values, normalization of the host's images, and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from quac_plugins.core.colours import CHANNEL_ORDERS
from quac_plugins.core.naming import matcher, unknown

C = TypeVar("C", bound="QualityOptions")


def one_of(what: str, value: Any, known: tuple[str, ...] | list[str]) -> None:
    """Raise a ValueError that lists the known values, and the nearest, unless ``value`` is one of them."""
    if value not in known:
        raise unknown(f"unknown {what}", value, known)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Turn a TypeError or ValueError into a ValueError whose message begins with ``key``, a key of a user's config."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def read_options(cls: Any, options: Any, path: str, key_of: Callable[[str], str] | None = None) -> Any:
    """Build a config of this package from a user's options; an error begins with the key of the wrong option.

    Args:
        cls: QuACConfig or PriorConfig.
        options: the options by name; or a config of the class, which is returned.
        path: the place of the options in the user's config; "" at its top.
        key_of: maps an option's name to its key. None: ``PATH.NAME``.

    Raises:
        ValueError: an option is unknown, or its type or value is wrong.

    Example:
        >>> from quac_plugins import QuACConfig
        >>> read_options(QuACConfig, {"qualty": "brisque"}, "model.quac")
        Traceback (most recent call last):
        ValueError: model.quac.qualty: unknown option 'qualty'; did you mean 'quality'? Known: ...
    """
    from quac_plugins.core.quality.registry import resolve_quality  # which knows what this file holds

    if isinstance(options, cls):
        return options
    if not isinstance(options, Mapping):
        raise ValueError(f"{path}: must be a dict of options of {cls.__name__}, got {options!r}")
    key_of = key_of or (f"{path}.{{}}" if path else "{}").format
    known = [field.name for field in fields(cls)]
    for name in options:
        with named(key_of(name)):
            one_of("option", name, known)
    for name, value in options.items():  # one by one, so that an error is that key's
        with named(key_of(name)):
            if name not in ("mean", "std"):  # which go together
                cls(**{name: value})
            if name == "quality":
                resolve_quality(value)
    with named(path or cls.__name__):
        return cls(**options)


def whole_number(what: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise a ValueError unless ``value`` is an int from ``least`` to ``most``."""
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
    if wrong or (most is not None and value > most):
        limits = f"≥ {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} must be a whole number {limits}, got {value!r}")


def numbers(what: str, value: Any) -> tuple[float, ...]:
    """Return a number, or a sequence of one number for each channel, as finite floats; ValueError otherwise."""
    try:
        values = (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    except (TypeError, ValueError, OverflowError):
        values = ()
    if isinstance(value, str):  # whose letters may be digits
        values = ()
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{what} must be a number or one for each channel, got {value!r}")
    return values


def pattern_list(what: str, value: Any) -> list[str]:
    """Return a pattern, or several, as a list; ValueError for other types."""
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not patterns or not all(p and isinstance(p, str) for p in patterns):
        raise ValueError(f"{what} must be a name, a pattern or a list of patterns, got {value!r}")
    for pattern in patterns:
        matcher(what, pattern)
    return patterns


def without_path(quality: str) -> str:
    """Shorten ``contrique:/some/file`` to ``contrique``: a path of one machine means nothing on another.

    Example:
        >>> without_path("contrique:/some/file"), without_path("contrique:file"), without_path("pyiqa:piqe")
        ('contrique', 'contrique', 'pyiqa:piqe')
    """
    prefix, _, argument = quality.partition(":")
    return prefix if prefix == "contrique" or any(mark in argument for mark in "/\\") else quality


def check_foreign(options: Any) -> None:
    """Refuse a downloaded config that asks for more than names: computations, files, or sizes without bounds.

    Raises:
        ValueError: an option is a regular expression, which may run for ever, a file of this machine, or a number
            larger than any network needs; or ``options`` is no dict.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"must be options by name, got {type(options).__name__}")
    for key, value in options.items():
        if (largest := _largest(value)) > _MOST:
            raise ValueError(f"{key}: {largest} is more than any network has of anything (at most {_MOST})")
    for key in ("where", "site"):
        value = options.get(key)
        for pattern in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(pattern, str) and pattern.startswith("re:"):
                raise ValueError(
                    f"{key}={pattern[:80]!r} is a regular expression, and those of a saved config are not run, since "
                    f"one may take for ever; give names or globs: {key}='layer1.*'"
                )
    quality = options.get("quality")
    if isinstance(quality, str) and without_path(quality) != quality:
        raise ValueError(
            f"quality={quality[:80]!r} names a file of this machine, which a saved config may not open; a checkpoint "
            "of CONTRIQUE is given in the environment variable QUAC_CONTRIQUE"
        )


_MOST = 1 << 20


def _largest(value: Any) -> int:
    """Return the largest whole number in a value of a JSON file."""
    if isinstance(value, (list, tuple, Mapping)):
        return max(map(_largest, value.values() if isinstance(value, Mapping) else value), default=0)
    return abs(value) if isinstance(value, int) else 0


class QualityOptions:
    """The part of a config that says how q is computed from the host's images.

    A mixin of dataclasses, which declare these fields themselves: the order of their arguments is their own.
    """

    quality: str | Callable[[Tensor], Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channel_order: str
    quality_grad: bool
    quality_channels: int | None
    tap: str = "image"

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Make a config; a TypeError names the nearest option for an unknown one."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in options:
            if key not in known:
                raise TypeError(str(unknown(f"unknown option of {cls.__name__}:", key, known)))
        return super().__new__(cls)

    def check_quality(self) -> None:
        """Raise a ValueError or TypeError for a wrong value."""
        one_of("channel_order", self.channel_order, CHANNEL_ORDERS)
        if not isinstance(self.quality, str) and not callable(self.quality):
            raise TypeError(f"quality must be a name or a callable, got {type(self.quality).__name__}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                setattr(self, name, numbers(name, getattr(self, name)))
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have as many numbers, got {self.mean} and {self.std}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if not isinstance(self.quality_grad, bool):
            raise ValueError(f"quality_grad must be True or False, got {self.quality_grad!r}")
        if self.quality_channels is not None:
            whole_number("quality_channels", self.quality_channels)

    @property
    def has_own_quality(self) -> bool:
        """Return whether the quality function is a user's own callable, of which a file holds the name alone."""
        return isinstance(self.quality, str) and self.quality.startswith("callable:")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON can hold them; a callable ``quality`` becomes its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        if isinstance(self.quality, str):
            values["quality"] = without_path(self.quality)
        else:
            values["quality"] = f"callable:{getattr(self.quality, '__name__', type(self.quality).__name__)}"
        return values

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Build a config of the dict of :meth:`to_dict`; a ValueError names unknown fields."""
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown fields of {cls.__name__}: {', '.join(unknown)}. Known: {', '.join(sorted(known))}"
            )
        config = cls(**values)
        if isinstance(config.quality, str):
            config.quality = without_path(config.quality)
        return config
