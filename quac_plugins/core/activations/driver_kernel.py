"""The driver in C++: from x to the coefficients of the kernel that activates it, see :mod:`driver_cpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.vectors import TYPES, prelude
from quac_plugins.core.native import load

COMMON = """
#include <cmath>
#include <vector>
enum { NONE, FIXED, BATCH, GROUP };

static inline S total(const V& v) { return at::vec::vec_reduce_all([](V a, V b) { return a + b; }, v); }

static inline double row_sum(const T* x, int64_t n) {
  double found = 0;
  constexpr int64_t PIECE = 4096;
  for (int64_t at = 0; at < n; at += PIECE) {  // since a long sum in float loses digits
    const int64_t count = std::min(PIECE, n - at);
    const T* from = x + at;
    int64_t i = 0;
    V sum[UNROLL];
    for (V& part : sum) part = V(0);
    for (; i + UNROLL * W <= count; i += UNROLL * W)
      for (int64_t u = 0; u < UNROLL; ++u) sum[u] = sum[u] + in(from + i + u * W);
    for (; i < count; i += W) sum[0] = sum[0] + in(from + i, std::min(W, count - i));
    found += total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return found;
}

constexpr int64_t COLUMNS = W >= 16 ? 16 : 8;  // vectors, as many as there are registers for

template <bool FULL, class U>
static inline void tile_sums(const U* x, int64_t rows, int64_t n, int64_t count, S* sums) {
  constexpr int64_t PIECE = 128;  // rows: a long sum in float loses digits
  for (int64_t first = 0; first < rows; first += PIECE) {
    V sum[COLUMNS];
    for (V& part : sum) part = V(0);
    for (int64_t r = first; r < std::min(first + PIECE, rows); ++r) {
      const U* from = x + r * n;
      if constexpr (FULL)
        for (int64_t k = 0; k < COLUMNS; ++k) sum[k] = sum[k] + in(from + k * W);
      else
        for (int64_t k = 0; k * W < count; ++k) sum[k] = sum[k] + in(from + k * W, std::min(W, count - k * W));
    }
    for (int64_t k = 0; k * W < count; ++k) {
      const int64_t last = std::min(W, count - k * W);
      (V::loadu(sums + k * W, last) + sum[k]).store(sums + k * W, last);
    }
  }
}

// row after row, a tile of the columns in registers: several rows at a time are read at half the speed
template <class U> static inline void column_sums(const U* x, int64_t rows, int64_t n, S* sums) {
  std::fill(sums, sums + n, S(0));
  int64_t at = 0;
  for (; at + COLUMNS * W <= n; at += COLUMNS * W) tile_sums<true>(x + at, rows, n, COLUMNS * W, sums + at);
  if (at < n) tile_sums<false>(x + at, rows, n, n - at, sums + at);
}

// mean and variance of a row
static inline void row_moments(const S* row, int64_t n, double& mean, double& variance) {
  mean = variance = 0;
  for (int64_t i = 0; i < n; ++i) mean += row[i];
  mean /= n;
  for (int64_t i = 0; i < n; ++i) variance += (row[i] - mean) * (row[i] - mean);
  variance /= n;
}

// of each column over the batch, or as they are kept
static inline void moments(
    const S* x, int64_t batch, int64_t n, bool fixed, const S* mean, const S* variance, double* m, double* v) {
  if (fixed) {
    std::copy(mean, mean + n, m);
    std::copy(variance, variance + n, v);
    return;
  }
  std::fill(m, m + n, 0.0);
  std::fill(v, v + n, 0.0);
  for (int64_t b = 0; b < batch; ++b) for (int64_t i = 0; i < n; ++i) m[i] += x[b * n + i];
  for (int64_t i = 0; i < n; ++i) m[i] /= batch;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) v[i] += (x[b * n + i] - m[i]) * (x[b * n + i] - m[i]);
  for (int64_t i = 0; i < n; ++i) v[i] /= batch;
}
"""
"""What the driver and its gradients share: sums, means and variances."""

_SOURCE = """
constexpr int64_t SUMMED = {summed};

template <int64_t OUTPUTS, int64_t ROWS>
static inline void dots(const S* w, const S* bias, const S* in, S* out, int64_t from, int64_t to) {{
  V sum[OUTPUTS][ROWS];
  for (auto& row : sum) for (V& one : row) one = V(0);
  for (int64_t i = 0; i < from; i += W) {{
    int64_t count = std::min(W, from - i);
    V weight[OUTPUTS];
    for (int64_t o = 0; o < OUTPUTS; ++o) weight[o] = V::loadu(w + o * from + i, count);
    for (int64_t b = 0; b < ROWS; ++b) {{
      V value = V::loadu(in + b * from + i, count);
      for (int64_t o = 0; o < OUTPUTS; ++o) sum[o][b] = at::vec::fmadd(weight[o], value, sum[o][b]);
    }}
  }}
  for (int64_t o = 0; o < OUTPUTS; ++o)
    for (int64_t b = 0; b < ROWS; ++b) out[b * to + o] = bias[o] + total(sum[o][b]);
}}

// out (batch, to) = in (batch, from) wᵀ + bias; libtorch's gemm is not among what it exports
static void linear(
    const S* w, const S* bias, const S* in, S* out, int64_t batch, int64_t from, int64_t to, int64_t threads) {{
#pragma omp parallel for num_threads(batch * from * to < ALONE ? 1 : threads)
  for (int64_t o = 0; o < to / 2 + to % 2; ++o) {{
    const S *weight = w + 2 * o * from, *start = bias + 2 * o;
    S* own = out + 2 * o;
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4)
      if (2 * o + 1 < to) dots<2, 4>(weight, start, in + b * from, own + b * to, from, to);
      else dots<1, 4>(weight, start, in + b * from, own + b * to, from, to);
    for (; b < batch; ++b)
      if (2 * o + 1 < to) dots<2, 1>(weight, start, in + b * from, own + b * to, from, to);
      else dots<1, 1>(weight, start, in + b * from, own + b * to, from, to);
  }}
}}

static void norm(
    S* z, int64_t batch, int64_t n, int64_t kind, int64_t groups, double eps, double momentum, const S* weight,
    const S* bias, S* mean, S* variance, int64_t* tracked) {{
  if (kind == NONE) return;
  if (kind == GROUP) {{
    int64_t size = n / groups;
    for (int64_t r = 0; r < batch * groups; ++r) {{
      S* row = z + r * size;
      double m, v;
      row_moments(row, size, m, v);
      const double scale = 1 / std::sqrt(v + eps);
      for (int64_t i = 0; i < size; ++i) {{
        int64_t channel = r % groups * size + i;
        row[i] = S((row[i] - m) * scale * weight[channel] + bias[channel]);
      }}
    }}
    return;
  }}
  std::vector<double> m(n), v(n);
  moments(z, batch, n, kind == FIXED, mean, variance, m.data(), v.data());
  if (kind == BATCH) {{
    for (int64_t i = 0; i < n; ++i) {{
      mean[i] = S((1 - momentum) * mean[i] + momentum * m[i]);
      variance[i] = S((1 - momentum) * variance[i] + momentum * v[i] * batch / (batch - 1));
    }}
    ++*tracked;
  }}
  for (int64_t i = 0; i < n; ++i) v[i] = weight[i] / std::sqrt(v[i] + eps);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) z[b * n + i] = S((z[b * n + i] - m[i]) * v[i] + bias[i]);
}}

static void sigmoid(S* z, int64_t n) {{
  for (int64_t i = 0; i < n; i += W) {{
    int64_t count = std::min(W, n - i);
    (V(1) / (V(1) + fast_exp(V(0) - V::loadu(z + i, count)))).store(z + i, count);
  }}
}}

// what backward needs lies one after the other in `kept`: z, what the norms were given and returned, h, the numbers
extern "C" void kernel({arguments}) {{
  const int64_t channels = by_rows ? rows : n, pixels = by_rows ? n : rows, width = channels + quality;
  std::vector<S> own(keep ? 0 : batch * (3 * width + 2 * hidden + numbers * channels));
  S* z = keep ? kept : own.data();
  S *given1 = z + batch * width, *inside = given1 + batch * hidden, *given2 = inside + batch * hidden;
  S *h = given2 + batch * width, *last = h + batch * width;
  if (by_rows) {{
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < batch * rows; ++r)
      z[r / rows * width + r % rows] = S(row_sum(x + r * n, n) / pixels);
  }} else {{  // in chunks of rows, so that the sums do not depend on the number of threads
    const int64_t chunks = (rows + SUMMED - 1) / SUMMED;
    std::vector<S> sums(batch * chunks * n);
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < batch * chunks; ++task) {{
      int64_t first = task % chunks * SUMMED;
      column_sums(x + (task / chunks * rows + first) * n, std::min(SUMMED, rows - first), n, sums.data() + task * n);
    }}
    std::vector<double> found(n);
    for (int64_t b = 0; b < batch; ++b) {{
      std::fill(found.begin(), found.end(), 0.0);
      for (int64_t k = 0; k < chunks; ++k)
        for (int64_t i = 0; i < n; ++i) found[i] += sums[(b * chunks + k) * n + i];
      for (int64_t i = 0; i < n; ++i) z[b * width + i] = S(found[i] / pixels);
    }}
  }}
  for (int64_t b = 0; b < batch; ++b) std::copy(q + b * quality, q + (b + 1) * quality, z + b * width + channels);
  const double* s = settings;
  linear(w1, b1, z, given1, batch, width, hidden, threads);
  std::copy(given1, given1 + batch * hidden, inside);
  norm(inside, batch, hidden, kind1, groups1, s[0], s[1], weight1, bias1, mean1, variance1, tracked1);
  linear(w2, b2, inside, given2, batch, hidden, width, threads);
  std::copy(given2, given2 + batch * width, h);
  norm(h, batch, width, kind2, groups2, s[2], s[3], weight2, bias2, mean2, variance2, tracked2);
  sigmoid(h, batch * width);
  if (numbers) linear(w3, b3, h, last, batch, width, numbers * channels, threads);
  const S* driven = numbers ? last : h;
  const int64_t driven_stride = numbers ? numbers * channels : width;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < channels; ++i) {{
      const S t[] = {{{theta}}};
      const S all[] = {{{coefficients}}};
      for (int64_t k = 0; k < {count}; ++k) c[(k * batch + b) * channels + i] = all[k];
    }}
}}
"""
_SUMMED = 1024  # rows
NONE, FIXED, BATCH, GROUP = range(4)  # as in the source
_INTEGERS = (
    "batch", "rows", "n", "by_rows", "quality", "hidden", "numbers", "kind1", "groups1", "kind2", "groups2", "keep",
    "threads",
)  # fmt: skip


@cache
def driver(equation: str, learned: int, driven: int, dtype: torch.dtype) -> tuple[Callable[..., None], int]:
    """The driver of an equation of ``FORMS``, and the number of its coefficients; built at its first use.

    Args:
        equation: its name.
        learned: how many of its parameters are learned, (C,) each.
        driven: how many come from the driver after those.
        dtype: of x.
    """
    form, (stored, computed) = FORMS[equation], TYPES[dtype]
    count = form.arity
    read = [f"const {computed}* {name}" for name in ("q", "w1", "b1", "w2", "b2", "w3", "b3")]
    affine = [f"const {computed}* {name}" for name in ("weight", "bias")]
    norm = [*affine, f"{computed}* mean", f"{computed}* variance", "int64_t* tracked"]
    arguments = [f"const {stored}* x", *read, *(f"{name}{i}" for i in (1, 2) for name in norm)]
    arguments += [*(f"const {computed}* p{i}" for i in range(learned)), f"{computed}* c", f"{computed}* kept"]
    arguments += ["const double* settings"]
    arguments += [f"const int64_t {name}" for name in _INTEGERS]
    theta = [f"p{i}[i]" for i in range(learned)]
    theta += [f"driven[b * driven_stride + {k} * channels + i]" for k in range(driven)]
    source = _SOURCE.format(
        summed=_SUMMED, theta=", ".join(theta), coefficients=form.coefficients_code, count=count,
        arguments="{arguments}",
    )  # fmt: skip
    return load(arguments, prelude(dtype) + COMMON + source), count
