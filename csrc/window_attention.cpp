#include "window_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<const WindowAttentionIsa*> window_attention_isas() {
  std::vector<const WindowAttentionIsa*> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) isas.push_back(&kWindowAttentionAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(&kWindowAttentionAvx2);
#endif
  isas.push_back(&kWindowAttentionPortable);
  return isas;
}

// One volume of attention. Windows are numbered in B, D, H, W order, and tokens of a window in D, H, W order.
struct Volume {
  int64_t size[5], stride[5];  // of qkv, in elements
  int64_t heads, dim, window;
  int64_t grid[3];  // windows along D, H, W

  Volume(const Tensor& qkv, int64_t heads, int64_t window)
      : heads(heads), dim(qkv.size(4) / 3 / heads), window(window) {
    std::copy_n(qkv.sizes().data(), 5, size);
    std::copy_n(qkv.strides().data(), 5, stride);
    for (int i = 0; i < 3; ++i) grid[i] = size[i + 1] / window;
  }

  // Calls visit(token of the window, offset in qkv, token of its sample) for every token of a window.
  template <class Visit>
  void for_tokens(int64_t number, const Visit& visit) const {
    const int64_t w0 = number % grid[2] * window, h0 = number / grid[2] % grid[1] * window;
    const int64_t d0 = number / (grid[2] * grid[1]) % grid[0] * window;
    const int64_t sample = sample_of(number) * stride[0];
    for (int64_t t = 0, d = d0; d < d0 + window; ++d)
      for (int64_t h = h0; h < h0 + window; ++h)
        for (int64_t w = w0; w < w0 + window; ++w, ++t)
          visit(t, sample + d * stride[1] + h * stride[2] + w * stride[3], (d * size[2] + h) * size[3] + w);
  }

  int64_t sample_of(int64_t number) const { return number / (grid[0] * grid[1] * grid[2]); }
};

// out [B, D, H, W, heads·dim] and lse [B, heads, D, H, W], both contiguous, for (window, head) pairs begin … end − 1.
template <class T>
void attend_in(const Volume& s, const WindowAttentionIsa& isa, const T* qkv, T* out, float* lse, int64_t begin,
               int64_t end) {
  const int64_t tokens = s.window * s.window * s.window, sample = s.size[1] * s.size[2] * s.size[3];
  const int64_t dim = s.dim, channels = s.heads * dim, step = s.stride[4];
  const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(dim)));
  std::vector<float> buffer(tokens * (4 * dim + 1));
  float *q = buffer.data(), *k = q + tokens * dim, *v = k + tokens * dim, *result = v + tokens * dim;
  float* log_sum = result + tokens * dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t number = i / s.heads, head = i % s.heads, b = s.sample_of(number);
    s.for_tokens(number, [&](int64_t t, int64_t offset, int64_t) {
      const T* row = qkv + offset + head * dim * step;
      for (int64_t c = 0; c < dim; ++c) {
        q[t * dim + c] = static_cast<float>(row[c * step]) * scale;
        k[t * dim + c] = static_cast<float>(row[(channels + c) * step]);
        v[t * dim + c] = static_cast<float>(row[(2 * channels + c) * step]);
      }
    });
    isa.kernel(q, k, v, tokens, dim, result, log_sum);
    s.for_tokens(number, [&](int64_t t, int64_t, int64_t token) {
      T* row = out + (b * sample + token) * channels + head * dim;
      for (int64_t c = 0; c < dim; ++c) row[c] = static_cast<T>(result[t * dim + c]);
      lse[(b * s.heads + head) * sample + token] = log_sum[t] * static_cast<float>(M_LN2);
    });
  }
}

std::tuple<Tensor, Tensor> attend(const Tensor& qkv, int64_t heads, int64_t window, const WindowAttentionIsa& isa) {
  STD_TORCH_CHECK(qkv.dim() == 5, "window_attention: qkv must be [B, D, H, W, 3·C], got ", qkv.dim(), " dimensions");
  STD_TORCH_CHECK(heads > 0 && window > 0, "window_attention: heads and window must be positive, got ", heads, " and ",
                  window);
  for (int64_t axis = 1; axis <= 3; ++axis)
    STD_TORCH_CHECK(qkv.size(axis) % window == 0, "window_attention: D, H, W must be multiples of window ", window,
                    ", got ", qkv.size(axis));
  STD_TORCH_CHECK(qkv.size(4) > 0 && qkv.size(4) % (3 * heads) == 0 && qkv.size(4) <= 3 * heads * kWindowHeadDim,
                  "window_attention: channels must be 3·heads·head_dim with head_dim 1 to ", kWindowHeadDim, ", got ",
                  qkv.size(4), " with ", heads, " heads");
  const Volume s(qkv, heads, window);
  const ScalarType type = qkv.scalar_type();
  Tensor out = torch::stable::new_empty(qkv, {s.size[0], s.size[1], s.size[2], s.size[3], s.size[4] / 3}, type);
  Tensor lse = torch::stable::new_empty(qkv, {s.size[0], heads, s.size[1], s.size[2], s.size[3]}, ScalarType::Float);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(qkv.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    float* log_sum = lse.mutable_data_ptr<float>();
    const int64_t pairs = s.size[0] * s.grid[0] * s.grid[1] * s.grid[2] * heads, tokens = window * window * window;
    constexpr int64_t kWorthAThread = 1 << 20;  // multiplications
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / (tokens * tokens * s.dim));
    torch::stable::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
      attend_in<T>(s, isa, source, target, log_sum, begin, end);
    });
  };
  switch (type) {
    case ScalarType::Float:
      run(0.0f);
      break;
    case ScalarType::BFloat16:
      run(c10::BFloat16());
      break;
    case ScalarType::Half:
      run(c10::Half());
      break;
    default:
      STD_TORCH_CHECK(false, "window_attention: qkv must be float32, bfloat16 or float16, got ", type);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, int64_t heads, int64_t window) {
  static const WindowAttentionIsa& best = *window_attention_isas().front();
  return attend(qkv, heads, window, best);
}

std::tuple<Tensor, Tensor> window_attention_isa(const Tensor& qkv, int64_t heads, int64_t window,
                                                const std::string& name) {
  for (const WindowAttentionIsa* isa : window_attention_isas())
    if (name == isa->name) return attend(qkv, heads, window, *isa);
  STD_TORCH_CHECK(false, "_window_attention_isa: isa must be one of torch.ops.meddiff.cpu_isas(), got ", name);
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_window_attention", TORCH_BOX(&meddiff::window_attention));
  m.impl("_window_attention_isa", TORCH_BOX(&meddiff::window_attention_isa));
}
