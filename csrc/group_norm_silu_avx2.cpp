#include <immintrin.h>

#include "group_norm_silu_kernel.h"

namespace meddiff {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int64_t lanes = 8;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static void store(uint16_t* p, V a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const V nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const V chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan);
    const __m256i halves = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V inverse(V a) { return _mm256_div_ps(set1(1), a); }
  static V quick_inverse(V a) { return inverse(a); }
  static V minus_abs(V a) { return _mm256_or_ps(a, set1(-0.0f)); }
  static V where_positive(V a, V b, V c) {
    return _mm256_blendv_ps(c, b, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ));
  }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V times_power(V a, V n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
};

}  // namespace

const GroupNormSiluIsa kGroupNormSiluAvx2{"avx2", GroupNormSilu<Avx2>::kStep, GroupNormSilu<Avx2>::kernels<float>(),
                                          GroupNormSilu<Avx2>::kernels<uint16_t>()};

}  // namespace meddiff
