"""The native kernels in C++, built by the compiler that torch.compile uses: one library for a dtype.

x is (B, C, N) in rows, with a number of each parameter for a row, or (B, N, C) in columns, with one for each b and c.
Backward makes all its sums in the pass that writes the gradient of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quac_plugins.core.kernels.equations import FORMS
from quac_plugins.core.kernels.layouts import BELOW, WIDE, Kernels, Layout
from quac_plugins.core.kernels.native import load
from quac_plugins.core.kernels.vectors import ALONE, TYPES, prelude

_EQUATION = """
struct {name} {{
  static constexpr int64_t COUNT = {count}, PARTS = {parts};
  static inline void coefficients(const V* t, V* c) {{ {coefficients} }}
  static inline V gate(const V& x, const V* c) {{ return {gate}; }}
  static inline void partials(const V& x, const V* c, V& slope, V* part) {{ {partials} }}
  static inline void gather(const V* s, const V* t, V* by) {{ {gather} }}
}};
"""

_SOURCE = """
#include <cmath>
#include <vector>
constexpr int64_t CHUNK = 64, SUMMED = 1024;  // rows of a task; constants, so that no sum depends on the threads
enum { NOTHING, BELOW, IDENTITY, RELU, RELU6, HARDSWISH };  // what y is added to

static inline V hosted(const V& x, int64_t host) {
  if (host == IDENTITY) return x;
  if (host == RELU) return at::vec::maximum(x, V(0));
  if (host == RELU6) return at::vec::clamp(x, V(0), V(6));
  return x * at::vec::clamp(x + V(3), V(0), V(6)) / V(6);  // the order is torch's, to the bit
}

static inline V slope_of(const V& x, int64_t host) {
  const V one(1), zero(0);
  if (host == IDENTITY) return one;
  if (host == RELU) return V::blendv(zero, one, x > zero);
  if (host == RELU6) return V::blendv(zero, one, (x > zero) & (x < V(6)));
  return V::blendv(V::blendv(zero, one, x > zero), x / V(3) + V(0.5), x.abs() < V(3));
}

// -- means

static inline S total(const V& v) { return at::vec::vec_reduce_all([](V a, V b) { return a + b; }, v); }

static double row_sum(const T* x, int64_t n) {
  double result = 0;
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
    result += total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return result;
}

constexpr int64_t COLUMNS = W >= 16 ? 16 : 8;  // vectors, as many as there are registers for

template <bool FULL> static inline void tile_sums(const T* x, int64_t rows, int64_t n, int64_t count, S* sums) {
  constexpr int64_t PIECE = 128;
  for (int64_t first = 0; first < rows; first += PIECE) {
    V sum[COLUMNS];
    for (V& part : sum) part = V(0);
    for (int64_t r = first; r < std::min(first + PIECE, rows); ++r) {
      const T* from = x + r * n;
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

static void means(const T* x, S* out, int64_t batch, int64_t rows, int64_t n, bool by_rows, int64_t threads) {
  if (by_rows) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < batch * rows; ++r) out[r] = S(row_sum(x + r * n, n) / n);
    return;
  }
  const int64_t chunks = (rows + SUMMED - 1) / SUMMED;
  std::vector<S> sums(batch * chunks * n, S(0));
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < batch * chunks; ++task) {
    const int64_t first = task % chunks * SUMMED, count = std::min(SUMMED, rows - first);
    const T* from = x + (task / chunks * rows + first) * n;
    S* piece = sums.data() + task * n;
    int64_t at = 0;  // row after row, a tile of the columns in registers: several rows at a time take twice as long
    for (; at + COLUMNS * W <= n; at += COLUMNS * W) tile_sums<true>(from + at, count, n, COLUMNS * W, piece + at);
    if (at < n) tile_sums<false>(from + at, count, n, n - at, piece + at);
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += sums[(b * chunks + k) * n + i];
      out[b * n + i] = S(sum / rows);
    }
}

// -- activations: y = host(x) + x (A(x) - A0(x)) from a start, or x A(x)

template <class E, bool ROWS, bool START> struct Line {
  const S* coef;  // those of one b, `apart` from one another; in columns with one for each number
  int64_t apart;
  const V* start;
  int64_t host;
  V c[E::COUNT];

  inline void pick(int64_t i, int64_t count) {
    for (int64_t k = 0; k < E::COUNT; ++k)
      c[k] = ROWS ? V(coef[k * apart]) : V::loadu(coef + k * apart + i, count);
  }

  inline V value(const V& x) const {
    if constexpr (START) return x * (E::gate(x, c) - E::gate(x, start));
    return x * E::gate(x, c);
  }

  inline void write(const T* x, const T* below, T* y, const V& gated, int64_t count = W) const {
    if (host == NOTHING) out(gated, y, count);
    else out((host == BELOW ? in(below, count) : hosted(in(x, count), host)) + gated, y, count);
  }

  void forward(const T* x, const T* below, T* y, int64_t n) {
    if (ROWS) pick(0, W);
    int64_t i = 0;
    for (; i + UNROLL * W <= n; i += UNROLL * W) {
      V gated[UNROLL];
      for (int64_t u = 0; u < UNROLL; ++u) {
        if (!ROWS) pick(i + u * W, W);
        gated[u] = value(in(x + i + u * W));
      }
      for (int64_t u = 0; u < UNROLL; ++u)
        write(x + i + u * W, below + i + u * W, y + i + u * W, gated[u]);
    }
    for (; i < n; i += W) {
      const int64_t count = std::min(W, n - i);
      if (!ROWS) pick(i, count);
      write(x + i, below + i, y + i, value(in(x + i, count)), count);
    }
  }

  inline V derivative(const V& x, V* part) const {
    V slope, before, unused[E::PARTS];
    E::partials(x, c, slope, part);
    if constexpr (START) {
      E::partials(x, start, before, unused);
      slope = slope - before;
    }
    return host > BELOW ? slope + slope_of(x, host) : slope;
  }

  // sum: V, or for columns where they are kept, `apart` as the coefficients
  template <class Sum> C10_ALWAYS_INLINE void both(
      const T* g, const T* x, T* by_x, Sum* sum, int64_t i, int64_t count) {
    V part[E::PARTS], grad = in(g + i, count);  // loads fill up with zeros
    if (!ROWS) pick(i, count);
    out(grad * derivative(in(x + i, count), part), by_x + i, count);
    for (int64_t p = 0; p < E::PARTS; ++p)
      if constexpr (ROWS) sum[p] = sum[p] + grad * part[p];
      else (V::loadu(sum + p * apart + i, count) + grad * part[p]).store(sum + p * apart + i, count);
  }

  template <class Sum> void backward(const T* g, const T* x, T* by_x, int64_t n, Sum* sum) {
    if (ROWS) pick(0, W);
    int64_t i = 0;
    for (; i + W <= n; i += W) both(g, x, by_x, sum, i, W);
    if (i < n) both(g, x, by_x, sum, i, n - i);
  }
};

struct Given {
  const T *g, *x, *below;
  T* y;  // or the gradient of x
  const S* theta[3];
  S* by[3];
  const double* start;
  int64_t many, host, batch, rows, n, threads;  // many: a bit for each parameter that has a number for each b
  int64_t channels, all;
  const S* parameter(int64_t k, int64_t b) const { return theta[k] + (many >> k & 1 ? b * channels : 0); }
  // where those of a row begin among (B, count, C) numbers
  int64_t first(int64_t r, int64_t count, bool by_rows) const {
    return r / rows * count * channels + (by_rows ? r % rows : 0);
  }
};

template <class E, bool ROWS, bool START> static void forward(const Given& d, const S* coef, const V* start) {
#pragma omp parallel for num_threads(d.threads)
  for (int64_t r = 0; r < d.batch * d.rows; ++r) {
    Line<E, ROWS, START> line{coef + d.first(r, E::COUNT, ROWS), d.channels, start, d.host};
    line.forward(d.x + r * d.n, d.below + r * d.n, d.y + r * d.n, d.n);
  }
}

template <class E, bool ROWS, bool START> static void backward(const Given& d, const S* coef, const V* start, S* sums) {
  if constexpr (ROWS) {
#pragma omp parallel for num_threads(d.threads)
    for (int64_t r = 0; r < d.all; ++r) {
      Line<E, ROWS, START> line{coef + d.first(r, E::COUNT, ROWS), d.channels, start, d.host};
      V sum[E::PARTS];
      for (V& part : sum) part = V(0);
      line.backward(d.g + r * d.n, d.x + r * d.n, d.y + r * d.n, d.n, sum);
      for (int64_t p = 0; p < E::PARTS; ++p) sums[d.first(r, E::PARTS, ROWS) + p * d.channels] = total(sum[p]);
    }
  } else {
    const int64_t chunks = (d.rows + CHUNK - 1) / CHUNK, width = E::PARTS * d.n;
    std::vector<S> partial(d.batch * chunks * width, S(0));
#pragma omp parallel for num_threads(d.threads)
    for (int64_t task = 0; task < d.batch * chunks; ++task) {
      const int64_t b = task / chunks, k = task % chunks;
      Line<E, ROWS, START> line{coef + b * E::COUNT * d.n, d.n, start, d.host};
      for (int64_t r = b * d.rows + k * CHUNK; r < b * d.rows + std::min((k + 1) * CHUNK, d.rows); ++r)
        line.backward(d.g + r * d.n, d.x + r * d.n, d.y + r * d.n, d.n, partial.data() + task * width);
    }
    for (int64_t task = 0; task < d.batch * chunks; ++task)
      for (int64_t i = 0; i < width; ++i) sums[task / chunks * width + i] += partial[task * width + i];
  }
}

template <class E, bool START> static void activate(const Given& d, bool by_rows, bool back) {
  std::vector<S> coef(E::COUNT * d.all), sums(back ? E::PARTS * d.all : 0);
  V t[E::COUNT], c[E::COUNT], s[E::PARTS], start[E::COUNT];
  auto each = [&](auto work) {  // W channels of one b, with their parameters
    for (int64_t b = 0; b < d.batch; ++b)
      for (int64_t i = 0; i < d.channels; i += W) {
        const int64_t count = std::min(W, d.channels - i);
        for (int64_t k = 0; k < E::COUNT; ++k) t[k] = V::loadu(d.parameter(k, b) + i, count);
        work(b, i, count);
      }
  };
  each([&](int64_t b, int64_t i, int64_t count) {
    E::coefficients(t, c);
    for (int64_t k = 0; k < E::COUNT; ++k) c[k].store(coef.data() + (b * E::COUNT + k) * d.channels + i, count);
  });
  if (START) {
    for (int64_t k = 0; k < E::COUNT; ++k) t[k] = V(S(d.start[k]));
    E::coefficients(t, start);
  }
  if (!back && by_rows) return forward<E, true, START>(d, coef.data(), start);
  if (!back) return forward<E, false, START>(d, coef.data(), start);
  if (by_rows) backward<E, true, START>(d, coef.data(), start, sums.data());
  else backward<E, false, START>(d, coef.data(), start, sums.data());
  for (int64_t k = 0; k < E::COUNT; ++k) std::fill(d.by[k], d.by[k] + (d.many >> k & 1 ? d.all : d.channels), S(0));
  each([&](int64_t b, int64_t i, int64_t count) {
    for (int64_t p = 0; p < E::PARTS; ++p) s[p] = V::loadu(sums.data() + (b * E::PARTS + p) * d.channels + i, count);
    E::gather(s, t, c);
    for (int64_t k = 0; k < E::COUNT; ++k) {
      S* by = d.by[k] + (d.parameter(k, b) - d.theta[k]) + i;
      (V::loadu(by, count) + c[k]).store(by, count);
    }
  });
}

extern "C" void kernel({arguments}) {
  if (equation < 0) return means(x, by0, batch, rows, n, by_rows, threads);
  const int64_t channels = by_rows ? rows : n;
  const Given d{g, x, below, y, {p0, p1, p2}, {by0, by1, by2}, start, many, host, batch, rows, n, threads, channels,
                batch * channels};
  switch (equation * 2 + (start_is_given ? 1 : 0)) {
{cases}
  }
}
"""
_INTEGERS = ("equation", "start_is_given", "back", "many", "host", "batch", "rows", "n", "by_rows", "threads")
_NUMBERS = {equation: number for number, equation in enumerate(FORMS)}


def _assigned(name: str, expressions: Sequence[str]) -> str:
    return " ".join(f"{name}[{k}] = {expression};" for k, expression in enumerate(expressions))


def build(dtype: torch.dtype) -> Kernels:
    """Return the kernels of a dtype; torch builds them at their first use and keeps them on disk."""
    stored, computed = TYPES[dtype]
    equations = "".join(
        _EQUATION.format(
            name=equation.__name__, count=len(form.coefficients), parts=form.parts, gate=form.gate,
            coefficients=_assigned("c", form.coefficients), partials=form.partials, gather=_assigned("by", form.gather),
        )
        for equation, form in FORMS.items()
    )  # fmt: skip
    cases = "\n".join(
        f"    case {2 * number + start}: return activate<{equation.__name__}, {start}>(d, by_rows, back);"
        for equation, number in _NUMBERS.items()
        for start in (0, 1)
    )
    tensors = [f"const {stored}* {name}" for name in ("g", "x", "below")]
    tensors += [f"const {computed}* p{k}" for k in range(3)] + ["const double* start", f"{stored}* y"]
    tensors += [f"{computed}* by{k}" for k in range(3)]
    source = prelude(dtype) + equations + _SOURCE.replace("{cases}", cases)
    code = load([*tensors, *(f"const int64_t {name}" for name in _INTEGERS)], source)
    return Kernels(partial(_run, code), partial(_means, code))


@cache
def _start(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers or (0.0,), dtype=torch.float64, device="cpu")


def _means(code: Callable[..., None], x: Tensor, layout: Layout) -> Tensor:
    """Average a dense x over all axes but batch and channels: (B, C), in the dtype of the arithmetic."""
    batch, rows, n, by_rows = layout
    averages = torch.empty(batch, rows if by_rows else n, dtype=WIDE[x.dtype], device="cpu")
    unused = (averages,) * 3
    code(x, x, x, *unused, _start(()), x, *unused, -1, 0, 0, 0, 0, batch, rows, n, by_rows, _threads(x))
    return averages


def _run(
    code: Callable[..., None], grad: Tensor | None, x: Tensor, theta: Sequence[Tensor], equation: Callable[..., Tensor],
    start: tuple[float, ...], below: Tensor | str, layout: Layout, y: Tensor | None = None,
) -> Any:  # fmt: skip
    """Compute y, or, from its gradient, the gradients of x and of θ.

    Args:
        code: what was built.
        grad, x, theta, equation, start, below, layout: see :class:`Kernels`.
        y: where it is written; by default new memory.
    """
    batch, rows, n, by_rows = layout
    channels, y = (rows if by_rows else n), torch.empty_like(x) if y is None else y
    by = theta if grad is None else [torch.empty_like(p) for p in theta]
    many = sum(1 << k for k, p in enumerate(theta) if p.numel() != channels)
    inside = isinstance(below, str)
    code(
        x if grad is None else grad, x, x if inside else below, *(*theta, *theta, *theta)[:3], _start(start), y,
        *(*by, *by, *by)[:3], _NUMBERS[equation], bool(start), grad is not None, many,
        BELOW.index(below if inside else "below"), batch, rows, n, by_rows, _threads(x),
    )  # fmt: skip
    return y if grad is None else (y, by)


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < ALONE else torch.get_num_threads()
