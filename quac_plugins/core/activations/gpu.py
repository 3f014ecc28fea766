"""The fused backward of columns in Triton, for what torch.compile is slow at on a GPU.

Of channels_last and tokens torch.compile makes two passes of backward: x and its gradient would be read once for the
sums, and again for the gradient of x. This kernel reads and writes each number once. Its arithmetic is written from the
torch expressions of :mod:`forms`; it is computed in float32, for x in float32, bfloat16 and float16.
"""

from __future__ import annotations

import hashlib
import linecache
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from quac_plugins.core.activations.forms import FORMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 128
"""Rows of x, at most, whose sums one program makes."""
TILE = 1024
"""Numbers that a program holds at a time."""

_SOURCE = """
import triton
import triton.language as tl

@triton.jit
def kernel(grad_of, x_of, c_of, by_x_of, sums_of, batch, rows, channels, pieces,
           PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    b, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < channels
    own = c_of + b * channels + column
{coefficients}
{zeros}
    for first in range(0, PIECE, ROWS):
        row = piece * PIECE + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & here[None, :]
        at = (b.to(tl.int64) * rows + row)[:, None] * channels + column[None, :]
        x = tl.load(x_of + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_of + at, mask=inside, other=0.0).to(tl.float32)
{arithmetic}
        tl.store(by_x_of + at, (grad * ({slope})).to(by_x_of.dtype.element_ty), mask=inside)
{added}
    own_sums = sums_of + tl.program_id(0).to(tl.int64) * {parts} * channels + column
{stored}
"""


def backward(
    grad: Tensor,
    x: Tensor,
    c: Tensor,
    equation: str,
    neutral: tuple[float, ...],
    slope_of_host: Callable[[Any], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the sums (B, pieces, parts, C), still to be summed over the pieces.

    Args:
        grad: as x.
        x: (B, N, C), contiguous, of one of ``DTYPES``.
        c: float32 coefficients (K, B, C).
        equation: a name of ``FORMS``.
        neutral: the coefficients of θ⁰, or none.
        slope_of_host: the derivative of what is added inside, or nothing.

    Raises:
        ImportError: there is no Triton.
    """
    batch, rows, channels = x.shape
    piece = min(PIECE, 1 << max(rows - 1, 0).bit_length())
    parts, pieces = FORMS[equation].parts, -(-rows // piece)
    by_x, sums = torch.empty_like(x), c.new_empty(batch, pieces, parts, channels)
    if x.numel():
        block = min(64, 1 << max(channels - 1, 15).bit_length())
        grid = (batch * pieces, -(-channels // block))
        with torch.cuda.device_of(x):
            kernel(equation, neutral, slope_of_host)[grid](
                grad, x, c.contiguous(), by_x, sums, batch, rows, channels, pieces,
                PIECE=piece, ROWS=min(piece, TILE // block), BLOCK=block,
            )  # fmt: skip
    return by_x, sums


@cache
def kernel(equation: str, neutral: tuple[float, ...], slope_of_host: Callable[[Any], Any] | None) -> Any:
    """A kernel of Triton, which compiles it at its first use and keeps it on disk."""
    text = source(equation, neutral, slope_of_host)
    # Triton reads the source of a function, from where Python keeps what has no file
    name = f"<quac_plugins {equation} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, name, "exec"), space)
    return space["kernel"]


def source(equation: str, neutral: tuple[float, ...], slope_of_host: Callable[[Any], Any] | None) -> str:
    """Its Python.

    Raises:
        NotImplementedError: an operation of the expression has no counterpart here.
    """
    form, code = FORMS[equation], _Code()
    x, c = code.given("x"), [code.given(f"c{k}") for k in range(form.arity)]
    slope, parts = form.partials(x, *c)
    if neutral:
        slope = slope - form.partials(x, *neutral)[0]
    if slope_of_host:
        slope = slope + slope_of_host(x)
    numbers, ks = range(form.parts), range(form.arity)
    return _SOURCE.format(
        parts=form.parts,
        slope=code.name(slope),
        arithmetic=_lines(8, code.lines()),
        coefficients=_lines(
            4, [f"c{k} = tl.load(own + {k} * batch * channels, mask=here, other=0.0)[None, :]" for k in ks]
        ),
        zeros=_lines(4, [f"sum{p} = tl.zeros((ROWS, BLOCK), tl.float32)" for p in numbers]),
        added=_lines(8, [f"sum{p} += tl.where(inside, grad * ({code.name(parts[p])}), 0.0)" for p in numbers]),
        stored=_lines(4, [f"tl.store(own_sums + {p} * channels, tl.sum(sum{p}, axis=0), mask=here)" for p in numbers]),
    )


def _lines(indent: int, lines: list[str]) -> str:
    return "\n".join(" " * indent + line for line in lines)


_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.gt: ">", operator.ge: ">=", operator.lt: "<", operator.and_: "&",
}  # fmt: skip
_CALLS = {torch.exp: "tl.exp", "exp": "tl.exp", torch.erf: "tl.erf", torch.where: "tl.where", "abs": "tl.abs"}


class _Code:
    """An expression of torch, as it is computed on stand-ins, in the language of Triton."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)

    def given(self, name: str) -> fx.Proxy:
        """A stand-in for what has this name."""
        return fx.Proxy(self.graph.placeholder(name), self.tracer)

    def name(self, value: Any) -> str:
        """Of a result of the expression, or a number."""
        value = getattr(value, "node", value)
        return str(value) if isinstance(value, fx.Node) else repr(float(value))

    def lines(self) -> list[str]:
        """What computes it."""
        return [f"{node} = {self._operation(node)}" for node in self.graph.nodes if node.op != "placeholder"]

    def _operation(self, node: fx.Node) -> str:
        arguments = [self.name(a) for a in node.args if isinstance(a, (fx.Node, int, float))]
        if node.target is getattr and node.args[1] == "dtype":
            return "tl.float32"
        if node.target == "to":
            return f"{arguments[0]}.to({arguments[1]})"
        if node.target in _INFIX:
            return f"{arguments[0]} {_INFIX[node.target]} {arguments[1]}"
        if node.target in _CALLS:
            return f"{_CALLS[node.target]}({', '.join(arguments)})"
        name = getattr(node.target, "__name__", node.target)
        raise NotImplementedError(f"{name} has no counterpart in Triton here: add it to _CALLS or _INFIX in {__name__}")
