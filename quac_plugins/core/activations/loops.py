"""The forms over flat tensors in torch's own operations, as they are or compiled, and what runs them on a GPU.

x is (B, C, N) in rows, or (B, N, C) in columns. Half precision is computed in float32.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.activations import gpu
from quac_plugins.core.activations.forms import FORMS

COMPUTED = {
    torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32,
    torch.float64: torch.float64,
}  # fmt: skip
"""dtype of x → of the arithmetic."""
PART = 128
"""Numbers of a row, at least, that backward sums up by themselves, where they divide it."""

HOSTED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Any]]] = {  # with their slopes
    "identity": (lambda x: x, lambda x: 1),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "relu6": (F.relu6, lambda x: ((x > 0) & (x < 6)).to(x.dtype)),
    "hardswish": (F.hardswish, lambda x: torch.where(x.abs() < 3, x / 3 + 0.5, (x > 0).to(x.dtype))),
}


def value(name: str, x: Tensor, c: list[Tensor], neutral: list[float], host: str) -> Tensor:
    """y of x and the coefficients, which broadcast."""
    wide = x.to(COMPUTED[x.dtype])
    gate = FORMS[name].gate(wide, *c)
    if neutral:
        gate = gate - FORMS[name].gate(wide, *_numbers(neutral, wide))
    y = wide * gate
    return (HOSTED[host][0](wide) + y if host else y).to(x.dtype)


def gradients(
    name: str, grad: Tensor, x: Tensor, c: list[Tensor], neutral: list[float], host: str
) -> tuple[Tensor, list[Tensor]]:
    """Of x, and the parts still to be summed."""
    wide, grad = x.to(COMPUTED[x.dtype]), grad.to(COMPUTED[x.dtype])
    by_x, parts = FORMS[name].partials(wide, *c)
    if neutral:
        by_x = by_x - FORMS[name].partials(wide, *_numbers(neutral, wide))[0]
    if host:
        by_x = by_x + HOSTED[host][1](wide)
    return (grad * by_x).to(x.dtype), [grad * part for part in parts]


def _numbers(values: list[float], like: Tensor) -> list[Tensor]:
    return [torch.full((1,), value, dtype=like.dtype, device=like.device) for value in values]


def in_torch(
    flat: list[Tensor], c: Tensor, name: str, neutral: tuple[float, ...], host: str, by_rows: bool, compiled: bool
) -> Any:
    """y of (x,), or the gradient of x and the sums (parts, B, C) of (grad, x); c is (K, B, C)."""
    back = len(flat) == 2
    loop = _loop(name, flat[0].dtype, neutral, host, by_rows, back)[compiled]
    if not (back and by_rows):
        return loop(*flat, *c.unsqueeze(3 if by_rows else 2))
    # in one pass, since divided, and not by the compiler; and by as many processors of a GPU as there are
    part = _part(flat[0].shape[2])
    by_x, sums = loop(*(t.unflatten(2, (t.shape[2] // part, part)) for t in flat), *c[..., None, None])
    return by_x.flatten(2), sums.sum(3)


@cache
def _part(count: int) -> int:
    """The shortest equal part, of PART numbers or more, of so many numbers; all of them where there is none."""
    return next((n for n in range(PART, min(count, 16 * PART)) if count % n == 0), max(count, 1))


@cache
def _loop(name: str, dtype: torch.dtype, neutral: tuple[float, ...], host: str, by_rows: bool, back: bool) -> Any:
    """A loop of one expression; each has a code object of its own, by which torch.compile counts its variants."""
    if back:

        def expression(grad: Tensor, x: Tensor, *c: Tensor) -> tuple[Tensor, Tensor]:
            by_x, parts = gradients(name, grad, x, list(c), list(neutral), host)
            return by_x, torch.stack([part.sum(-1 if by_rows else 1) for part in parts])
    else:

        def expression(x: Tensor, *c: Tensor) -> Tensor:  # type: ignore[misc]
            return value(name, x, list(c), list(neutral), host)

    own = types.FunctionType(
        expression.__code__.replace(), globals(), expression.__name__, None, expression.__closure__
    )
    # a sum of rows that the compiler divides is a pass of its own
    options: Any = {"split_reductions": False} if back and by_rows else None
    return own, torch.compile(own, dynamic=True, options=options)


def on_gpu(flat: list[Tensor], c: Tensor, name: str, neutral: tuple[float, ...], host: str, by_rows: bool) -> Any:
    """As :func:`in_torch`, in one pass of Triton: its own, or for the backward of columns that of :mod:`gpu`."""
    if by_rows or len(flat) == 1 or flat[0].dtype not in gpu.DTYPES:
        return in_torch(flat, c, name, neutral, host, by_rows, compiled=True)
    grad, x = flat
    by_x, sums = gpu.backward(grad, x, c, name, neutral, HOSTED[host][1] if host else None)
    return by_x, sums.sum(1).transpose(0, 1)
