"""Old names, which work for one more version; each use warns and tells the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def warn_of(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``new`` replaces ``old``; ``stacklevel`` counts frames from the caller of this function."""
    message = f"{old} is deprecated and will be gone in the next version: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def renamed(**names: str) -> Callable[[T], T]:
    """Let a function, or the constructor of a class, take arguments by their old names too.

    An instance of the class also has the new attribute under the old name.

    Args:
        **names: old name → new name. A call that gives both raises a TypeError.

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
            for old, new in names.items():
                setattr(target, old, _attribute(old, new))
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


def _attribute(old: str, new: str) -> property:
    def get(instance: Any) -> Any:
        value = getattr(instance, new)
        warn_of(f"{type(instance).__name__}.{old}", f".{new}")
        return value

    def put(instance: Any, value: Any) -> None:
        warn_of(f"{type(instance).__name__}.{old}", f".{new}")
        setattr(instance, new, value)

    return property(get, put, doc=f"The old name of ``{new}``.")


def moved(module: str, otherwise: Callable[[str], Any] | None = None, /, **places: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose names have moved: it warns and looks the name up in its new place.

    Args:
        module: the name of the module.
        otherwise: the ``__getattr__`` for all other names. None: other names raise an AttributeError.
        **places: old name → the new module, or ``"module:name"`` if the name has changed too.
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
