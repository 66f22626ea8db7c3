#pragma once

#include <cstdint>

namespace meddiff {

constexpr int64_t kWindowHeadDim = 64;  // largest head size

// Attention among the tokens of one window, for one head:
//   out[i] = Σⱼ 2^sᵢⱼ v[j] / Σⱼ 2^sᵢⱼ,  sᵢⱼ = q[i]·k[j],  log_sum[i] = log₂ Σⱼ 2^sᵢⱼ
//   q        [tokens, dim], already multiplied by log₂e / √dim
//   k, v     [tokens, dim]
//   out      [tokens, dim], written
//   log_sum  [tokens], written
// dim <= kWindowHeadDim. Any alignment.
using WindowAttentionKernel = void (*)(const float* q, const float* k, const float* v, int64_t tokens, int64_t dim,
                                       float* out, float* log_sum);

struct WindowAttentionIsa {
  const char* name;
  WindowAttentionKernel kernel;
};

extern const WindowAttentionIsa kWindowAttentionPortable;
extern const WindowAttentionIsa kWindowAttentionAvx2;
extern const WindowAttentionIsa kWindowAttentionAvx512;

}  // namespace meddiff
