"""The driver in one C++ call, from x to the coefficients of its kernel: on a CPU, where no gradient is asked for.

Operation by operation the driver takes twenty small ones, which together cost a third of what the activation itself
does on (8, 256, 56, 56), and torch's sum over the pixels of a channels_last x half as much again. The numbers are those
of :meth:`DrivenActivation.drive`, but for the order of the sums. Whatever is not a plain layer (adapted, quantized,
watched by a hook, in another dtype) is left to that method.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations import cpu
from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.kernels import as_rows, dense, neutral_of
from quac_plugins.core.activations.vectors import TYPES, prelude
from quac_plugins.core.native import compiled_or, load

_SOURCE = """
#include <cmath>
#include <vector>
constexpr int64_t SUMMED = {summed}, ALONE = {alone};
enum {{ NONE, FIXED, BATCH, GROUP }};

template <class U> static inline const S* read(const U* x, S* wide, int64_t count) {{
  if constexpr (!std::is_same_v<U, S>) {{
    at::vec::convert(x, wide, count);
    return wide;
  }} else return x;
}}

static inline S total(const V& v) {{ return at::vec::vec_reduce_all([](V a, V b) {{ return a + b; }}, v); }}

static inline double row_sum(const T* x, int64_t n) {{
  double found = 0;
  constexpr int64_t PIECE = CONVERT ? BLOCK : 8 * BLOCK;
  for (int64_t at = 0; at < n; at += PIECE) {{  // since a long sum in float loses digits
    S wide[BLOCK];
    int64_t count = std::min(PIECE, n - at), i = 0;
    const S* from = read(x + at, wide, count);
    V sum[UNROLL];
    for (V& part : sum) part = V(0);
    for (; i + UNROLL * W <= count; i += UNROLL * W)
      for (int64_t u = 0; u < UNROLL; ++u) sum[u] = sum[u] + V::loadu(from + i + u * W);
    for (; i < count; i += W) sum[0] = sum[0] + V::loadu(from + i, std::min(W, count - i));
    found += total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }}
  return found;
}}

// row after row, a tile of the columns in registers: several rows at a time are read at half the speed
static inline void column_sums(const T* x, int64_t rows, int64_t n, S* sums) {{
  constexpr int64_t TILE = W >= 16 ? 16 : 8, PIECE = 128;  // rows: a long sum in float loses digits
  std::fill(sums, sums + n, S(0));
  for (int64_t first = 0; first < rows; first += PIECE)
    for (int64_t at = 0; at < n; at += TILE * W) {{
      S wide[TILE * W];
      V sum[TILE];
      const int64_t count = std::min(TILE * W, n - at);
      for (V& part : sum) part = V(0);
      for (int64_t r = first; r < std::min(first + PIECE, rows); ++r) {{
        const S* from = read(x + r * n + at, wide, count);
        if (count == TILE * W)
          for (int64_t k = 0; k < TILE; ++k) sum[k] = sum[k] + V::loadu(from + k * W);
        else
          for (int64_t k = 0; k * W < count; ++k)
            sum[k] = sum[k] + V::loadu(from + k * W, std::min(W, count - k * W));
      }}
      for (int64_t k = 0; k * W < count; ++k) {{
        const int64_t last = std::min(W, count - k * W);
        S* own = sums + at + k * W;
        (V::loadu(own, last) + sum[k]).store(own, last);
      }}
    }}
}}

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
      double m = 0, v = 0;
      for (int64_t i = 0; i < size; ++i) m += row[i];
      m /= size;
      for (int64_t i = 0; i < size; ++i) v += (row[i] - m) * (row[i] - m);
      double scale = 1 / std::sqrt(v / size + eps);
      for (int64_t i = 0; i < size; ++i) {{
        int64_t channel = r % groups * size + i;
        row[i] = S((row[i] - m) * scale * weight[channel] + bias[channel]);
      }}
    }}
    return;
  }}
  std::vector<double> m(n), v(n);
  if (kind == FIXED) {{
    std::copy(mean, mean + n, m.begin());
    std::copy(variance, variance + n, v.begin());
  }} else {{
    for (int64_t b = 0; b < batch; ++b) for (int64_t i = 0; i < n; ++i) m[i] += z[b * n + i];
    for (double& value : m) value /= batch;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) v[i] += (z[b * n + i] - m[i]) * (z[b * n + i] - m[i]);
    for (int64_t i = 0; i < n; ++i) {{
      mean[i] = S((1 - momentum) * mean[i] + momentum * m[i]);
      variance[i] = S((1 - momentum) * variance[i] + momentum * v[i] / (batch - 1));
      v[i] /= batch;
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

extern "C" void kernel({arguments}) {{
  const int64_t channels = by_rows ? rows : n, pixels = by_rows ? n : rows, width = channels + quality;
  std::vector<S> z(batch * width), inside(batch * hidden), h(batch * width), last(batch * numbers * channels);
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
  for (int64_t b = 0; b < batch; ++b)
    std::copy(q + b * quality, q + (b + 1) * quality, z.data() + b * width + channels);
  const double* s = settings;
  linear(w1, b1, z.data(), inside.data(), batch, width, hidden, threads);
  norm(inside.data(), batch, hidden, kind1, groups1, s[0], s[1], weight1, bias1, mean1, variance1, tracked1);
  linear(w2, b2, inside.data(), h.data(), batch, hidden, width, threads);
  norm(h.data(), batch, width, kind2, groups2, s[2], s[3], weight2, bias2, mean2, variance2, tracked2);
  sigmoid(h.data(), batch * width);
  if (numbers) linear(w3, b3, h.data(), last.data(), batch, width, numbers * channels, threads);
  const S* driven = numbers ? last.data() : h.data();
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
_ALONE = 1 << 15  # numbers, or products, below which one thread does it
_NONE, _FIXED, _BATCH, _GROUP = range(4)  # as in the source
_OWN = (Tensor, nn.Parameter)
_INTEGERS = (
    "batch", "rows", "n", "by_rows", "quality", "hidden", "numbers", "kind1", "groups1", "kind2", "groups2", "threads",
)  # fmt: skip


@cache
def _kernel(equation: str, learned: int, driven: int, dtype: torch.dtype) -> tuple[Callable[..., None], int]:
    """With the number of its coefficients."""
    form, (stored, computed) = FORMS[equation], TYPES[dtype]
    count = form.coefficients.__code__.co_argcount
    read = [f"const {computed}* {name}" for name in ("q", "w1", "b1", "w2", "b2", "w3", "b3")]
    affine = [f"const {computed}* {name}" for name in ("weight", "bias")]
    norm = [*affine, f"{computed}* mean", f"{computed}* variance", "int64_t* tracked"]
    arguments = [f"const {stored}* x", *read, *(f"{name}{i}" for i in (1, 2) for name in norm)]
    arguments += [*(f"const {computed}* p{i}" for i in range(learned)), f"{computed}* c", "const double* settings"]
    arguments += [f"const int64_t {name}" for name in _INTEGERS]
    theta = [f"p{i}[i]" for i in range(learned)]
    theta += [f"driven[b * driven_stride + {k} * channels + i]" for k in range(driven)]
    source = _SOURCE.format(
        summed=_SUMMED, alone=_ALONE, theta=", ".join(theta), coefficients=form.coefficients_code, count=count,
        arguments="{arguments}",
    )  # fmt: skip
    return load(arguments, prelude(dtype) + source), count


@cache
def _settings(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unwatched(layer: nn.Module) -> bool:
    """Whether nobody would notice that a layer's forward is not called."""
    return not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in layer.__dict__


def _matrix(layer: Any) -> tuple[Any, ...]:
    parameters = layer._parameters
    return parameters.get("weight"), parameters.get("bias")


def _norm(norm: Any, batch: int) -> tuple[tuple[Any, ...], int, int] | None:
    """Its tensors, its kind, and its number of groups."""
    if type(norm) is nn.Identity:
        return (), _NONE, 1
    if type(norm) is nn.GroupNorm:
        return _matrix(norm), _GROUP, norm.num_groups
    if type(norm) is not nn.BatchNorm2d:
        return None
    if norm.training and (batch == 1 or norm.momentum is None or not norm.track_running_stats):
        return None
    buffers = norm._buffers
    count = buffers["num_batches_tracked"]
    if count is None or count.dtype is not torch.int64 or not count.is_cpu:
        return None
    statistics = buffers["running_mean"], buffers["running_var"]
    return (*_matrix(norm), *statistics), _BATCH if norm.training else _FIXED, 1


def activate(
    site: Any,
    x: Tensor,
    q: Tensor | None,
    start: tuple[float, ...],
    host: str,
    onto: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """The activation of x, on a CPU; None where the driver is not plain, or without a compiler.

    Args:
        site: a ``DrivenActivation`` that computes its numbers as that class does.
        x: as :func:`kernels.at_once` lets through.
        q: (B, Q) or None, as ``site.quality_for`` returns it.
        start, host: see :func:`kernels.fused`.
        onto: makes what the activation is added to.
    """
    dim, equation = site.channel_dim, type(site).equation.__name__
    x = dense(x, dim)
    by_rows = as_rows(x, dim)
    batch, channels = x.shape[0], x.shape[dim]
    pixels = x.numel() // max(batch * channels, 1)
    sizes = (batch, channels, pixels) if by_rows else (batch, pixels, channels)

    def both() -> Tensor | None:
        c = coefficients(site, x, q, sizes, by_rows)
        if c is None:
            return None
        below = None if onto is None else onto()
        ours = below is not None and _is_ours(below, x)
        y = cpu.run((x,), sizes, c, equation, neutral_of(equation, start), host, by_rows, below if ours else None)
        return y if below is None or ours else below + y

    return compiled_or("cpu", "fused activations", both, lambda: None)


def _holders(t: Tensor) -> int:
    return sys.getrefcount(t)


def _holders_of_one() -> int:
    """What :func:`_holders` says of what a single variable holds; versions of Python differ."""
    t = torch.empty(0)
    return _holders(t)


_HELD = _holders_of_one()


def _is_ours(t: Tensor, like: Tensor) -> bool:
    """Whether a result may be written over: it is laid out alike, and nobody else holds it."""
    alike = t.dtype == like.dtype and t.shape == like.shape and t.stride() == like.stride()
    if not alike or type(t) is not Tensor or t._base is not None or sys.getrefcount(t) > _HELD:
        return False
    return t.untyped_storage().data_ptr() != like.untyped_storage().data_ptr()


def coefficients(site: Any, x: Tensor, q: Tensor | None, sizes: Sequence[int], by_rows: bool) -> Tensor | None:
    """The coefficients (K, B, C) of ``FORMS``; None where the driver is not plain. Arguments as :func:`activate`.

    Args:
        x: dense.
        sizes: of the rows (B, C, N) or the columns (B, N, C) that x is in memory.
        by_rows: see ``sizes``.
    """
    # what is written out here would, in functions of its own, take a tenth of the activation's time
    batch, wide = sizes[0], torch.float64 if x.dtype is torch.float64 else torch.float32
    layers, parameters = site._modules, site._parameters
    matrices, norms = [layers["fc1"], layers["fc2"]], (layers["bn1"], layers["bn2"])
    if site.fc3 is not None:
        matrices.append(site.fc3)
    for layer in matrices:
        if type(layer) is not nn.Conv2d:
            return None
    for layer in (*matrices, *norms):
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None
    norm1, norm2 = _norm(norms[0], batch), _norm(norms[1], batch)
    if norm1 is None or norm2 is None or not x.numel():
        return None
    learned = [parameters[name] for name in site.learned]
    weights = [t for layer in matrices for t in _matrix(layer)]
    tensors = (*weights, *norm1[0], *norm2[0], *learned)
    for t in tensors:
        if type(t) not in _OWN or t.dtype is not wide or not t.is_cpu or not t.is_contiguous():
            return None
    width, hidden, channels = site.channels + site.quality_channels, len(weights[1]), site.channels
    expected = [hidden * width, hidden, width * hidden, width]
    if len(matrices) == 3:
        expected += [site.numbers * channels * width, site.numbers * channels]
    expected += [hidden] * len(norm1[0]) + [width] * len(norm2[0]) + [channels] * len(learned)
    if [t.numel() for t in tensors] != expected:  # C++ would read elsewhere
        return None
    unused = weights[0]
    q = unused if q is None else q.to("cpu", wide).contiguous()
    run, count = _kernel(type(site).equation.__name__, len(learned), site.numbers, x.dtype)
    c = torch.empty(count, batch, channels, dtype=wide)
    settings = [norm.__dict__.get(name) or 0.0 for norm in norms for name in ("eps", "momentum")]
    tracked = [norm._buffers.get("num_batches_tracked", unused) for norm in norms]
    run(
        x, q, *(weights + weights[:2])[:6], *(norm1[0] + (unused,) * 4)[:4], tracked[0],
        *(norm2[0] + (unused,) * 4)[:4], tracked[1], *learned, c, _settings(*settings), *sizes, int(by_rows),
        site.quality_channels, hidden, site.numbers if len(matrices) == 3 else 0, *norm1[1:], *norm2[1:],
        1 if x.numel() < _ALONE else torch.get_num_threads(),
    )  # fmt: skip
    if norm1[1] == _BATCH or norm2[1] == _BATCH:
        _written(*(norm for norm in norms if norm.training))
    return c


def _written(*norms: nn.Module) -> None:
    """Tell autograd, without which they were written, of the statistics of batch norms."""
    torch.autograd.graph.increment_version(
        [t for norm in norms for t in norm._buffers.values() if t is not None and not t.is_inference()]
    )
