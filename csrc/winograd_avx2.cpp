#include <immintrin.h>

#include "winograd_kernel.h"

namespace meddiff {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int64_t lanes = 8;
  static constexpr int rows = 6, columns = 2;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const WinogradIsa kWinogradAvx2 = winograd_isa<Avx2>("avx2");

}  // namespace meddiff
