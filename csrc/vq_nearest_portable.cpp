#include "vq_nearest_kernel.h"

namespace meddiff {
namespace {

// Plain loops over eight floats, which compilers turn into SSE2 or NEON.
struct Portable {
  static constexpr int lanes = 8, groups = 1, unroll = 2;
  struct V {
    float at[lanes];
  };
  static V load(const float* p) {
    V a;
    for (int l = 0; l < lanes; ++l) a.at[l] = p[l];
    return a;
  }
  static void store(float* p, V a) {
    for (int l = 0; l < lanes; ++l) p[l] = a.at[l];
  }
  static V set1(float value) {
    V a;
    for (int l = 0; l < lanes; ++l) a.at[l] = value;
    return a;
  }
  static V fma(V a, V b, V c) {
    for (int l = 0; l < lanes; ++l) c.at[l] += a.at[l] * b.at[l];
    return c;
  }
  static V max(V a, V b) {
    for (int l = 0; l < lanes; ++l) b.at[l] = a.at[l] > b.at[l] ? a.at[l] : b.at[l];
    return b;
  }
  static unsigned not_less(V a, V b) {
    unsigned bits = 0;
    for (int l = 0; l < lanes; ++l) bits |= static_cast<unsigned>(!(a.at[l] < b.at[l])) << l;
    return bits;
  }
};

}  // namespace

const VqNearestIsa kVqNearestPortable{"portable", VqNearestTiles<Portable, 0>::kTile, vq_nearest_search<Portable>};

}  // namespace meddiff
