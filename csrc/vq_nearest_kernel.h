// The CPU search, written once for all instruction sets. Each vq_nearest_<isa>.cpp includes this file, defines a vector
// type, and is compiled with machine flags of its own. Everything here has internal linkage and calls nothing of the C++
// library: of an inline function compiled in several files the linker keeps one copy, and that could be the AVX-512 one.
//
// An Isa has: V, a vector of `lanes` floats, one token per lane; `groups` vectors that share each broadcast of a code;
// `unroll` codes whose sums are in flight together; load, store, set1, fma(a, b, c) = a·b + c,
// max(a, b) = a > b ? a : b, and not_less(a, b) = !(a < b) as one bit per lane.
#pragma once

#include "vq_nearest.h"

namespace meddiff {
namespace {

// Channels = 0 stands for any number of channels.
template <class Isa, int Channels>
class VqNearestTiles {
 public:
  static constexpr int kTile = Isa::lanes * Isa::groups;

  static void search(const VqNearestSearch& s, int64_t first, int64_t last, float* scratch) {
    const int64_t channels = s.size[1];
    float* x = scratch;                 // [C, kTile] token − centre
    float* z = x + channels * kTile;    // [C, kTile] token
    float* top = z + channels * kTile;  // [blocks, kTile] largest score of each block

    int64_t h = first / s.size[4], d = h / s.size[3], b = d / s.size[2], w = first % s.size[4];
    h %= s.size[3];
    d %= s.size[2];
    for (int64_t token = first; token < last; token += kTile) {
      const int count = last - token < kTile ? static_cast<int>(last - token) : kTile;
      for (int l = 0; l < count; ++l) {
        const float* source = s.z + b * s.stride[0] + d * s.stride[2] + h * s.stride[3] + w * s.stride[4];
        for (int64_t c = 0; c < channels; ++c) z[c * kTile + l] = source[c * s.stride[1]];
        if (++w < s.size[4]) continue;
        w = 0;
        if (++h < s.size[3]) continue;
        h = 0;
        if (++d < s.size[2]) continue;
        d = 0;
        ++b;
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int l = count; l < kTile; ++l) z[c * kTile + l] = z[c * kTile];

      double norm[kTile] = {};
      for (int64_t c = 0; c < channels; ++c) {
        for (int l = 0; l < kTile; ++l) {
          const float difference = z[c * kTile + l] - s.centre[c];
          x[c * kTile + l] = difference;
          norm[l] += static_cast<double>(difference) * difference;
        }
      }

      float limit[kTile];
      filter(s, x, top, limit);
      for (int l = 0; l < kTile; ++l) {
        limit[l] = static_cast<float>(limit[l] - vq_nearest_slack(__builtin_sqrt(norm[l]), s.radius, channels));
      }

      double distance[kTile];
      for (int l = 0; l < kTile; ++l) distance[l] = HUGE_VAL;
      for (int l = 0; l < count; ++l) s.index[token + l] = 0;
      for (int64_t block = 0; block < s.blocks; ++block) {
        for (int g = 0; g < Isa::groups; ++g) {
          const float* best = top + block * kTile + g * Isa::lanes;
          unsigned marked = Isa::not_less(Isa::load(best), Isa::load(limit + g * Isa::lanes));
          for (; marked; marked &= marked - 1) {
            const int l = g * Isa::lanes + __builtin_ctz(marked);
            if (l < count) refine(z + l, s.columns, channels, block, &distance[l], &s.index[token + l]);
          }
        }
      }
    }
  }

 private:
  using V = typename Isa::V;

  // Scores of x [C, kTile] against every code: the largest of each block, and the largest of all.
  static void filter(const VqNearestSearch& s, const float* x, float* top, float* largest) {
    const int64_t channels = Channels > 0 ? Channels : s.size[1];
    V overall[Isa::groups];
    for (int g = 0; g < Isa::groups; ++g) overall[g] = Isa::set1(-HUGE_VALF);
    const float* row = s.rows;
    for (int64_t block = 0; block < s.blocks; ++block, top += kTile) {
      V best[Isa::groups];
      for (int g = 0; g < Isa::groups; ++g) best[g] = Isa::set1(-HUGE_VALF);
      for (int j = 0; j < kVqBlock; j += Isa::unroll, row += Isa::unroll * (channels + 1)) {
        V score[Isa::unroll][Isa::groups];
        for (int u = 0; u < Isa::unroll; ++u)
          for (int g = 0; g < Isa::groups; ++g) score[u][g] = Isa::set1(row[u * (channels + 1)]);
        for (int64_t c = 0; c < channels; ++c) {
          for (int u = 0; u < Isa::unroll; ++u) {
            const V y = Isa::set1(row[u * (channels + 1) + 1 + c]);
            for (int g = 0; g < Isa::groups; ++g)
              score[u][g] = Isa::fma(Isa::load(x + c * kTile + g * Isa::lanes), y, score[u][g]);
          }
        }
        for (int u = 0; u < Isa::unroll; ++u)
          for (int g = 0; g < Isa::groups; ++g) best[g] = Isa::max(score[u][g], best[g]);
      }
      for (int g = 0; g < Isa::groups; ++g) {
        Isa::store(top + g * Isa::lanes, best[g]);
        overall[g] = Isa::max(best[g], overall[g]);
      }
    }
    for (int g = 0; g < Isa::groups; ++g) Isa::store(largest + g * Isa::lanes, overall[g]);
  }

  // Exact distances of one token z [C, stride kTile] to one block of codes.
  static void refine(const float* z, const float* columns, int64_t channels, int64_t block, double* distance,
                     int64_t* index) {
    const float* column = columns + block * channels * kVqBlock;
    double sum[kVqBlock] = {};
    for (int64_t c = 0; c < channels; ++c, column += kVqBlock) {
      const double zc = z[c * kTile];
      for (int j = 0; j < kVqBlock; ++j) {
        const double difference = zc - static_cast<double>(column[j]);
        sum[j] += difference * difference;
      }
    }
    for (int j = 0; j < kVqBlock; ++j) {
      if (sum[j] < *distance) {
        *distance = sum[j];
        *index = block * kVqBlock + j;
      }
    }
  }
};

template <class Isa>
void vq_nearest_search(const VqNearestSearch& s, int64_t first, int64_t last, float* scratch) {
  switch (s.size[1]) {
    case 4:
      return VqNearestTiles<Isa, 4>::search(s, first, last, scratch);
    case 8:
      return VqNearestTiles<Isa, 8>::search(s, first, last, scratch);
    case 16:
      return VqNearestTiles<Isa, 16>::search(s, first, last, scratch);
    default:
      return VqNearestTiles<Isa, 0>::search(s, first, last, scratch);
  }
}

}  // namespace
}  // namespace meddiff
