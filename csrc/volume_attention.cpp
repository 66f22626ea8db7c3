// Self-attention of all voxels of a volume on the CPU, in bfloat16.
#include "volume_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "numbers.h"
#include "processor.h"

namespace meddiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const VolumeAttentionIsa* find_isa() {
#if defined(__x86_64__)
  if (has_amx()) return &kVolumeAttentionAmx;
#endif
  return nullptr;
}

bool has_volume_attention() { return find_isa() != nullptr; }

void volume_attention(const Tensor& qkv, int64_t heads, const Tensor& out) {
  const char* op = "_volume_attention";
  const VolumeAttentionIsa* isa = find_isa();
  STD_TORCH_CHECK(isa, op, ": this processor has no products of tiles (AMX)");
  STD_TORCH_CHECK(qkv.dim() == 3 && out.dim() == 3 && qkv.scalar_type() == ScalarType::BFloat16 &&
                      out.scalar_type() == ScalarType::BFloat16 && qkv.is_contiguous() && out.is_contiguous(),
                  op, ": qkv and out must be contiguous bfloat16 [B, N, ·]");
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), channels = out.size(2);
  STD_TORCH_CHECK(heads > 0 && channels % heads == 0 && qkv.size(2) == 3 * channels && out.size(0) == batch &&
                      out.size(1) == tokens,
                  op, ": for out [", batch, ", ", tokens, ", ", channels, "] qkv must be [", batch, ", ", tokens, ", ",
                  3 * channels, "], and the channels a multiple of ", heads, " heads");
  const int64_t dim = channels / heads;
  STD_TORCH_CHECK(dim > 0 && dim <= kVolumeHeadDim, op, ": heads must have 1 to ", kVolumeHeadDim, " channels, got ",
                  dim);
  if (out.numel() == 0) return;

  VolumeAttentionHead head{};
  head.row = 3 * channels, head.tokens = tokens, head.dim = dim, head.out_row = channels;
  head.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim)));
  Numbers keys(head.groups() * 2 * head.deep() * 512), values(head.groups() * head.wide() * 512);
  head.keys = keys.data(), head.values = values.data();
  for (int64_t i = 0; i < batch * heads; ++i) {
    head.q = static_cast<const uint16_t*>(qkv.const_data_ptr()) + i / heads * tokens * head.row + i % heads * dim;
    head.k = head.q + channels, head.v = head.k + channels;
    head.out = static_cast<uint16_t*>(out.mutable_data_ptr()) + i / heads * tokens * channels + i % heads * dim;
    torch::stable::parallel_for(0, head.groups(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) isa->arrange(head, group);
    });
    const int64_t blocks = (tokens + kVolumeQueries - 1) / kVolumeQueries;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      isa->begin();
      for (int64_t block = begin; block < end; ++block) isa->attend(head, block * kVolumeQueries);
      isa->end();
    });
  }
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) { m.impl("_volume_attention", TORCH_BOX(&meddiff::volume_attention)); }
STABLE_TORCH_LIBRARY_IMPL(meddiff, CompositeExplicitAutograd, m) {
  m.impl("_has_volume_attention", TORCH_BOX(&meddiff::has_volume_attention));
}
