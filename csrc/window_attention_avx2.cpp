#include <immintrin.h>

#include "window_attention_kernel.h"

namespace meddiff {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int lanes = 8, groups = 1, unroll = 8, columns = 12;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V exp2(V x) {
    x = max(set1(-126), x);  // of a NaN and a number, the second
    const V n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V f = sub(x, n);
    V power = fma(f, set1(kExp2[4]), set1(kExp2[3]));
    for (int i = 2; i >= 0; --i) power = fma(f, power, set1(kExp2[i]));
    power = fma(f, power, set1(1));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
  }
};

}  // namespace

const WindowAttentionIsa kWindowAttentionAvx2{"avx2", WindowAttention<Avx2>::attend, WindowAttention<Avx2>::differentiate};

}  // namespace meddiff
