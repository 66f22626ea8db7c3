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

// Its gradient: with p = 2^(s - log_sum), the probabilities, and ds = p·(grad[i]·v[j] - delta[i]),
//   dq[i] = Σⱼ dsᵢⱼ k[j],  dk[j] = Σᵢ dsᵢⱼ q[i],  dv[j] = Σᵢ pᵢⱼ grad[i]
//   q, k, v, dim, log_sum  as above
//   grad                   [tokens, dim], of out
//   delta                  [tokens], grad[i]·out[i]
//   dq, dk, dv             [tokens, dim], written; those of the scores in natural units are dq / √dim and dk·ln 2
using WindowAttentionGradient = void (*)(const float* q, const float* k, const float* v, const float* grad,
                                         const float* delta, const float* log_sum, int64_t tokens, int64_t dim,
                                         float* dq, float* dk, float* dv);

struct WindowAttentionIsa {
  const char* name;
  WindowAttentionKernel kernel;
  WindowAttentionGradient gradient;
};

extern const WindowAttentionIsa kWindowAttentionPortable;
extern const WindowAttentionIsa kWindowAttentionAvx2;
extern const WindowAttentionIsa kWindowAttentionAvx512;

}  // namespace meddiff
