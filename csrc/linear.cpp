// Products with a weight in bfloat16. That of few rows is bound by reading the weight; for each shape of either, oneDNN
// would make a kernel that takes half a megabyte.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "numbers.h"
#include "processor.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kFewRows = 256;
constexpr int64_t kShare = 1 << 22;  // products that are worth a thread

const LinearIsa* find_isa() {
#if defined(__x86_64__)
  if (has_amx()) return &kLinearAmx;
#endif
  return nullptr;
}

bool has_linear() { return find_isa() != nullptr; }

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const char* op = "_linear";
  const LinearIsa* isa = find_isa();
  STD_TORCH_CHECK(isa, op, ": this processor has no products of tiles (AMX)");
  for (const Tensor* t : {&x, &weight, &out})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::BFloat16 && t->is_contiguous() && t->dim() == 2, op,
                    ": x, weight and out must be contiguous bfloat16 matrices");
  Linear work{};
  work.rows = x.size(0), work.inputs = x.size(1), work.outputs = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == work.inputs && out.size(0) == work.rows && out.size(1) == work.outputs, op,
                  ": for x [", work.rows, ", ", work.inputs, "] and out [", out.size(0), ", ", out.size(1),
                  "] the weight must be [", out.size(1), ", ", work.inputs, "]");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::BFloat16 && bias->is_contiguous() &&
                            bias->dim() == 1 && bias->size(0) == work.outputs),
                  op, ": bias must be contiguous bfloat16 [", work.outputs, "]");
  const bool few = work.rows < kLinearRows || (work.rows <= kFewRows && work.outputs >= kLinearRows);
  if (out.numel() == 0) return;
  work.x = static_cast<const uint16_t*>(x.const_data_ptr());
  work.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  work.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  work.y = static_cast<uint16_t*>(out.mutable_data_ptr());

  std::vector<uint16_t> padded;
  if (few && work.outputs < kLinearRows) {
    padded.resize(kLinearRows * work.inputs);
    std::copy_n(work.weight, work.outputs * work.inputs, padded.data());
    work.weight = padded.data();
  }
  const uint16_t*& columns = few ? work.x : work.weight;
  const int64_t count = few ? work.rows : work.outputs, tiles = (count + 15) / 16;
  Numbers arranged(tiles * work.blocks() * 512);
  for (int64_t tile = 0; tile < tiles; ++tile) isa->arrange(columns, count, work.inputs, tile, arranged.data());
  columns = arranged.data();
  const int64_t length = few ? work.outputs : work.rows, groups = (length + kLinearRows - 1) / kLinearRows;
  const int64_t share = kShare / (kLinearRows * std::max<int64_t>(64, work.inputs) * std::max<int64_t>(16, count));
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, share), [&](int64_t begin, int64_t end) {
    isa->begin();
    for (int64_t group = begin; group < end; ++group) {  // the last one ends with the rows
      const int64_t written = group * kLinearRows, first = std::clamp<int64_t>(length - kLinearRows, 0, written);
      few ? isa->of_few(work, first, written) : isa->of_many(work, first, written);
    }
    isa->end();
  });
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) { m.impl("_linear", TORCH_BOX(&meddiff::linear)); }
STABLE_TORCH_LIBRARY_IMPL(meddiff, CompositeExplicitAutograd, m) {
  m.impl("_has_linear", TORCH_BOX(&meddiff::has_linear));
}
