#include "window_attention_kernel.h"

namespace meddiff {
namespace {

// GCC's vectors of four floats: SSE2, NEON or what the processor has.
struct Portable {
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(16)));
  static constexpr int lanes = 4, groups = 1, unroll = 4, columns = 12;
  static V load(const float* p) {
    V a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
  static V set1(float a) { return V{a, a, a, a}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V exp2(V x) {
    const V shift = set1(0x1.8p23f);  // x + shift has the integer nearest to x in its lowest bits
    x = max(set1(-126), x);           // of a NaN and a number, the second
    const V shifted = x + shift, f = x - (shifted - shift);
    V power = set1(kExp2[4]);
    for (int i = 3; i >= 0; --i) power = power * f + kExp2[i];
    power = power * f + 1;
    return reinterpret_cast<V>(reinterpret_cast<Integers>(power) + (reinterpret_cast<Integers>(shifted) << 23));
  }
};

}  // namespace

const WindowAttentionIsa kWindowAttentionPortable{"portable", WindowAttention<Portable>::attend, WindowAttention<Portable>::differentiate};

}  // namespace meddiff
