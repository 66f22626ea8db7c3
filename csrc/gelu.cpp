#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "group_norm_silu.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void gelu(const Tensor& x, const std::optional<std::string>& isa_name) {
  STD_TORCH_CHECK(x.is_contiguous(), "_gelu_: x must be contiguous");
  const GroupNormSiluIsa& isa = find_group_norm_silu_isa("_gelu_", isa_name);
  constexpr int64_t kWorthAThread = 1 << 14;  // numbers
  const auto run = [&](auto* numbers, const auto& kernels) {
    torch::stable::parallel_for(0, x.numel(), kWorthAThread,
                                [&](int64_t begin, int64_t end) { kernels.gelu(numbers + begin, end - begin); });
  };
  if (x.scalar_type() == ScalarType::Float)
    run(static_cast<float*>(x.mutable_data_ptr()), isa.float32);
  else if (x.scalar_type() == ScalarType::BFloat16)
    run(static_cast<uint16_t*>(x.mutable_data_ptr()), isa.bfloat16);
  else
    STD_TORCH_CHECK(false, "_gelu_: x must be float32 or bfloat16, got ", x.scalar_type());
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) { m.impl("_gelu_", TORCH_BOX(&meddiff::gelu)); }
