#include <immintrin.h>

#include "winograd_kernel.h"

namespace meddiff {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int64_t lanes = 16;
  static constexpr int rows = 6, columns = 4;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const WinogradIsa kWinogradAvx512 = winograd_isa<Avx512>("avx512");

}  // namespace meddiff
