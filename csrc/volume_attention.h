#pragma once

#include <cstdint>

namespace meddiff {

// One head of self-attention among many tokens, in bfloat16. q, k and v are rows of `dim` ≤ kVolumeHeadDim numbers.
struct VolumeAttentionHead {
  const uint16_t *q, *k, *v;
  int64_t row;  // numbers from token to token
  int64_t tokens, dim;
  float scale;  // of the scores, times log₂ e
  uint16_t* keys;    // arranged: [groups of 32 tokens][2][dim / 32][512]
  uint16_t* values;  // arranged: [groups of 32 tokens][dim / 16][512]
  uint16_t* out;
  int64_t out_row;

  int64_t groups() const { return (tokens + 31) / 32; }
  int64_t deep() const { return (dim + 31) / 32; }
  int64_t wide() const { return (dim + 15) / 16; }
};

constexpr int64_t kVolumeHeadDim = 128;
constexpr int64_t kVolumeQueries = 256;  // at a time

struct VolumeAttentionIsa {
  void (*begin)();  // in each thread, before and behind its calls of `attend`
  void (*end)();
  void (*arrange)(const VolumeAttentionHead& head, int64_t group);
  void (*attend)(const VolumeAttentionHead& head, int64_t first);  // queries first … first + kVolumeQueries
};

extern const VolumeAttentionIsa kVolumeAttentionAmx;

}  // namespace meddiff
