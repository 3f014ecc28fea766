"""The gradients of the driver in C++: from the sums of its kernel's backward to every layer, and to x by its mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from quac_plugins.core.activations.driver_kernel import COMMON
from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.vectors import TYPES, prelude
from quac_plugins.core.native import load

_SOURCE = """
constexpr int64_t TILE = 4;  // vectors

template <int64_t ROWS>
static inline void back(const S* w, const S* grad, S* by_in, int64_t at, int64_t from, int64_t to) {{
  V sum[ROWS][TILE];
  const int64_t count = std::min(TILE * W, from - at);
  for (auto& row : sum) for (V& one : row) one = V(0);
  for (int64_t o = 0; o < to; ++o)
    for (int64_t k = 0; k * W < count; ++k) {{
      const V weight = V::loadu(w + o * from + at + k * W, std::min(W, count - k * W));
      for (int64_t b = 0; b < ROWS; ++b) sum[b][k] = at::vec::fmadd(V(grad[b * to + o]), weight, sum[b][k]);
    }}
  for (int64_t b = 0; b < ROWS; ++b)
    for (int64_t k = 0; k * W < count; ++k)
      sum[b][k].store(by_in + b * from + at + k * W, std::min(W, count - k * W));
}}

// of out (batch, to) = in (batch, from) wᵀ + bias; no sum depends on the number of threads
static void linear_back(
    const S* w, const S* in, const S* grad, S* by_in, S* by_w, S* by_bias, int64_t batch, int64_t from, int64_t to,
    int64_t threads) {{
  const int64_t tiles = (from + TILE * W - 1) / (TILE * W), most = batch * from * to < ALONE ? 1 : threads;
#pragma omp parallel for num_threads(most)
  for (int64_t tile = 0; tile < tiles; ++tile) {{
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) back<4>(w, grad + b * to, by_in + b * from, tile * TILE * W, from, to);
    for (; b < batch; ++b) back<1>(w, grad + b * to, by_in + b * from, tile * TILE * W, from, to);
  }}
#pragma omp parallel for num_threads(most)
  for (int64_t o = 0; o < to; ++o) {{
    S bias = 0;
    for (int64_t b = 0; b < batch; ++b) bias += grad[b * to + o];
    by_bias[o] = bias;
    for (int64_t at = 0; at < from; at += TILE * W) {{
      const int64_t count = std::min(TILE * W, from - at);
      V sum[TILE];
      for (V& one : sum) one = V(0);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = 0; k * W < count; ++k)
          sum[k] = at::vec::fmadd(
              V(grad[b * to + o]), V::loadu(in + b * from + at + k * W, std::min(W, count - k * W)), sum[k]);
      for (int64_t k = 0; k * W < count; ++k)
        sum[k].store(by_w + o * from + at + k * W, std::min(W, count - k * W));
    }}
  }}
}}

// in place, of what a norm returned to what it was given
static void norm_back(
    S* grad, const S* in, int64_t batch, int64_t n, int64_t kind, int64_t groups, double eps, const S* weight,
    const S* mean, const S* variance, S* by_weight, S* by_bias) {{
  if (kind == NONE) return;
  std::vector<double> w(n), bias(n);
  if (kind == GROUP) {{
    const int64_t size = n / groups;
    for (int64_t r = 0; r < batch * groups; ++r) {{
      const int64_t first = r % groups * size;
      const S* from = in + r * size;
      S* own = grad + r * size;
      double m, v, sum = 0, along = 0;
      row_moments(from, size, m, v);
      const double scale = 1 / std::sqrt(v + eps);
      for (int64_t i = 0; i < size; ++i) {{
        const double unit = (from[i] - m) * scale, by = double(own[i]) * weight[first + i];
        w[first + i] += own[i] * unit;
        bias[first + i] += own[i];
        sum += by;
        along += by * unit;
      }}
      for (int64_t i = 0; i < size; ++i) {{
        const double unit = (from[i] - m) * scale;
        own[i] = S(scale * (double(own[i]) * weight[first + i] - sum / size - unit * along / size));
      }}
    }}
  }} else {{
    std::vector<double> m(n), scale(n);
    moments(in, batch, n, kind == FIXED, mean, variance, m.data(), scale.data());
    for (double& value : scale) value = 1 / std::sqrt(value + eps);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) {{
        w[i] += grad[b * n + i] * (in[b * n + i] - m[i]) * scale[i];
        bias[i] += grad[b * n + i];
      }}
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) {{
        S& own = grad[b * n + i];
        const double shared = kind == FIXED ? 0 : (bias[i] + (in[b * n + i] - m[i]) * scale[i] * w[i]) / batch;
        own = S(weight[i] * scale[i] * (own - shared));
      }}
  }}
  std::copy(w.begin(), w.end(), by_weight);
  std::copy(bias.begin(), bias.end(), by_bias);
}}

// y += c, a number or one of each column
template <bool ROWS> static inline void add(T* y, const S* c, int64_t n) {{
  int64_t i = 0;
  for (; i + W <= n; i += W) out(in(y + i) + (ROWS ? V(*c) : V::loadu(c + i)), y + i);
  if (i < n) out(in(y + i, n - i) + (ROWS ? V(*c) : V::loadu(c + i, n - i)), y + i, n - i);
}}

extern "C" void kernel({arguments}) {{
  const int64_t channels = by_rows ? rows : n, pixels = by_rows ? n : rows, width = channels + quality;
  const S *z = kept, *given1 = z + batch * width, *inside = given1 + batch * hidden, *given2 = inside + batch * hidden;
  const S *h = given2 + batch * width, *last = h + batch * width;
  const S* driven = numbers ? last : h;
  const int64_t stride = numbers ? numbers * channels : width;
  std::vector<S> total(batch * PARTS * channels), by_driven(batch * stride), by_h(batch * width);
  std::vector<S> by_inside(batch * hidden), scaled(batch * channels);
  const S* all = sums;
  if (!by_rows) {{  // (batch, chunks, parts, channels)
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; ++b)
      column_sums(sums + b * chunks * PARTS * n, chunks, PARTS * n, total.data() + b * PARTS * n);
    all = total.data();
  }}
  std::vector<double> by_learned(LEARNED * channels);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < channels; ++i) {{
      S s[PARTS];
      for (int64_t p = 0; p < PARTS; ++p)
        s[p] = by_rows ? all[(p * batch + b) * channels + i] : all[(b * PARTS + p) * channels + i];
      const S t[] = {{{theta}}};
      const S found[] = {{{gather}}};
      for (int64_t k = 0; k < LEARNED; ++k) by_learned[k * channels + i] += found[k];
      for (int64_t k = 0; k < DRIVEN; ++k) by_driven[b * stride + k * channels + i] = found[LEARNED + k];
    }}
  S* learned[] = {{{by_learned}}};
  for (int64_t k = 0; k < LEARNED; ++k)
    std::copy(by_learned.begin() + k * channels, by_learned.begin() + (k + 1) * channels, learned[k]);
  if (numbers)
    linear_back(w3, h, by_driven.data(), by_h.data(), by_w3, by_b3, batch, width, stride, threads);
  else
    std::swap(by_driven, by_h);
  for (int64_t i = 0; i < batch * width; ++i) by_h[i] *= h[i] * (1 - h[i]);
  norm_back(
      by_h.data(), given2, batch, width, kind2, groups2, settings[2], weight2, mean2, variance2, by_weight2, by_bias2);
  linear_back(w2, inside, by_h.data(), by_inside.data(), by_w2, by_b2, batch, hidden, width, threads);
  norm_back(
      by_inside.data(), given1, batch, hidden, kind1, groups1, settings[0], weight1, mean1, variance1, by_weight1,
      by_bias1);
  linear_back(w1, z, by_inside.data(), by_z, by_w1, by_b1, batch, width, hidden, threads);
  if (!onto) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < channels; ++i) scaled[b * channels + i] = by_z[b * width + i] / pixels;
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < batch * rows; ++r)
    if (by_rows) add<true>(by_x + r * n, scaled.data() + r, n);
    else add<false>(by_x + r * n, scaled.data() + r / rows * n, n);
}}
"""
_INTEGERS = (
    "batch", "rows", "n", "by_rows", "chunks", "quality", "hidden", "numbers", "kind1", "groups1", "kind2", "groups2",
    "onto", "threads",
)  # fmt: skip


@cache
def gradients(equation: str, learned: int, driven: int, dtype: torch.dtype) -> Callable[..., None]:
    """What follows a kernel's backward; arguments as :func:`driver_kernel.driver`. Built at its first use."""
    form, (stored, computed) = FORMS[equation], TYPES[dtype]
    slopes = [f"{kind}{i}" for i in range(1, 4) for kind in ("w", "b")]
    norms = [f"{kind}{i}" for i in (1, 2) for kind in ("weight", "bias")]
    read = ["sums", "kept", "w1", "w2", "w3"]
    read += [f"{kind}{i}" for i in (1, 2) for kind in ("weight", "mean", "variance")]
    read += [f"p{i}" for i in range(learned)]
    written = ["by_z", *(f"by_{name}" for name in (*slopes, *norms)), *(f"by_p{i}" for i in range(learned))]
    arguments = [f"{stored}* by_x", *(f"const {computed}* {name}" for name in read)]
    arguments += [*(f"{computed}* {name}" for name in written), "const double* settings"]
    arguments += [f"const int64_t {name}" for name in _INTEGERS]
    theta = [f"p{i}[i]" for i in range(learned)] + [f"driven[b * stride + {k} * channels + i]" for k in range(driven)]
    source = _SOURCE.format(
        theta=", ".join(theta), gather=form.gather_code, arguments="{arguments}",
        by_learned=", ".join(f"by_p{i}" for i in range(learned)) or "nullptr",
    )  # fmt: skip
    sizes = f"constexpr int64_t PARTS = {form.parts}, LEARNED = {learned}, DRIVEN = {driven};\n"
    return load(arguments, prelude(dtype) + COMMON + sizes + source)
