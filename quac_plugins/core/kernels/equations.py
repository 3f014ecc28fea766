"""The equations as the native kernels compute them: y = x·A(x; c), with as little work a number as there can be.

``FORMS[equation]`` holds, for an equation f(x; θ) of :mod:`plain`, the coefficients c that follow from θ alone, the
gate A, and what backward needs, in C++; :mod:`gpu` has the same in Triton's language. An equation without an entry here
is computed as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quac_plugins.core.kernels import plain


@dataclass(frozen=True)
class Form:
    """One equation, in C++ of vectors of the type V, with ``fast_exp``.

    Attributes:
        coefficients: expressions of c in the parameters ``t[0]``, ``t[1]``, …; as many as there are parameters.
        gate: expression of A in ``x`` and ``c[0]``, ``c[1]``, ….
        partials: statements that set ``slope`` to ∂y/∂x, and ``part[0]``, … to what times ∂L/∂y is to be summed over
            all but batch and channels.
        gather: expressions of ∂L/∂θ in these sums ``s[0]``, … and ``t[0]``, ….
    """

    coefficients: tuple[str, ...]
    gate: str
    partials: str
    gather: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Return the number of sums that backward makes."""
        return self.partials.count("part[")


# g = σ(−c x), its slope s, and w, the derivative of x·g
_GATE_AND_SLOPE = "V t = {c} * x, g = V(1) / (V(1) + fast_exp(t)), s = g - g * g, w = g - t * s; "

FORMS: dict[Callable[..., Any], Form] = {
    # with c = −β (p1 − p2), so that a number costs one multiplication before the exponential
    plain.acon: Form(
        coefficients=("t[0] - t[1]", "t[1]", "t[2] * (t[1] - t[0])"),
        gate="c[0] / (V(1) + fast_exp(c[2] * x)) + c[1]",
        partials=_GATE_AND_SLOPE.format(c="c[2]")
        + "slope = c[0] * w + c[1]; part[0] = x; part[1] = x * w; part[2] = x * x * s;",
        gather=("s[1]", "s[0] - s[1]", "(t[0] - t[1]) * (t[0] - t[1]) * s[2]"),
    ),
    plain.swish: Form(
        coefficients=("V(0) - t[0]",),
        gate="V(1) / (V(1) + fast_exp(c[0] * x))",
        partials=_GATE_AND_SLOPE.format(c="c[0]") + "slope = w; part[0] = x * x * s;",
        gather=("s[0]",),
    ),
    # at 0 as automatic differentiation has it: the branch x ≥ 0
    plain.prelu: Form(
        coefficients=("t[0]",),
        gate="V::blendv(c[0], V(1), x >= V(0))",
        partials="slope = V::blendv(c[0], V(1), x >= V(0)); part[0] = V::blendv(x, V(0), x >= V(0));",
        gather=("s[0]",),
    ),
    plain.gelu: Form(
        coefficients=("t[0]",),
        gate=f"V(0.5) * (V(1) + (c[0] * x * V({math.sqrt(0.5)!r})).erf())",
        partials=f"V z = c[0] * x, density = fast_exp(V(-0.5) * z * z) * V({1 / math.sqrt(2 * math.pi)!r}); "
        f"slope = V(0.5) * (V(1) + (z * V({math.sqrt(0.5)!r})).erf()) + z * density; part[0] = x * x * density;",
        gather=("s[0]",),
    ),
}
