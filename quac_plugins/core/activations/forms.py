"""The equations as the fused kernels compute them: y = x·A(x; c), with as little work a number as there can be.

``FORMS[equation]`` holds, for an equation f(x; θ) of :mod:`reference`, the coefficients c that follow from θ alone, the
gate A, what backward needs, each once for torch and once in C++. An equation that has an entry here gets a fused
kernel; one that has none is used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quac_plugins.core.activations import reference

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """One equation.

    Attributes:
        coefficients: c of θ.
        coefficients_code: the same in C++, of numbers ``t[0]``, ``t[1]``, …, comma-separated.
        gate: A of x and c.
        partials: ∂y/∂x of x and c, and the parts that times ∂L/∂y are to be summed over all but batch and channels.
        gather: ∂L/∂θ of these sums and θ.
        gather_code: the same in C++, of ``s[0]``, … and ``t[0]``, …, comma-separated.
        parts: how many parts there are.
        gate_code: C++ expression of A, with ``fast_exp``; ``x`` and ``c[0]``, ``c[1]``, … are vectors of the type V.
        partials_code: C++ statements that set ``slope`` and ``part[0]``, ….
    """

    coefficients: Callable[..., Tensors]
    coefficients_code: str
    gate: Callable[..., Tensor]
    partials: Callable[..., tuple[Tensor, Tensors]]
    gather: Callable[[Tensors, Tensors], Tensors]
    gather_code: str
    parts: int
    gate_code: str
    partials_code: str

    @property
    def arity(self) -> int:
        """How many parameters the equation has, and as many coefficients."""
        return self.coefficients.__code__.co_argcount


def _gate_and_slope(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g = σ(−c x), its slope g (1 − g), and the derivative of x·g."""
    t = c * x
    g = 1 / (1 + t.exp())
    s = g - g * g
    return g, s, g - t * s


_GATE_AND_SLOPE = "V t = {c} * x, g = V(1) / (V(1) + fast_exp(t)), s = g - g * g, w = g - t * s;"


def _acon(x: Tensor, a: Tensor, p2: Tensor, c: Tensor) -> tuple[Tensor, Tensors]:
    _, s, w = _gate_and_slope(x, c)
    return a * w + p2, (x, x * w, x * x * s)


def _swish(x: Tensor, c: Tensor) -> tuple[Tensor, Tensors]:
    _, s, w = _gate_and_slope(x, c)
    return w, (x * x * s,)


def _prelu(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensors]:
    # at 0 as automatic differentiation has it: the branch x ≥ 0
    return torch.where(x >= 0, 1.0, slope), (torch.where(x >= 0, 0.0, x),)


def _gelu(x: Tensor, beta: Tensor) -> tuple[Tensor, Tensors]:
    z = beta * x
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density, (x * x * density,)


FORMS: dict[str, Form] = {
    # with c = −β (p1 − p2), so that a number costs one multiplication before the exponential
    "acon": Form(
        coefficients=lambda p1, p2, beta: (p1 - p2, p2, beta * (p2 - p1)),
        coefficients_code="t[0] - t[1], t[1], t[2] * (t[1] - t[0])",
        gate=lambda x, a, p2, c: a / (1 + torch.exp(c * x)) + p2,
        partials=_acon,
        gather=lambda sums, theta: (sums[1], sums[0] - sums[1], (theta[0] - theta[1]) ** 2 * sums[2]),
        gather_code="s[1], s[0] - s[1], (t[0] - t[1]) * (t[0] - t[1]) * s[2]",
        parts=3,
        gate_code="c[0] / (V(1) + fast_exp(c[2] * x)) + c[1]",
        partials_code=_GATE_AND_SLOPE.format(c="c[2]")
        + "slope = c[0] * w + c[1]; part[0] = x; part[1] = x * w; part[2] = x * x * s;",
    ),
    "swish": Form(
        coefficients=lambda beta: (-beta,),
        coefficients_code="-t[0]",
        gate=lambda x, c: 1 / (1 + torch.exp(c * x)),
        partials=_swish,
        gather=lambda sums, theta: sums,
        gather_code="s[0]",
        parts=1,
        gate_code="V(1) / (V(1) + fast_exp(c[0] * x))",
        partials_code=_GATE_AND_SLOPE.format(c="c[0]") + "slope = w; part[0] = x * x * s;",
    ),
    "prelu": Form(
        coefficients=lambda slope: (slope,),
        coefficients_code="t[0]",
        gate=lambda x, slope: torch.where(x >= 0, 1.0, slope),
        partials=_prelu,
        gather=lambda sums, theta: sums,
        gather_code="s[0]",
        parts=1,
        gate_code="V::blendv(c[0], V(1), x >= V(0))",
        partials_code="slope = V::blendv(c[0], V(1), x >= V(0)); part[0] = V::blendv(x, V(0), x >= V(0));",
    ),
    "gelu": Form(
        coefficients=lambda beta: (beta,),
        coefficients_code="t[0]",
        gate=lambda x, beta: 0.5 * (1 + torch.erf(beta * x * math.sqrt(0.5))),
        partials=_gelu,
        gather=lambda sums, theta: sums,
        gather_code="s[0]",
        parts=1,
        gate_code=f"V(0.5) * (V(1) + (c[0] * x * V({math.sqrt(0.5)!r})).erf())",
        partials_code=f"V z = c[0] * x, density = fast_exp(V(-0.5) * z * z) * V({1 / math.sqrt(2 * math.pi)!r}); "
        f"slope = V(0.5) * (V(1) + (z * V({math.sqrt(0.5)!r})).erf()) + z * density; part[0] = x * x * density;",
    ),
}


def equation_of(name: str) -> Callable[..., Tensor]:
    """The plain equation of a name in ``FORMS``."""
    return getattr(reference, name)


EQUATIONS = frozenset(map(equation_of, FORMS))
"""The plain equations that have a form."""
