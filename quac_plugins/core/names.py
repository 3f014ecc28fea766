"""What is said of a name that is not among the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, value: object, known: Iterable[str], nearest: Iterable[str] | None = None) -> ValueError:
    """The error that names the value, the nearest known name, and all of them.

    Args:
        what: the beginning, such as ``"unknown activation"``.
        known: is listed.
        nearest: where the nearest is looked for; by default ``known``.

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
