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

#include "processor.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<const WindowAttentionIsa*> window_attention_isas() {
  std::vector<const WindowAttentionIsa*> isas;
#if defined(__x86_64__)
  if (has_avx512()) isas.push_back(&kWindowAttentionAvx512);
  if (has_avx2()) isas.push_back(&kWindowAttentionAvx2);
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

  // Calls visit(token of the window, offset in qkv, token of its sample) for every token of a window; with `stride` of
  // another volume of this size, offset in that.
  template <class Visit>
  void for_tokens(int64_t number, const Visit& visit) const {
    for_tokens(number, stride, visit);
  }
  template <class Visit>
  void for_tokens(int64_t number, const int64_t* stride, const Visit& visit) const {
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

// dqkv [B, D, H, W, 3·heads·dim], contiguous; grad and out with strides, lse contiguous.
template <class T>
void differentiate_in(const Volume& s, const WindowAttentionIsa& isa, const T* qkv, const T* grad,
                      const int64_t* grad_stride, const T* out, const int64_t* out_stride, const float* lse, T* dqkv,
                      int64_t begin, int64_t end) {
  const int64_t tokens = s.window * s.window * s.window, sample = s.size[1] * s.size[2] * s.size[3];
  const int64_t dim = s.dim, channels = s.heads * dim, step = s.stride[4];
  const float root = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(dim)));
  std::vector<float> buffer(tokens * (7 * dim + 2));
  float *q = buffer.data(), *k = q + tokens * dim, *v = k + tokens * dim, *slope = v + tokens * dim;
  float *dq = slope + tokens * dim, *dk = dq + tokens * dim, *dv = dk + tokens * dim;
  float *delta = dv + tokens * dim, *log_sum = delta + tokens;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t number = i / s.heads, head = i % s.heads, b = s.sample_of(number);
    s.for_tokens(number, [&](int64_t t, int64_t offset, int64_t token) {
      const T* row = qkv + offset + head * dim * step;
      for (int64_t c = 0; c < dim; ++c) {
        q[t * dim + c] = static_cast<float>(row[c * step]) * scale;
        k[t * dim + c] = static_cast<float>(row[(channels + c) * step]);
        v[t * dim + c] = static_cast<float>(row[(2 * channels + c) * step]);
      }
      log_sum[t] = lse[(b * s.heads + head) * sample + token] * static_cast<float>(M_LOG2E);
    });
    s.for_tokens(number, grad_stride, [&](int64_t t, int64_t offset, int64_t) {
      const T* row = grad + offset + head * dim * grad_stride[4];
      for (int64_t c = 0; c < dim; ++c) slope[t * dim + c] = static_cast<float>(row[c * grad_stride[4]]);
    });
    s.for_tokens(number, out_stride, [&](int64_t t, int64_t offset, int64_t) {
      const T* row = out + offset + head * dim * out_stride[4];
      delta[t] = 0;
      for (int64_t c = 0; c < dim; ++c) delta[t] += slope[t * dim + c] * static_cast<float>(row[c * out_stride[4]]);
    });
    isa.gradient(q, k, v, slope, delta, log_sum, tokens, dim, dq, dk, dv);
    s.for_tokens(number, [&](int64_t t, int64_t, int64_t token) {
      T* row = dqkv + (b * sample + token) * 3 * channels + head * dim;
      for (int64_t c = 0; c < dim; ++c) {
        row[c] = static_cast<T>(dq[t * dim + c] * root);
        row[channels + c] = static_cast<T>(dk[t * dim + c] * static_cast<float>(M_LN2));
        row[2 * channels + c] = static_cast<T>(dv[t * dim + c]);
      }
    });
  }
}

void check(const Tensor& qkv, int64_t heads, int64_t window) {
  STD_TORCH_CHECK(qkv.dim() == 5, "window_attention: qkv must be [B, D, H, W, 3·C], got ", qkv.dim(), " dimensions");
  STD_TORCH_CHECK(heads > 0 && window > 0, "window_attention: heads and window must be positive, got ", heads, " and ",
                  window);
  for (int64_t axis = 1; axis <= 3; ++axis)
    STD_TORCH_CHECK(qkv.size(axis) % window == 0, "window_attention: D, H, W must be multiples of window ", window,
                    ", got ", qkv.size(axis));
  STD_TORCH_CHECK(qkv.size(4) > 0 && qkv.size(4) % (3 * heads) == 0 && qkv.size(4) <= 3 * heads * kWindowHeadDim,
                  "window_attention: channels must be 3·heads·head_dim with head_dim 1 to ", kWindowHeadDim, ", got ",
                  qkv.size(4), " with ", heads, " heads");
}

// Calls run(0 of the type) with the number type of qkv.
template <class Run>
void with_type(const Tensor& qkv, const Run& run) {
  switch (qkv.scalar_type()) {
    case ScalarType::Float:
      return run(0.0f);
    case ScalarType::BFloat16:
      return run(c10::BFloat16());
    case ScalarType::Half:
      return run(c10::Half());
    default:
      STD_TORCH_CHECK(false, "window_attention: qkv must be float32, bfloat16 or float16, got ", qkv.scalar_type());
  }
}

// Calls work(begin, end) for shares of the (window, head) pairs, in parallel.
template <class Work>
void for_pairs(const Volume& s, const Work& work) {
  const int64_t pairs = s.size[0] * s.grid[0] * s.grid[1] * s.grid[2] * s.heads;
  const int64_t tokens = s.window * s.window * s.window;
  constexpr int64_t kWorthAThread = 1 << 20;  // multiplications
  torch::stable::parallel_for(0, pairs, std::max<int64_t>(1, kWorthAThread / (tokens * tokens * s.dim)), work);
}

std::tuple<Tensor, Tensor> attend(const Tensor& qkv, int64_t heads, int64_t window, const WindowAttentionIsa& isa) {
  check(qkv, heads, window);
  const Volume s(qkv, heads, window);
  Tensor out = torch::stable::new_empty(qkv, {s.size[0], s.size[1], s.size[2], s.size[3], s.size[4] / 3},
                                        qkv.scalar_type());
  Tensor lse = torch::stable::new_empty(qkv, {s.size[0], heads, s.size[1], s.size[2], s.size[3]}, ScalarType::Float);
  with_type(qkv, [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(qkv.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    float* log_sum = lse.mutable_data_ptr<float>();
    for_pairs(s, [&](int64_t begin, int64_t end) { attend_in<T>(s, isa, source, target, log_sum, begin, end); });
  });
  return {out, lse};
}

Tensor differentiate(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t heads,
                     int64_t window, const WindowAttentionIsa& isa) {
  check(qkv, heads, window);
  const Volume s(qkv, heads, window);
  for (const Tensor* like : {&grad, &out}) {
    STD_TORCH_CHECK(like->dim() == 5 && like->scalar_type() == qkv.scalar_type(),
                    "_window_attention_backward: grad and out must be [B, D, H, W, C] of qkv's type");
    for (int64_t axis = 0; axis < 5; ++axis)
      STD_TORCH_CHECK(like->size(axis) == (axis < 4 ? s.size[axis] : s.size[4] / 3),
                      "_window_attention_backward: grad and out must be [B, D, H, W, C], got ", like->size(axis),
                      " along axis ", axis);
  }
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
                      lse.numel() == heads * s.size[0] * s.size[1] * s.size[2] * s.size[3],
                  "_window_attention_backward: lse must be a contiguous float32 [B, heads, D, H, W]");
  Tensor dqkv = torch::stable::new_empty(qkv, {s.size[0], s.size[1], s.size[2], s.size[3], s.size[4]},
                                         qkv.scalar_type());
  with_type(qkv, [&](auto zero) {
    using T = decltype(zero);
    const T* source = static_cast<const T*>(qkv.const_data_ptr());
    const T* slope = static_cast<const T*>(grad.const_data_ptr());
    const T* result = static_cast<const T*>(out.const_data_ptr());
    const float* log_sum = lse.const_data_ptr<float>();
    T* target = static_cast<T*>(dqkv.mutable_data_ptr());
    const int64_t *grad_stride = grad.strides().data(), *out_stride = out.strides().data();
    for_pairs(s, [&](int64_t begin, int64_t end) {
      differentiate_in<T>(s, isa, source, slope, grad_stride, result, out_stride, log_sum, target, begin, end);
    });
  });
  return dqkv;
}

const WindowAttentionIsa& best() {
  static const WindowAttentionIsa& isa = *window_attention_isas().front();
  return isa;
}

const WindowAttentionIsa& named(const std::string& name) {
  for (const WindowAttentionIsa* isa : window_attention_isas())
    if (name == isa->name) return *isa;
  STD_TORCH_CHECK(false, "_window_attention_isa: isa must be one of torch.ops.meddiff.cpu_isas(), got ", name);
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, int64_t heads, int64_t window) {
  return attend(qkv, heads, window, best());
}

std::tuple<Tensor, Tensor> window_attention_isa(const Tensor& qkv, int64_t heads, int64_t window,
                                                const std::string& name) {
  return attend(qkv, heads, window, named(name));
}

Tensor window_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 int64_t heads, int64_t window) {
  return differentiate(grad, qkv, out, lse, heads, window, best());
}

Tensor window_attention_backward_isa(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                     int64_t heads, int64_t window, const std::string& name) {
  return differentiate(grad, qkv, out, lse, heads, window, named(name));
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_window_attention", TORCH_BOX(&meddiff::window_attention));
  m.impl("_window_attention_isa", TORCH_BOX(&meddiff::window_attention_isa));
  m.impl("_window_attention_backward", TORCH_BOX(&meddiff::window_attention_backward));
  m.impl("_window_attention_backward_isa", TORCH_BOX(&meddiff::window_attention_backward_isa));
}
