#include <immintrin.h>

#include "vq_nearest_kernel.h"

namespace meddiff {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int lanes = 16, groups = 2, unroll = 4;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static unsigned not_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
};

}  // namespace

const VqNearestIsa kVqNearestAvx512{"avx512", VqNearestTiles<Avx512, 0>::kTile, vq_nearest_search<Avx512>};

}  // namespace meddiff
