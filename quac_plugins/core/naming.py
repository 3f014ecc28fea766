"""Names: suffixes of model names, errors for unknown names, and patterns."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable

SUFFIXES = ("_qacon", "_ddp", "_qacon_ddp")  # of names of hosts with what this package puts in


def split_name(name: str) -> tuple[str, str]:
    """Split a model name into the host's name, with its tag, and the suffix ``_qacon``, ``_ddp`` or ``_qacon_ddp``.

    Example:
        >>> split_name("resnet50_qacon_ddp.a1_in1k"), split_name("resnet50"), split_name("hf-hub:me/model_ddp")
        (('resnet50.a1_in1k', '_qacon_ddp'), ('resnet50', ''), ('hf-hub:me/model_ddp', ''))
    """
    architecture, dot, tag = name.partition(".")
    ends = (end for end in SUFFIXES if architecture.endswith(end) and ":" not in name)
    suffix = max(ends, key=len, default="")
    return architecture.removesuffix(suffix) + dot + tag, suffix


def unknown(what: str, value: object, known: Iterable[str], nearest: Iterable[str] | None = None) -> ValueError:
    """Return a ValueError that names the value, the nearest known name, and all known names.

    Args:
        what: the beginning of the message, such as ``"unknown activation"``.
        value: the unknown name.
        known: the names that the message lists.
        nearest: the names among which the nearest is sought. None: ``known``.

    Example:
        >>> print(unknown("unknown activation", "qacom", ["acon", "qacon"]))
        unknown activation 'qacom'; did you mean 'qacon'? Known: acon, qacon
        >>> print(unknown("unknown activation", "xyz", ["acon", "qacon"]))
        unknown activation 'xyz'. Known: acon, qacon
    """
    known = list(known)
    close = difflib.get_close_matches(str(value), list(known if nearest is None else nearest), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ValueError(f"{what} {value!r}{hint} Known: {', '.join(known)}")


def matcher(what: str, pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches a glob, or holds a match of ``re:`` and a regular expression.

    Raises:
        ValueError: the pattern after ``re:`` is not a regular expression; ``what`` begins the message.

    Example:
        >>> list(map(matcher("where", "layer?"), ["layer1", "fc"])), matcher("where", "re:r[1-3]$")("layer4")
        ([True, False], False)
    """
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        regex = re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"{what}={pattern!r} is not a regular expression: {error}") from error
    return lambda name: regex.search(name) is not None
