#include "winograd_kernel.h"

namespace meddiff {
namespace {

// GCC's vectors of four floats: SSE2, NEON or what the processor has.
struct Portable {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int64_t lanes = 4;
  static constexpr int rows = 4, columns = 2;
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
  static V fma(V a, V b, V c) { return a * b + c; }
};

}  // namespace

const WinogradIsa kWinogradPortable = winograd_isa<Portable>("portable");

}  // namespace meddiff
