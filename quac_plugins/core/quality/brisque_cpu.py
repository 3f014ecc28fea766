"""BRISQUE in C++: luminance, half the size, and the sums of each scale in one pass; the arithmetic of :mod:`brisque`.

Luminance and half size are those to the bit. Coefficients differ by the rounding of the square root (here to the
nearest, as the reference's), and sums by their order. The window's seven rows are kept in a ring.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quac_plugins.core.kernels.native import load

CHUNK = 32
"""Rows that one task works on; a constant, so that sums do not depend on the number of threads."""

_SOURCE = """
#include <algorithm>
#include <cstdint>
#include <vector>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
using V = at::vec::Vectorized<float>;
constexpr int64_t W = V::size(), CHUNK = {chunk}, R = 3;
constexpr float WINDOW[] = {{window}}, C = {contrast};

// the window along a padded row, from left to right; one rounding for each product and sum
static void along(const float* padded, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    int64_t count = std::min(W, n - i);
    V sum = V::loadu(padded + i, count) * V(WINDOW[3]);
    for (int64_t k = 1; k < 7; ++k)
      sum = at::vec::fmadd(V::loadu(padded + i + k, count), V(WINDOW[k < 3 ? 3 - k : k - 3]), sum);
    sum.store(out + i, count);
  }
}

// and across seven rows, from the centre outwards in pairs
static V across(float* const* rows, int64_t i, int64_t count) {
  V sum = V::loadu(rows[3] + i, count) * V(WINDOW[0]);
  for (int64_t k = 1; k < 4; ++k)
    sum = at::vec::fmadd(V::loadu(rows[3 - k] + i, count) + V::loadu(rows[3 + k] + i, count), V(WINDOW[k]), sum);
  return sum;
}

static void normalize(const float* grey, float* y, int64_t height, int64_t width, int64_t first, int64_t last) {
  std::vector<float> ring(14 * width), padded(2 * (width + 2 * R));
  float *plain = padded.data(), *square = plain + width + 2 * R, *means[7], *squares[7];
  for (int64_t row = first - R; row < last + R; ++row) {
    const float* from = grey + std::clamp<int64_t>(row, 0, height - 1) * width;
    for (int64_t i = 0; i < width + 2 * R; ++i) {
      plain[i] = from[std::clamp<int64_t>(i - R, 0, width - 1)];
      square[i] = plain[i] * plain[i];
    }
    int64_t slot = (row - first + R) % 7;
    along(plain, ring.data() + slot * width, width);
    along(square, ring.data() + (7 + slot) * width, width);
    int64_t centre = row - R;
    if (centre < first) continue;
    for (int64_t k = 0; k < 7; ++k) {
      int64_t at = (centre - first + k) % 7;
      means[k] = ring.data() + at * width;
      squares[k] = ring.data() + (7 + at) * width;
    }
    for (int64_t i = 0; i < width; i += W) {
      int64_t count = std::min(W, width - i);
      V mean = across(means, i, count), variance = across(squares, i, count) - mean * mean;
      V deviation = at::vec::maximum(variance, V(1e-14f)).sqrt();
      V out = (V::loadu(grey + centre * width + i, count) - mean) / (deviation + V(C));
      V::blendv(out, V(0), variance < V(0)).store(y + centre * width + i, count);
    }
  }
}

// sums of squares left and right of 0, of magnitudes, numbers left, right
static void add(const float* a, const float* b, int64_t n, double* sums) {
  V total[5] = {V(0), V(0), V(0), V(0), V(0)}, one(1), zero(0);
  for (int64_t i = 0; i < n; i += W) {
    int64_t count = std::min(W, n - i);
    V x = V::loadu(a + i, count);  // zeros behind the end, which count nowhere
    if (b) x = x * V::loadu(b + i, count);
    V left = at::vec::minimum(x, zero), right = at::vec::maximum(x, zero);
    total[0] = total[0] + left * left;
    total[1] = total[1] + right * right;
    total[2] = total[2] + (right - left);
    total[3] = total[3] + ((x < zero) & one);
    total[4] = total[4] + ((x > zero) & one);
  }
  for (int64_t k = 0; k < 5; ++k) sums[k] += at::vec::vec_reduce_all([](V a, V b) { return a + b; }, total[k]);
}

static void sums_of(
    const float* grey, float* y, double* sums, int64_t batch, int64_t height, int64_t width, int64_t threads) {
  int64_t chunks = (height + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t task = 0; task < batch * chunks; ++task) {
      int64_t b = task / chunks, first = task % chunks * CHUNK, pixels = height * width;
      normalize(grey + b * pixels, y + b * pixels, height, width, first, std::min(first + CHUNK, height));
    }
#pragma omp for
    for (int64_t task = 0; task < batch * chunks; ++task) {
      int64_t b = task / chunks, first = task % chunks * CHUNK, last = std::min(first + CHUNK, height);
      double* own = sums + task * 25;
      std::fill(own, own + 25, 0.0);
      for (int64_t row = first; row < last; ++row) {
        const float* x = y + (b * height + row) * width;
        add(x, nullptr, width, own);
        add(x, x + 1, width - 1, own + 5);
        if (row + 1 < height) add(x, x + width, width, own + 10);
        if (row + 1 < height) add(x, x + width + 1, width - 1, own + 15);
        if (row > 0) add(x, x - width + 1, width - 1, own + 20);
      }
    }
  }
}

static void luminance(const float* image, float* grey, int64_t channels, int64_t pixels, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += W) {
    const int64_t count = std::min(W, last - i);
    V level[3];
    for (int64_t c = 0; c < channels; ++c)
      level[c] = at::vec::clamp((V::loadu(image + c * pixels + i, count) * V(255)).round(), V(0), V(255));
    V sum = level[0];
    if (channels == 3)  // whole numbers below 2^24: exact
      sum = (level[0] * V({red}) + level[1] * V({green}) + level[2] * V({blue})) * V(1.f / {one});
    sum = V::blendv(sum, V(0), sum.isnan());
    ((sum + V(0.5f)).floor() * V(C)).store(grey + i, count);
  }
}

// of term(0) + term(1) the one is zero; of an even size it always is the second
template <class F> static inline V near_and_far(bool odd, const F& term) { return odd ? term(0) + term(1) : term(0); }

// a row at half its width: the samples 2d - 1, …, 2d + 3, borders repeated
static void narrow(
    const float* from, float* out, const float* taps, int64_t width, int64_t half, float* odds, float* evens) {
  for (int64_t k = 0; k < half + 2; ++k) {
    odds[k] = from[std::clamp<int64_t>(2 * k - 1, 0, width - 1)];
    evens[k] = from[std::min(2 * k, width - 1)];
  }
  for (int64_t d = 0; d < half; d += W) {
    const int64_t count = std::min(W, half - d);
    const V x[] = {V::loadu(odds + d, count), V::loadu(evens + d, count), V::loadu(odds + d + 1, count),
                   V::loadu(evens + d + 1, count), V::loadu(odds + d + 2, count)};
    near_and_far(width % 2, [&](int64_t j) {
      V w[4];
      for (int64_t k = 0; k < 4; ++k) w[k] = V::loadu(taps + (4 * j + k) * half + d, count);
      return (x[j] * w[0] + x[j + 1] * w[1]) + (x[j + 2] * w[2] + x[j + 3] * w[3]);
    }).store(out + d, count);
  }
}

static void scales_of(
    const float* images, float* grey, float* half, const float* across, const float* down, int64_t batch,
    int64_t channels, int64_t height, int64_t width, int64_t rows, int64_t columns, int64_t threads) {
  const int64_t chunks = (height + CHUNK - 1) / CHUNK, lower = (rows + CHUNK - 1) / CHUNK, pixels = height * width;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t task = 0; task < batch * chunks; ++task) {
      const int64_t b = task / chunks, first = task % chunks * CHUNK;
      luminance(
          images + b * channels * pixels, grey + b * pixels, channels, pixels, first * width,
          std::min(first + CHUNK, height) * width);
    }
    std::vector<float> ring(8 * columns), odds(columns + 2), evens(columns + 2);
#pragma omp for
    for (int64_t task = 0; task < batch * lower; ++task) {
      const int64_t b = task / lower, first = task % lower * CHUNK, last = std::min(first + CHUNK, rows);
      for (int64_t row = 2 * first - 1, d = first; d < last; ++d) {
        for (; row <= 2 * d + 3; ++row)
          narrow(
              grey + b * pixels + std::clamp<int64_t>(row, 0, height - 1) * width,
              ring.data() + (row + 8) % 8 * columns, across, width, columns, odds.data(), evens.data());
        const float* y[5];
        for (int64_t k = 0; k < 5; ++k) y[k] = ring.data() + (2 * d + 7 + k) % 8 * columns;
        for (int64_t i = 0; i < columns; i += W) {
          const int64_t count = std::min(W, columns - i);
          V x[5];
          for (int64_t k = 0; k < 5; ++k) x[k] = V::loadu(y[k] + i, count);
          near_and_far(height % 2, [&](int64_t j) {
            V w[4];
            for (int64_t k = 0; k < 4; ++k) w[k] = V(down[(4 * j + k) * rows + d]);
            return at::vec::fmadd(x[j], w[0], x[j + 1] * w[1]) + at::vec::fmadd(x[j + 2], w[2], x[j + 3] * w[3]);
          }).store(half + (b * rows + d) * columns + i, count);
        }
      }
    }
  }
}

extern "C" void kernel({arguments}) {
  if (columns) scales_of(images, grey, half, across, down, batch, channels, height, width, rows, columns, threads);
  else sums_of(images, grey, sums, batch, height, width, threads);
}
"""


def build(window: tuple[float, ...], luma: tuple[int, ...], total: int, contrast: float) -> Callable[..., None]:
    """Build the kernel that :func:`scales_of` and :func:`sums_of` call.

    Args:
        window: weights of the window's rows, from its centre on.
        luma, total: the weights of red, green and blue, and their sum.
        contrast: one grey level.
    """
    source = _SOURCE.replace("{chunk}", f"{CHUNK}").replace("{window}", ", ".join(f"{value!r}f" for value in window))
    source = source.replace("{one}", f"{total}").replace("{contrast}", f"{contrast!r}f")
    for name, weight in zip(("red", "green", "blue"), luma, strict=True):
        source = source.replace(f"{{{name}}}", f"{weight}")
    tensors = ["const float* images", "float* grey", "float* half", "const float* across", "const float* down"]
    sizes = ("batch", "channels", "height", "width", "rows", "columns", "threads")
    return load([*tensors, "double* sums", *(f"const int64_t {name}" for name in sizes)], source)


def scales_of(code: Callable[..., None], images: Tensor, across: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the luminance (B, H, W) of images (B, 1 or 3, H, W) float32, and the luminance at half the size.

    Args:
        code: the kernel.
        images: (B, 1 or 3, H, W) float32.
        across, down: the weights (2, 4, half) of :func:`brisque._taps` for both axes.
    """
    batch, channels, height, width = images.shape
    images, across, down = images.detach().contiguous(), across.contiguous(), down.contiguous()
    rows, columns = down.shape[-1], across.shape[-1]
    grey, half = images.new_empty(batch, height, width), images.new_empty(batch, rows, columns)
    sizes = (batch, channels, height, width, rows, columns)
    code(images, grey, half, across, down, grey, *sizes, torch.get_num_threads())
    return grey, half


def sums_of(code: Callable[..., None], grey: Tensor) -> Tensor:
    """Compute the sums (B, 5, 5), float64, of luminance (B, H, W), float32.

    The sums are the same as :func:`quac_plugins.core.quality.brisque._sums` gives for the normalized coefficients and
    for their products with the neighbours H, V, D1, D2.
    """
    batch, height, width = grey.shape
    grey = grey.detach().contiguous()
    y, sums = torch.empty_like(grey), grey.new_empty((batch, -(-height // CHUNK), 5, 5), dtype=torch.float64)
    code(grey, y, y, y, y, sums, batch, 1, height, width, 0, 0, torch.get_num_threads())
    return sums.sum(1)
