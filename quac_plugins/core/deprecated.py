"""Old names that keep working for one version, each with a warning that says the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def warn_of(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``new`` takes the place of ``old``; ``stacklevel`` counts from the caller."""
    message = f"{old} is deprecated and will be gone in the next version: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def renamed(**names: str) -> Callable[[T], T]:
    """Let a function, or the constructor of a class, take arguments by their old names too.

    Args:
        **names: old name → new name. Both in one call are a TypeError.

    Example:
        >>> @renamed(colour="color")
        ... def paint(color: str) -> str:
        ...     return color
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     paint(colour="red"), str(caught[0].message)
        ('red', 'colour= of paint is deprecated and will be gone in the next version: use color=')
    """

    def decorate(target: T) -> T:
        if isinstance(target, type):
            target.__init__ = _taking_old(target.__init__, names, target.__name__)  # type: ignore[misc]
            return target
        return _taking_old(target, names, getattr(target, "__qualname__", ""))

    return decorate


def _taking_old(function: Any, names: Mapping[str, str], where: str) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old, new in names.items():
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{where} got {old}= and {new}=, the old and the new name of one argument")
                warn_of(f"{old}= of {where}", f"{new}=")
                kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def moved(module: str, otherwise: Callable[[str], Any] | None = None, /, **places: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose names have moved: each gives what it gave, with a warning.

    Args:
        module: its name.
        otherwise: the ``__getattr__`` for all other names.
        **places: name → the module where it is now, or ``"module:name"`` where it has another name.
    """

    def __getattr__(name: str) -> Any:
        if name not in places:
            if otherwise is not None:
                return otherwise(name)
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = places[name].partition(":")
        warn_of(f"{module}.{name}", f"{place}.{new or name}")
        return getattr(import_module(place), new or name)

    return __getattr__
