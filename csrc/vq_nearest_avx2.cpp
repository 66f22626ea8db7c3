#include <immintrin.h>

#include "vq_nearest_kernel.h"

namespace meddiff {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int lanes = 8, groups = 1, unroll = 4;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static unsigned not_less(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)); }
};

}  // namespace

const VqNearestIsa kVqNearestAvx2{"avx2", VqNearestTiles<Avx2, 0>::kTile, vq_nearest_search<Avx2>};

}  // namespace meddiff
