"""The fused kernels in C++, built by the compiler that torch.compile uses, for what its own loops are slow at.

Where the numbers of a channel do not lie together (channels_last, tokens), torch.compile makes four passes of backward,
one for each sum; these kernels make one. They are called without a graph's guards, which matters on small maps. x is
(B, C, N) in rows, with a number of each coefficient for a row, or (B, N, C) in columns, with one for each b and c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.vectors import ALONE, TYPES, prelude
from quac_plugins.core.native import load

CHUNK = 64
"""Rows of x whose sums one task makes; a constant, so that the sums do not depend on the number of threads."""

_SOURCE = """
constexpr int64_t COEFFICIENTS = {coefficients}, PARTS = {parts}, CHUNK = {chunk};
constexpr bool ONTO = {onto};  // y is added to what is there

// y = host(x) + x (A(x) - A0(x)), or x A(x)
static inline V gate(const V& x, const V* c) {{ return {gate_code}; }}
static inline V value(const V& x, const V* c) {{ {value_code} }}
static inline void partials(const V& x, const V* c, V& slope, V* part) {{ {partials_code} }}
static inline V derivative(const V& x, const V* c, V* part) {{ {derivative_code} }}

template <bool ROWS> static inline void pick(const S* coef, int64_t stride, int64_t i, int64_t count, V* c) {{
  for (int64_t k = 0; k < COEFFICIENTS; ++k)
    c[k] = ROWS ? V(coef[k * stride]) : V::loadu(coef + k * stride + i, count);
}}

static inline void write(T* y, const V& found, int64_t count = W) {{
  if constexpr (ONTO) out(in(y, count) + found, y, count);
  else out(found, y, count);
}}

template <bool ROWS> static inline void forward(const T* x, const S* coef, int64_t stride, T* y, int64_t n) {{
  V c[COEFFICIENTS];
  if (ROWS) pick<ROWS>(coef, stride, 0, W, c);
  int64_t i = 0;
  for (; i + UNROLL * W <= n; i += UNROLL * W) {{
    V found[UNROLL];
    for (int64_t u = 0; u < UNROLL; ++u) {{
      if (!ROWS) pick<ROWS>(coef, stride, i + u * W, W, c);
      found[u] = value(in(x + i + u * W), c);
    }}
    for (int64_t u = 0; u < UNROLL; ++u) write(y + i + u * W, found[u]);
  }}
  for (; i + W <= n; i += W) {{
    if (!ROWS) pick<ROWS>(coef, stride, i, W, c);
    write(y + i, value(in(x + i), c));
  }}
  if (i < n) {{
    if (!ROWS) pick<ROWS>(coef, stride, i, n - i, c);
    write(y + i, value(in(x + i, n - i), c), n - i);
  }}
}}

// the sums of rows are kept in `total`, those of columns are added to `sums`, `stride` apart as the coefficients;
// ONE: g is one number for all n
template <bool ROWS, bool ONE>
static inline void backward(
    const T* g, const T* x, const S* coef, int64_t stride, T* by_x, int64_t n, V* total, S* sums, int64_t apart) {{
  V c[COEFFICIENTS], part[PARTS];
  if (ROWS) pick<ROWS>(coef, stride, 0, W, c);
  int64_t i = 0;
  for (; i + W <= n; i += W) {{
    if (!ROWS) pick<ROWS>(coef, stride, i, W, c);
    V grad = ONE ? V(S(*g)) : in(g + i);
    out(grad * derivative(in(x + i), c, part), by_x + i);
    for (int64_t p = 0; p < PARTS; ++p)
      if (ROWS) total[p] = total[p] + grad * part[p];
      else (V::loadu(sums + p * apart + i) + grad * part[p]).store(sums + p * apart + i);
  }}
  if (i < n) {{  // loads fill up with zeros
    if (!ROWS) pick<ROWS>(coef, stride, i, n - i, c);
    V grad = ONE ? V::set(V(0), V(S(*g)), n - i) : in(g + i, n - i);
    out(grad * derivative(in(x + i, n - i), c, part), by_x + i, n - i);
    for (int64_t p = 0; p < PARTS; ++p)
      if (ROWS) total[p] = total[p] + grad * part[p];
      else (V::loadu(sums + p * apart + i, n - i) + grad * part[p]).store(sums + p * apart + i, n - i);
  }}
}}

extern "C" void kernel({arguments}) {{
{body}
}}
"""

# batch · rows · n numbers; in rows, rows = channels and n numbers a row; in columns, rows of n = channels numbers;
# shared: g (batch, channels) is the same all over a channel
_BODIES = {
    (True, False): """
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < batch * rows; ++r) forward<true>(x + r * n, coef + r, batch * rows, y + r * n, n);
""",
    (False, False): """
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < batch * rows; ++r)
    forward<false>(x + r * n, coef + r / rows * n, batch * n, y + r * n, n);
""",
    (True, True): """
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < batch * rows; ++r) {
    V total[PARTS];
    for (int64_t p = 0; p < PARTS; ++p) total[p] = V(0);
    if (shared) backward<true, true>(g + r, x + r * n, coef + r, batch * rows, by_x + r * n, n, total, nullptr, 0);
    else backward<true, false>(g + r * n, x + r * n, coef + r, batch * rows, by_x + r * n, n, total, nullptr, 0);
    for (int64_t p = 0; p < PARTS; ++p)
      sums[p * batch * rows + r] = at::vec::vec_reduce_all([](V a, V b) { return a + b; }, total[p]);
  }
""",
    (False, True): """
  int64_t chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < batch * chunks; ++task) {
    int64_t b = task / chunks, first = task % chunks * CHUNK;
    S* own = sums + task * PARTS * n;
    for (int64_t i = 0; i < PARTS * n; ++i) own[i] = 0;
    for (int64_t r = b * rows + first; r < b * rows + std::min(first + CHUNK, rows); ++r)
      backward<false, false>(
          g + (shared ? b : r) * n, x + r * n, coef + b * n, batch * n, by_x + r * n, n, nullptr, own, n);
  }
""",
}

_HOSTS = {  # with their slopes
    "": None,
    "identity": ("x", "V(1)"),
    "relu": ("at::vec::maximum(x, V(0))", "V::blendv(V(0), V(1), x > V(0))"),
    "relu6": ("at::vec::clamp(x, V(0), V(6))", "V::blendv(V(0), V(1), (x > V(0)) & (x < V(6)))"),
    "hardswish": (  # the order is torch's, to the bit
        "x * at::vec::clamp(x + V(3), V(0), V(6)) / V(6)",
        "V::blendv(V::blendv(V(0), V(1), x > V(0)), x / V(3) + V(0.5), x.abs() < V(3))",
    ),
}


@cache
def kernel(
    equation: str, dtype: torch.dtype, neutral: tuple[float, ...], host: str, by_rows: bool, back: bool, onto: bool
) -> Callable[..., None]:
    """A kernel, built at its first use and kept on disk by torch."""
    form, (stored, computed) = FORMS[equation], TYPES[dtype]
    constant = f"const V n[] = {{{', '.join(f'V({value!r})' for value in neutral)}}}; "
    own = _HOSTS[host]
    if neutral:
        value = f"{constant}return {own[0] + ' + ' if own else ''}x * (gate(x, c) - gate(x, n));"
        derivative = (
            f"{constant}V slope, before, unused[PARTS]; partials(x, n, before, unused); partials(x, c, slope, part); "
            f"return slope - before{' + ' + own[1] if own else ''};"
        )
    else:
        value, derivative = "return x * gate(x, c);", "V slope; partials(x, c, slope, part); return slope;"
    tensors = [f"const {stored}* g"] * back + [f"const {stored}* x", f"const {computed}* coef"]
    tensors += [f"{stored}* by_x", f"{computed}* sums"] if back else [f"{stored}* y"]
    arguments = [*tensors, *(f"const int64_t {name}" for name in ("batch", "rows", "n", "threads"))]
    arguments += ["const int64_t shared"] * back
    source = _SOURCE.format(
        chunk=CHUNK, onto=str(onto).lower(), parts=form.parts, body=_BODIES[by_rows, back],
        coefficients=form.arity, gate_code=form.gate_code, value_code=value,
        partials_code=form.partials_code, derivative_code=derivative, arguments="{arguments}",
    )  # fmt: skip
    return load(arguments, prelude(dtype) + source)


def run(
    inputs: tuple[Tensor, ...], sizes: Sequence[int], c: Tensor, equation: str, neutral: tuple[float, ...],
    host: str, by_rows: bool, onto: Tensor | None = None,
) -> Any:  # fmt: skip
    """y of inputs (x,), or the gradient of x and the sums of inputs (grad, x).

    The sums are (parts, B, C) in rows; in columns (B, chunks, parts, C), still to be summed over the chunks.

    Args:
        inputs: dense and of the same strides; of any shape, which is that of the result. A gradient that is the same
            all over a channel may be (B, C) instead.
        sizes: of the rows (B, C, N) or of the columns (B, N, C) that they are in memory.
        c: coefficients (K, B, C).
        equation: a name of ``FORMS``.
        neutral: the coefficients of θ⁰, or none.
        host: what is added inside: a key of ``_HOSTS``; ``""``: nothing.
        by_rows: see ``sizes``.
        onto: y is added to this, in place; of shape, strides and dtype of x.
    """
    x, back = inputs[-1], len(inputs) == 2
    batch, rows, n = sizes
    threads = 1 if x.numel() < ALONE else torch.get_num_threads()
    code = kernel(equation, x.dtype, neutral, host, by_rows, back, onto is not None)
    out = torch.empty_like(x) if onto is None else onto
    if not back:
        code(x, c, out, *sizes, threads)
        return out
    parts = FORMS[equation].parts
    sums = c.new_empty((parts, batch, rows) if by_rows else (batch, -(-rows // CHUNK), parts, n))
    code(*inputs, c, out, sums, *sizes, threads, int(inputs[0].numel() < x.numel()))
    return out, sums
