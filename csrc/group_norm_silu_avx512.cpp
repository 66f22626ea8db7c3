#include <immintrin.h>

#include "group_norm_silu_kernel.h"

namespace meddiff {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int64_t lanes = 16;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static void store(uint16_t* p, V a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i halves = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
  }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V inverse(V a) {
    const V near = _mm512_rcp14_ps(a);  // one step of Newton's brings 2⁻¹⁴ to the rounding error
    return fma(near, _mm512_fnmadd_ps(a, near, set1(1)), near);
  }
  static V quick_inverse(V a) { return _mm512_rcp14_ps(a); }
  static V minus_abs(V a) {
    return _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
  }
  static V where_positive(V a, V b, V c) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), c, b);
  }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V times_power(V a, V n) { return _mm512_scalef_ps(a, n); }
};

}  // namespace

const GroupNormSiluIsa kGroupNormSiluAvx512{"avx512", GroupNormSilu<Avx512>::kStep,
                                            GroupNormSilu<Avx512>::kernels<float>(),
                                            GroupNormSilu<Avx512>::kernels<uint16_t>()};

}  // namespace meddiff
