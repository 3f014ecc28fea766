"""What comes of a pass whose q is hard to know: each case says whether it is right or refused, and is held to it."""

import contextlib

import pytest

from quac_plugins import QualityError

RIGHT, REFUSED = "right", "refused"


def held_to(outcome, match=None):
    """The block computes something and compares it: to the end where it is right, to a QualityError where refused."""
    return pytest.raises(QualityError, match=match) if outcome == REFUSED else contextlib.nullcontext()
