#include "vq_nearest.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "vq_codebook.h"
#include "vq_nearest_check.h"

namespace meddiff {
namespace {

using torch::stable::Tensor;

Tensor search(const Tensor& z, const Tensor& codes_in, const VqNearestIsa& isa) {
  check_vq_nearest(z, codes_in);
  const int64_t channels = z.size(1), n_codes = codes_in.size(0);
  const int64_t tokens = z.size(0) * z.size(2) * z.size(3) * z.size(4);
  Tensor index = torch::stable::new_empty(z, {z.size(0), z.size(2), z.size(3), z.size(4)},
                                          torch::headeronly::ScalarType::Long);
  if (tokens == 0) return index;

  const Tensor codes = torch::stable::contiguous(codes_in);
  const Codebook book(codes.const_data_ptr<float>(), n_codes, channels);
  VqNearestSearch s;
  s.z = z.const_data_ptr<float>();
  std::copy_n(z.sizes().data(), 5, s.size);
  std::copy_n(z.strides().data(), 5, s.stride);
  s.blocks = (n_codes + kVqBlock - 1) / kVqBlock;
  s.centre = book.centre.data();
  s.rows = book.rows.data();
  s.columns = book.columns.data();
  s.radius = book.radius;
  s.index = index.mutable_data_ptr<int64_t>();

  const int64_t tiles = (tokens + isa.tile - 1) / isa.tile;
  constexpr int64_t kWorthAThread = 1 << 20;  // multiplications
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (isa.tile * n_codes * channels));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<CacheLine> scratch(isa.tile * (2 * channels + s.blocks) / 16 + 1);
    isa.kernel(s, begin * isa.tile, std::min(end * isa.tile, tokens), scratch.data()->floats);
  });
  return index;
}

Tensor vq_nearest(const Tensor& z, const Tensor& codes) {
  static const VqNearestIsa& best = *vq_nearest_isas().front();
  return search(z, codes, best);
}

Tensor vq_nearest_isa(const Tensor& z, const Tensor& codes, const std::string& name) {
  for (const VqNearestIsa* isa : vq_nearest_isas())
    if (name == isa->name) return search(z, codes, *isa);
  STD_TORCH_CHECK(false, "_vq_nearest_isa: isa must be one of torch.ops.meddiff.cpu_isas(), got ", name);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const VqNearestIsa* isa : vq_nearest_isas()) names.emplace_back(isa->name);
  return names;
}

}  // namespace
}  // namespace meddiff

STABLE_TORCH_LIBRARY_IMPL(meddiff, CPU, m) {
  m.impl("vq_nearest", TORCH_BOX(&meddiff::vq_nearest));
  m.impl("_vq_nearest_isa", TORCH_BOX(&meddiff::vq_nearest_isa));
}

STABLE_TORCH_LIBRARY_IMPL(meddiff, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&meddiff::cpu_isas));
}
