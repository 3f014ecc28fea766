"""Parsing texts of the command line."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = ["key_values", "matching", "numbers"]

T = TypeVar("T")
_COMMA = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")  # a comma before the next key, not one inside of a value
_WORDS = {"true": True, "false": False, "none": None}


def numbers(text: str | None, kind: Callable[[str], T], what: str) -> list[T] | None:
    """Split at commas and convert; None stays None.

    Raises:
        ValueError: a part cannot be converted.

    Example:
        >>> numbers("1,3,5", int, "--severities")
        [1, 3, 5]
    """
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what}: expected numbers separated by commas, got {text!r}") from None


def key_values(texts: Iterable[str]) -> dict[str, Any]:
    """Read ``k=v,k2=v2`` texts. A value is a Python literal, true, false or none, and else a string.

    Raises:
        ValueError: if there is no ``=``, or no key before it.

    Example:
        >>> key_values(["pad_type=same,drop_rate=0.1", "img_size=(64, 96),scale=true"])
        {'pad_type': 'same', 'drop_rate': 0.1, 'img_size': (64, 96), 'scale': True}
    """
    values = {}
    for pair in (pair for text in texts for pair in _COMMA.split(text) if pair.strip()):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"--model-kwargs: expected key=value, got {pair!r}")
        values[key.strip()] = _value(value.strip())
    return values


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that match a pattern with ``*``, ``?`` and ``[…]``, or contain one without them.

    Example:
        >>> matching(["fog", "frost", "glass_blur"], "f*"), matching(["fog", "frost", "glass_blur"], "blur")
        (['fog', 'frost'], ['glass_blur'])
    """
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
