#include "winograd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "processor.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const WinogradIsa& find_isa(const std::optional<std::string>& name) {
  std::vector<const WinogradIsa*> isas;
#if defined(__x86_64__)
  if (has_avx512()) isas.push_back(&kWinogradAvx512);
  if (has_avx2()) isas.push_back(&kWinogradAvx2);
#endif
  isas.push_back(&kWinogradPortable);
  for (const WinogradIsa* isa : isas)
    if (!name || *name == isa->name) return *isa;
  STD_TORCH_CHECK(false, "_winograd_conv3d: isa must be one of torch.ops.meddiff.cpu_isas(), got ", *name);
}

constexpr int64_t kMostBlocks = 48;  // at a time, as kernels/winograd.py has it

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x [B, D + 2, H + 2, W + 2, C], taps [27, C, O] and bias [O], y [B, D, H, W, O]
void winograd_conv3d(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, const Tensor& y,
                     const std::optional<std::string>& isa_name) {
  const char* op = "_winograd_conv3d";
  const WinogradIsa& isa = find_isa(isa_name);
  for (const Tensor* t : {&x, &taps, &y})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), op,
                    ": tensors must be float32 and contiguous");
  STD_TORCH_CHECK(x.dim() == 5 && y.dim() == 5 && taps.dim() == 3 && taps.size(0) == 27, op,
                  ": x and y must be [B, D, H, W, C] and taps [27, C, O]");
  const int64_t channels = taps.size(1), outputs = taps.size(2);
  for (int i = 1; i < 4; ++i)
    STD_TORCH_CHECK(x.size(i) == y.size(i) + 2, op, ": x must have two planes more than y, got ", x.size(i), " and ",
                    y.size(i));
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(4) == channels && y.size(4) == outputs, op,
                  ": samples or channels differ");
  STD_TORCH_CHECK(channels % isa.lanes == 0 && outputs % isa.lanes == 0, op, ": channels must be multiples of ",
                  isa.lanes, ", got ", channels, " and ", outputs);
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->dim() == 1 &&
                            bias->size(0) == outputs),
                  op, ": bias must be contiguous float32 [", outputs, "]");
  if (y.numel() == 0) return;

  const int64_t numbers = channels * outputs;
  std::vector<float> u(64 * numbers);
  const float* from = taps.const_data_ptr<float>();
  isa.transform_weight(from, numbers, u.data());
  WinogradTile whole{x.const_data_ptr<float>(), u.data(), bias ? bias->const_data_ptr<float>() : nullptr,
                     y.mutable_data_ptr<float>(), y.size(1), y.size(2), y.size(3), channels, outputs};
  // the weight's points are read once for so many blocks, whose own points should stay in cache
  const int64_t most = numbers <= 1 << 13 ? 18 : numbers <= 1 << 14 ? 36 : kMostBlocks;
  const int64_t blocks = whole.blocks(), groups = quotient_up(blocks, most), share = quotient_up(blocks, groups);
  torch::stable::parallel_for(0, x.size(0) * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(64 * share * (channels + outputs));
    for (int64_t i = begin; i < end; ++i) {
      WinogradTile tile = whole;
      tile.x += i / groups * (x.numel() / x.size(0));
      tile.y += i / groups * (y.numel() / y.size(0));
      const int64_t first = i % groups * share, count = std::min(share, blocks - first);
      if (count > 0) isa.convolve(tile, first, count, memory.data());
    }
  });
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) { m.impl("_winograd_conv3d", TORCH_BOX(&meddiff::winograd_conv3d)); }
