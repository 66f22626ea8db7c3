#include "adaln.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "processor.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor>;

std::vector<const AdaLnIsa*> adaln_isas() {
  std::vector<const AdaLnIsa*> isas;
#if defined(__x86_64__)
  if (has_avx512()) isas.push_back(&kAdaLnAvx512);
  if (has_avx2()) isas.push_back(&kAdaLnAvx2);
#endif
  isas.push_back(&kAdaLnPortable);
  return isas;
}

Optional as(const Optional& tensor, ScalarType type) {
  return tensor ? Optional(torch::stable::to(*tensor, type)) : tensor;
}

// float32 [B, C] without gaps, or an error
Optional of_samples(const char* name, const Optional& vectors, const Tensor& x) {
  if (!vectors) return vectors;
  STD_TORCH_CHECK(vectors->dim() == 2 && vectors->size(0) == x.size(0) && vectors->size(1) == x.size(2), "_adaln: ",
                  name, " must be [B, C] = [", x.size(0), ", ", x.size(2), "], got ", vectors->dim(), " dimensions");
  return torch::stable::contiguous(*as(vectors, ScalarType::Float));
}

const float* data_of(const Optional& vectors) { return vectors ? vectors->const_data_ptr<float>() : nullptr; }

// The same tensor where its channels are next to each other.
Tensor with_dense_rows(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

template <class T>
void run(void (*kernel)(const AdaLnTokens<T>&), const Tensor& x, const float* gate, const Optional& h,
         const float* shift, const float* scale, float eps, Tensor& r, Tensor& y, Tensor& statistics) {
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const T* x_data = static_cast<const T*>(x.const_data_ptr());
  const T* h_data = h ? static_cast<const T*>(h->const_data_ptr()) : nullptr;
  T* r_data = static_cast<T*>(r.mutable_data_ptr());
  T* y_data = static_cast<T*>(y.mutable_data_ptr());
  float* mean = statistics.mutable_data_ptr<float>();
  const int64_t x_strides[] = {x.stride(0), x.stride(1)}, h_strides[] = {h ? h->stride(0) : 0, h ? h->stride(1) : 0};
  constexpr int64_t kWorthAThread = 1 << 15;  // elements
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / channels);
  torch::stable::parallel_for(0, batch * tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(channels);
    for (int64_t next; begin < end; begin = next) {
      const int64_t b = begin / tokens, t = begin % tokens;
      next = std::min(end, (b + 1) * tokens);
      kernel({x_data + b * x_strides[0] + t * x_strides[1], h ? h_data + b * h_strides[0] + t * h_strides[1] : nullptr,
              x_strides[1], h_strides[1], gate ? gate + b * channels : nullptr, scale ? shift + b * channels : nullptr,
              scale ? scale + b * channels : nullptr, gate ? r_data + begin * channels : nullptr,
              scale ? y_data + begin * channels : nullptr, scale ? mean + begin : nullptr,
              scale ? mean + batch * tokens + begin : nullptr, row.data(), next - begin, channels, eps});
    }
  });
}

Results adaln(const Tensor& x, const Optional& gate, const Optional& h, const Optional& shift, const Optional& scale,
              double eps, const AdaLnIsa& isa) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "_adaln: x must be [B, N, C] with C >= 1, got ", x.dim(),
                  " dimensions");
  STD_TORCH_CHECK(gate.has_value() == h.has_value() && shift.has_value() == scale.has_value(),
                  "_adaln: gate and h go together, and shift and scale");
  if (h)
    STD_TORCH_CHECK(h->dim() == 3 && h->size(0) == x.size(0) && h->size(1) == x.size(1) && h->size(2) == x.size(2),
                    "_adaln: h must be [B, N, C] as x is, got ", h->dim(), " dimensions");
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Half) {  // in float32, a result rounded before it is used
    if (h && scale) {
      const Tensor r = std::get<0>(adaln(x, gate, h, std::nullopt, std::nullopt, eps, isa));
      const Results normed = adaln(r, std::nullopt, std::nullopt, shift, scale, eps, isa);
      return {r, std::get<1>(normed), std::get<2>(normed)};
    }
    const auto [r, y, statistics] = adaln(torch::stable::to(x, ScalarType::Float), gate, h, shift, scale, eps, isa);
    return {torch::stable::to(r, type), torch::stable::to(y, type), statistics};
  }

  const Optional gates = of_samples("gate", gate, x), shifts = of_samples("shift", shift, x),
                 scales = of_samples("scale", scale, x);
  const Tensor rows = with_dense_rows(x);
  const Optional additions = h ? Optional(with_dense_rows(*as(h, type))) : h;
  const std::vector<int64_t> size = {x.size(0), x.size(1), x.size(2)}, none = {0}, two = {2, size[0], size[1]};
  Tensor r = torch::stable::new_empty(x, h ? size : none, type);
  Tensor y = torch::stable::new_empty(x, scale ? size : none, type);
  Tensor statistics = torch::stable::new_empty(x, scale ? two : none, ScalarType::Float);
  if (type == ScalarType::Float)
    run(isa.float32, rows, data_of(gates), additions, data_of(shifts), data_of(scales), eps, r, y, statistics);
  else if (type == ScalarType::BFloat16)
    run(isa.bfloat16, rows, data_of(gates), additions, data_of(shifts), data_of(scales), eps, r, y, statistics);
  else
    STD_TORCH_CHECK(false, "_adaln: x must be float32, bfloat16 or float16, got ", type);
  return {r, y, statistics};
}

Results adaln_best(const Tensor& x, const Optional& gate, const Optional& h, const Optional& shift,
                   const Optional& scale, double eps) {
  static const AdaLnIsa& best = *adaln_isas().front();
  return adaln(x, gate, h, shift, scale, eps, best);
}

Results adaln_isa(const Tensor& x, const Optional& gate, const Optional& h, const Optional& shift,
                  const Optional& scale, double eps, const std::string& name) {
  for (const AdaLnIsa* isa : adaln_isas())
    if (name == isa->name) return adaln(x, gate, h, shift, scale, eps, *isa);
  STD_TORCH_CHECK(false, "_adaln_isa: isa must be one of torch.ops.meddiff.cpu_isas(), got ", name);
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("_adaln", TORCH_BOX(&meddiff::adaln_best));
  m.impl("_adaln_isa", TORCH_BOX(&meddiff::adaln_isa));
}
