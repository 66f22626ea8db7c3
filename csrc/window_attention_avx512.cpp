#include <immintrin.h>

#include "window_attention_kernel.h"

namespace meddiff {
namespace {

// 2^f = 1 + f·(kFloorExp2[0] + f·(kFloorExp2[1] + …)) for 0 <= f < 1, to within 8.3e-8 of it.
constexpr float kFloorExp2[5] = {0x1.62e4bap-1f, 0x1.ebdb56p-3f, 0x1.c91ce8p-5f, 0x1.277850p-7f, 0x1.e9750ep-10f};

struct Avx512 {
  using V = __m512;
  static constexpr int lanes = 16, groups = 2, unroll = 8, columns = 12;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V exp2(V x) {
    const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x − ⌊x⌋, and ⌊x⌋ is scalef's
    V power = fma(f, set1(kFloorExp2[4]), set1(kFloorExp2[3]));
    for (int i = 2; i >= 0; --i) power = fma(f, power, set1(kFloorExp2[i]));
    return _mm512_scalef_ps(fma(f, power, set1(1)), x);
  }
};

}  // namespace

const WindowAttentionIsa kWindowAttentionAvx512{"avx512", WindowAttention<Avx512>::attend, WindowAttention<Avx512>::differentiate};

}  // namespace meddiff
