// Gate, LayerNorm and modulation on the CPU, in the compiler's vectors of N floats. Each adaln_<isa>.cpp includes this
// file, chooses N, and is compiled with machine flags of its own. Everything here has internal linkage and calls nothing
// of the C++ library, for the reason that window_attention_kernel.h gives.
#pragma once

#include "adaln.h"

namespace meddiff {
namespace {

template <int N>
struct Vectors {
  typedef float V __attribute__((vector_size(4 * N)));
  typedef uint32_t Bits __attribute__((vector_size(4 * N)));
  typedef uint16_t Halves __attribute__((vector_size(2 * N)));
};

template <>
struct Vectors<1> {  // there are no vectors of one
  typedef float V;
};

template <int N>
struct Lanes {
  using V = typename Vectors<N>::V;
  using Bits = typename Vectors<N>::Bits;
  using Halves = typename Vectors<N>::Halves;

  static inline V load(const float* p) {
    V a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static inline V load(const uint16_t* p) {
    Halves a;
    __builtin_memcpy(&a, p, sizeof a);
    return reinterpret_cast<V>(__builtin_convertvector(a, Bits) << 16);
  }
  static inline void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
  static inline void store(uint16_t* p, V a) {  // to nearest even; a NaN stays one
    const Bits bits = reinterpret_cast<Bits>(a), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves b = __builtin_convertvector((a != a ? Bits{} + 0x7fc00000 : rounded) >> 16, Halves);
    __builtin_memcpy(p, &b, sizeof b);
  }
  static inline auto halved(V a) {
    typename Vectors<N / 2>::V half[2];
    __builtin_memcpy(half, &a, sizeof a);
    return half[0] + half[1];
  }
};

template <>
struct Lanes<1> {
  using V = float;
  static inline V load(const float* p) { return *p; }
  static inline V load(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    V a;
    __builtin_memcpy(&a, &bits, sizeof a);
    return a;
  }
  static inline void store(float* p, V a) { *p = a; }
  static inline void store(uint16_t* p, V a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, sizeof a);
    *p = a != a ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
};

// Calls visit(Lanes<n>(), i) for i = first … channels - 1 in steps of n: N, and for what is left N/2, …, 1.
template <int N, class Visit>
inline void for_channels(int64_t first, int64_t channels, const Visit& visit) {
  for (; first + N <= channels; first += N) visit(Lanes<N>(), first);
  if constexpr (N > 1) {
    if (first < channels) for_channels<N / 2>(first, channels, visit);
  }
}

// The sum of `total` and of term(Lanes<n>(), i) over the same.
template <int N, class Term>
inline float sum_channels(int64_t first, int64_t channels, const Term& term, typename Lanes<N>::V total) {
  for (; first + N <= channels; first += N) total += term(Lanes<N>(), first);
  if constexpr (N > 1)
    return sum_channels<N / 2>(first, channels, term, Lanes<N>::halved(total));
  else
    return total;
}

template <int N, class T>
void adaln(const AdaLnTokens<T>& a) {
  const T *x = a.x, *h = a.h;
  T *r = a.r, *y = a.y;
  float* row = a.row;
  const int64_t channels = a.channels;
  const typename Lanes<N>::V none = {};
  const float share = 1.0f / static_cast<float>(channels);
  for (int64_t t = 0; t < a.tokens; ++t, x += a.x_stride) {
    const T* source = x;
    if (a.gate != nullptr) {
      for_channels<N>(0, channels, [&](auto lanes, int64_t i) {
        lanes.store(r + i, lanes.load(x + i) + lanes.load(a.gate + i) * lanes.load(h + i));
      });
      source = r;
      r += channels, h += a.h_stride;
    }
    if (a.scale == nullptr) continue;
    const auto read = [&](auto lanes, int64_t i) {
      const auto value = lanes.load(source + i);
      lanes.store(row + i, value);
      return value;
    };
    const float mean = sum_channels<N>(0, channels, read, none) * share;
    const auto squared = [&](auto lanes, int64_t i) {
      const auto centred = lanes.load(row + i) - mean;
      return centred * centred;
    };
    const float variance = sum_channels<N>(0, channels, squared, none) * share;
    const float rstd = 1 / __builtin_sqrtf(variance + a.eps);
    for_channels<N>(0, channels, [&](auto lanes, int64_t i) {
      const auto normed = (lanes.load(row + i) - mean) * rstd;
      lanes.store(y + i, normed * (lanes.load(a.scale + i) + 1) + lanes.load(a.shift + i));
    });
    y += channels;
    a.mean[t] = mean, a.rstd[t] = rstd;
  }
}

}  // namespace
}  // namespace meddiff
