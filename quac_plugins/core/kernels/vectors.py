"""The beginning of all C++ sources: types, vectors, and an exponential."""

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
    V vector;
    if (count < W) {  // in torch 2.6, on AVX2, what loadu of a count leaves behind them is not zero
      U padded[W] = {};
      std::memcpy(padded, x, count * sizeof(U));
      at::vec::load_to_float(padded, vector);
      return vector;
    }
    at::vec::load_to_float(x, vector);
    return vector;
  }
}

template <class U> static inline void out(const V& vector, U* y, int64_t count = W) {
  if constexpr (std::is_same_v<U, S>) vector.store(y, count);
  else {
    const auto twice = at::vec::convert_from_float<U>(vector, vector);
    if (count < W) twice.store(y, count);
    else std::memcpy(y, &twice, W * sizeof(U));  // a masked store, and what is loaded next to it would wait
  }
}

// without a call, as that of V::exp() would be, which empties the registers: to 2 ulp between 2^-126 and 2^127
template <class U, class V = at::vec::Vectorized<U>> static inline V fast_exp(const at::vec::Vectorized<U>& x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<U, float>) {
    using I = at::vec::Vectorized<int32_t>;
    const V in = at::vec::clamp(x, V(-88.f), V(89.f)), shift(12582912.f + 127);  // NaN stays
    const V bits = at::vec::fmadd(in, V(1.44269504088896341f), shift);  // n + 127 in the last ones, n of 2^n e^r
    const V r = at::vec::fmadd(bits - shift, V(-0.693147182f), in);  // n ln(2) is not rounded
    V p = at::vec::fmadd(V(8.2902961e-3f), r, V(4.1898031e-2f));  // to 1e-7
    p = at::vec::fmadd(at::vec::fmadd(p, r, V(1.6667637e-1f)), r, V(4.9999149e-1f));
    p = at::vec::fmadd(at::vec::fmadd(p, r, V(9.9999971e-1f)), r, V(1.f));
    return p * at::vec::cast<float>(at::vec::cast<int32_t>(bits) << I(23));
  }
#endif
  return x.exp();
}
"""


def prelude(dtype: torch.dtype) -> str:
    """Return the C++ types of a dtype: T in memory, S in the arithmetic, and V, a vector of S."""
    return _PRELUDE % (*TYPES[dtype], ALONE)
