#pragma once

#include <cstdint>

namespace meddiff {

// Gate and residual, then LayerNorm and modulation, of tokens of one sample:
//   r = x + gate·h, or x where gate is null
//   y = (r - mean)·rstd·(1 + scale) + shift, where scale is not null; rstd = 1/√(variance + eps)
//   x, h             [tokens, channels], rows x_stride and h_stride elements apart
//   gate, shift, scale  [channels]
//   r, y             [tokens, channels], written without gaps; y is computed from r as it is stored
//   mean, rstd       [tokens], written with y
//   row              [channels], scratch
// T is float, or the bits of bfloat16. Any alignment.
template <class T>
struct AdaLnTokens {
  const T *x, *h;
  int64_t x_stride, h_stride;
  const float *gate, *shift, *scale;
  T *r, *y;
  float *mean, *rstd, *row;
  int64_t tokens, channels;
  float eps;
};

struct AdaLnIsa {
  const char* name;
  void (*float32)(const AdaLnTokens<float>&);
  void (*bfloat16)(const AdaLnTokens<uint16_t>&);
};

extern const AdaLnIsa kAdaLnPortable;
extern const AdaLnIsa kAdaLnAvx2;
extern const AdaLnIsa kAdaLnAvx512;

}  // namespace meddiff
