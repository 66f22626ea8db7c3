// What the CPU operators of the nearest code share: the choice of the instruction set, and the codebook as the search
// reads it. Free of PyTorch. Not for vq_nearest_<isa>.cpp: see vq_nearest_kernel.h on inline functions.
#pragma once

#include <limits>
#include <vector>

#include "processor.h"
#include "vq_nearest.h"

namespace meddiff {

// Those that were compiled in and that this processor has, the best one first.
inline std::vector<const VqNearestIsa*> vq_nearest_isas() {
  std::vector<const VqNearestIsa*> isas;
#if defined(__x86_64__)
  if (has_avx512()) isas.push_back(&kVqNearestAvx512);
  if (has_avx2()) isas.push_back(&kVqNearestAvx2);
#endif
  isas.push_back(&kVqNearestPortable);
  return isas;
}

// The codebook [K, C] in the two layouts that the search reads.
struct Codebook {
  std::vector<float> centre, rows, columns;
  double radius = 0;

  Codebook(const float* codes, int64_t n_codes, int64_t channels) : centre(channels) {
    const int64_t blocks = (n_codes + kVqBlock - 1) / kVqBlock;
    rows.resize(blocks * kVqBlock * (1 + channels));
    columns.resize(blocks * kVqBlock * channels, std::numeric_limits<float>::quiet_NaN());

    std::vector<double> sum(channels);
    for (int64_t k = 0; k < n_codes; ++k)
      for (int64_t c = 0; c < channels; ++c) sum[c] += codes[k * channels + c];
    for (int64_t c = 0; c < channels; ++c) centre[c] = static_cast<float>(sum[c] / static_cast<double>(n_codes));

    for (int64_t k = 0; k < blocks * kVqBlock; ++k) {
      float* row = rows.data() + k * (1 + channels);
      if (k >= n_codes) {
        row[0] = -HUGE_VALF;
        continue;
      }
      double square = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const float code = codes[k * channels + c];
        columns[(k / kVqBlock * channels + c) * kVqBlock + k % kVqBlock] = code;
        row[1 + c] = code - centre[c];
        square += static_cast<double>(row[1 + c]) * row[1 + c];
      }
      row[0] = static_cast<float>(-0.5 * square);
      // a NaN or infinite code makes the filter useless: everything is then evaluated exactly
      if (!(square <= radius)) radius = square < HUGE_VAL ? square : HUGE_VAL;
    }
    radius = std::sqrt(radius);
  }
};

struct alignas(64) CacheLine {
  float floats[16];
};

}  // namespace meddiff
