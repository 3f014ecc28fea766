"""What C++ begins with: its types, vectors of them, and an exponential."""

from __future__ import annotations

import torch

TYPES = {
    torch.float32: ("float", "float"), torch.float64: ("double", "double"),
    torch.float16: ("at::Half", "float"), torch.bfloat16: ("at::BFloat16", "float"),
}  # fmt: skip
"""dtype → as stored, as computed."""

ALONE = 1 << 15
"""Numbers, or products, below which one thread does it."""

_PRELUDE = """
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
using T = %s;
using S = %s;
using V = at::vec::Vectorized<S>;
constexpr int64_t W = V::size();
constexpr int64_t ALONE = %d;
constexpr int64_t UNROLL = 4;  // chains that do not wait for one another

// the first `count` numbers, zeros after them
template <class U> static inline V in(const U* x, int64_t count = W) {
  if constexpr (std::is_same_v<U, S>) return V::loadu(x, count);
  else {
    V found;
    if (count < W) {  // in torch 2.6, on AVX2, what loadu of a count leaves behind them is not zero
      U padded[W] = {};
      std::memcpy(padded, x, count * sizeof(U));
      at::vec::load_to_float(padded, found);
      return found;
    }
    at::vec::load_to_float(x, found);
    return found;
  }
}

template <class U> static inline void out(const V& found, U* y, int64_t count = W) {
  if constexpr (std::is_same_v<U, S>) found.store(y, count);
  else {
    const auto twice = at::vec::convert_from_float<U>(found, found);
    if (count < W) twice.store(y, count);
    else std::memcpy(y, &twice, W * sizeof(U));  // a masked store, and what is loaded next to it would wait
  }
}

#if defined(CPU_CAPABILITY_AVX512)
constexpr float LOWEST = -104.f;  // its exponential is zero: here below the denormal numbers
#else
constexpr float LOWEST = -88.f;  // there with 2^-127, which the shift makes zero
#endif

// without a call, as that of V::exp() would be, which empties the registers: 2 ulp, by Cody and Waite's reduction
template <class U, class V = at::vec::Vectorized<U>> static inline V fast_exp(const at::vec::Vectorized<U>& x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<U, float>) {
    V in = at::vec::clamp(x, V(LOWEST), V(89.f));  // NaN stays
    V n = (in * V(1.44269504088896341f)).round();
    V r = at::vec::fmadd(n, V(-1.42860677e-06f), at::vec::fmadd(n, V(-0.693145752f), in));
    V p = at::vec::fmadd(V(1.f / 720), r, V(1.f / 120));
    p = at::vec::fmadd(at::vec::fmadd(p, r, V(1.f / 24)), r, V(1.f / 6));
    p = at::vec::fmadd(at::vec::fmadd(p, r, V(0.5f)) * r, r, r) + V(1.f);
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_scalef_ps(p, n);
#else
    using I = at::vec::Vectorized<int32_t>;  // 2^n; of 128 it is infinity
    return p * at::vec::cast<float>((at::vec::convert_to_int_of_same_size(n) + I(127)) << I(23));
#endif
  }
#endif
  return x.exp();
}
"""


def prelude(dtype: torch.dtype) -> str:
    """C++ in which T is the type that a dtype is stored in, S that it is computed in, V a vector of S."""
    return _PRELUDE % (*TYPES[dtype], ALONE)
