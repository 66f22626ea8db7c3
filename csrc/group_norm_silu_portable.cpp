#include "group_norm_silu_kernel.h"

namespace meddiff {
namespace {

// GCC's vectors of four floats: SSE2, NEON or what the processor has.
struct Portable {
  typedef float V __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  static constexpr int64_t lanes = 4;
  static V load(const float* p) {
    V a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static V load(const uint16_t* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof halves);
    return reinterpret_cast<V>(__builtin_convertvector(halves, Bits) << 16);
  }
  static void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
  static void store(uint16_t* p, V a) {
    const Bits bits = reinterpret_cast<Bits>(a), rounded = bits + ((bits >> 16 & 1) + 0x7fff);
    const Bits number = reinterpret_cast<Bits>(a == a);
    const Halves halves = __builtin_convertvector(((rounded & number) | (0x7fc00000 & ~number)) >> 16, Halves);
    __builtin_memcpy(p, &halves, sizeof halves);
  }
  static V set1(float a) { return V{a, a, a, a}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V inverse(V a) { return 1 / a; }
  static V quick_inverse(V a) { return inverse(a); }
  static V minus_abs(V a) { return reinterpret_cast<V>(reinterpret_cast<Bits>(a) | 0x80000000u); }
  static V where_positive(V a, V b, V c) { return a > 0 ? b : c; }
  static V round(V a) { return (a + 0x1.8p23f) - 0x1.8p23f; }  // |a| < 2²²
  static V times_power(V a, V n) {
    // the sum has n in its lowest bits
    return reinterpret_cast<V>(reinterpret_cast<Bits>(a) + (reinterpret_cast<Bits>(n + 0x1.8p23f) << 23));
  }
};

}  // namespace

const GroupNormSiluIsa kGroupNormSiluPortable{"portable", GroupNormSilu<Portable>::kStep,
                                              GroupNormSilu<Portable>::kernels<float>(),
                                              GroupNormSilu<Portable>::kernels<uint16_t>()};

}  // namespace meddiff
