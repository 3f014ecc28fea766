"""Docstrings as griffe reads them: an ``Example:`` is a section, names of one text are apart, roles are plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "    p1, p2: (1, C, 1, 1)" with the deeper lines below it
_SHARED = re.compile(r"^( +)([\w*]+(?:, [\w*]+)+): (.*(?:\n\1 +.*)*)", flags=re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed; those of the package stay as they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        text = _SHARED.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
        text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
        obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", text)
